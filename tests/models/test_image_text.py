"""Two towers and a single stream: their parts against formulas in plain torch, chunks, files, refusals."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as tnf

from fastbert.bert import BertConfig
from fastbert.data.images import image_batch
from fastbert.models.images import with_patches
from fastbert.models.losses import contrastive_loss
from fastbert.models.single_stream import BertForImageText
from fastbert.models.two_towers import ImageTextConfig, TwoTowers, chunks, is_two_towers
from fastbert.nn.patches import PatchEmbedding
from fastbert.train.optim import parameter_groups

PATCH, SIDES = 4, 8


def sizes(**more):
    given = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertConfig(**given, intermediate_size=64, max_position_embeddings=16, **more)


def towers(loss="softmax", p=0.0, **more):
    torch.manual_seed(0)
    rates = {"hidden_dropout_prob": p, "attention_probs_dropout_prob": p, "pre_norm": True} | more
    text = sizes(vocab_size=50, type_vocab_size=0, **rates)
    image = sizes(vocab_size=1, type_vocab_size=0, **rates)
    return TwoTowers(ImageTextConfig(text, with_patches(image, PATCH, SIDES), 16, loss))


def stream(p=0.0):
    torch.manual_seed(0)
    rates = {"hidden_dropout_prob": p, "attention_probs_dropout_prob": p}
    return BertForImageText(with_patches(sizes(vocab_size=50, **rates), PATCH, SIDES))


def pairs(count=7, seed=0):
    """Images and texts of different sizes."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(2, 12, count)
    shapes = draw.integers(1, PATCH * SIDES + 1, (count, 2))
    images = [draw.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    bounds = np.cumsum([0, *lengths])
    return {
        "input_ids": torch.from_numpy(draw.integers(1, 50, bounds[-1])),
        "cu_seqlens": torch.from_numpy(bounds.astype(np.int32)),
        "max_seqlen": int(lengths.max()),
        **image_batch(images, PATCH),
    }


def only(batch, i):
    """Pair i of a batch alone."""
    (t0, t1), (p0, p1) = (batch[n][i : i + 2].tolist() for n in ("cu_seqlens", "patch_cu_seqlens"))
    return {
        "input_ids": batch["input_ids"][t0:t1],
        "cu_seqlens": torch.tensor([0, t1 - t0], dtype=torch.int32),
        "max_seqlen": t1 - t0,
        "patches": batch["patches"][p0:p1],
        "places": batch["places"][p0:p1],
        "patch_cu_seqlens": torch.tensor([0, p1 - p0], dtype=torch.int32),
        "patch_max_seqlen": p1 - p0,
    }


def test_a_patch_embedding_is_a_convolution_with_positions():
    torch.manual_seed(0)
    module = PatchEmbedding(PATCH, 32, SIDES)
    batch = image_batch([np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)], PATCH)
    image = batch["patches"].view(2, 3, PATCH, PATCH, 3).permute(4, 0, 2, 1, 3).reshape(3, 8, 12)
    kernel = module.projection.weight.view(32, PATCH, PATCH, 3).permute(0, 3, 1, 2)
    x = image[None].float() / 127.5 - 1
    y = tnf.conv2d(x, kernel, module.projection.bias, stride=PATCH)[0]  # (C, 2, 3)
    y = y + module.row.weight[:2].T[:, :, None] + module.column.weight[:3].T[:, None]
    found = module(batch["patches"], batch["places"])
    torch.testing.assert_close(found, y.flatten(1).T, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"patches are \(6, 27\): pass \(P, 48\)"):
        module(batch["patches"][:, :27], batch["places"])


@pytest.mark.parametrize("pre_norm", [True, False])
def test_vectors_do_not_depend_on_the_batch(pre_norm):
    model, batch = towers(pre_norm=pre_norm).eval(), pairs()
    output = model(**batch)
    torch.testing.assert_close(output.image_embeds.norm(dim=1), torch.ones(7))
    for i in range(7):
        alone = model(**only(batch, i))
        torch.testing.assert_close(alone.image_embeds[0], output.image_embeds[i])
        torch.testing.assert_close(alone.text_embeds[0], output.text_embeds[i])


def test_a_vector_is_the_mapped_mean_of_the_tokens():
    model, batch = towers().eval(), pairs(1)
    x = model.image(*(batch[n] for n in batch if "patch" in n or n == "places")).x
    expected = tnf.normalize(x.mean(0) @ model.image_projection.weight.T, dim=0)
    torch.testing.assert_close(model(**batch).image_embeds[0], expected)


def test_the_place_of_a_patch_counts():
    model, batch = towers().eval(), pairs(1)
    turned = {**batch, "places": batch["places"].flip(1)}
    assert not torch.allclose(model(**batch).image_embeds, model(**turned).image_embeds, atol=1e-3)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_losses_are_their_formulas(kind):
    logits = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    total = 0.0
    for i in range(5):
        if kind == "softmax":
            row, column = logits[i].softmax(0)[i], logits[:, i].softmax(0)[i]
            total -= (math.log(row) + math.log(column)) / 2
            continue
        for j in range(5):
            z = float(logits[i, j]) * (1 if i == j else -1)
            total += math.log1p(math.exp(-z))
    assert float(contrastive_loss(logits, kind)) == pytest.approx(total / 5)


def gradients(model, batch, chunk, seed=1, **more):
    model.train()
    model.chunk = chunk
    model.zero_grad()
    torch.manual_seed(seed)
    loss = model(**batch, **more).loss
    loss.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert None not in trained.values()
    return loss.item(), {name: grad.clone() for name, grad in trained.items()}


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_chunks_give_the_gradients_of_the_whole(kind, chunk):
    model, batch = towers(kind), pairs()
    loss, whole = gradients(model, batch, 0)
    other, found = gradients(model, batch, chunk)
    assert other == pytest.approx(loss, rel=1e-5)
    for name, grad in whole.items():
        # rounding: products of other sizes are summed in another order
        scale = grad.abs().max().clamp(min=1e-3)
        torch.testing.assert_close(found[name] / scale, grad / scale, rtol=1e-4, atol=1e-4)


def test_backward_replays_the_dropout_of_each_chunk(monkeypatch):
    model, batch = towers(p=0.3), pairs()
    replayed = gradients(model, batch, 3)
    # the same chunks, with all activations kept
    monkeypatch.setattr(
        "fastbert.models.two_towers.recomputed", lambda f, arguments, weights: f(*arguments)
    )
    kept = gradients(model, batch, 3)
    assert replayed[0] == kept[0]
    for name, grad in kept[1].items():
        torch.testing.assert_close(replayed[1][name], grad, rtol=1e-6, atol=1e-6)
    other = gradients(model, batch, 3, seed=2)
    assert other[0] != kept[0]


def test_chunks_follow_autocast():
    model, batch = towers(), pairs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole = gradients(model, batch, 0)[1]
        found = gradients(model, batch, 3)[1]
    cosine = tnf.cosine_similarity
    for name in ("image.patches.projection.weight", "text.layers.0.attention.qkv.weight"):
        assert cosine(found[name].flatten(), whole[name].flatten(), dim=0) > 0.99
        assert not torch.equal(found[name], gradients(model, batch, 3)[1][name])


def test_chunks_keep_their_vectors_alone():
    """What a forward saves grows with the chunk, and not with the batch."""
    model, batch = towers(), pairs(24)
    model.train()

    def saved(chunk):
        model.chunk, total = chunk, 0

        def keep(t):
            nonlocal total
            total += 0 if isinstance(t, torch.nn.Parameter) else t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            model(**batch)
        return total

    assert saved(3) < saved(0) / 5


def test_chunks_cut_packed_rows():
    found = list(chunks(torch.tensor([0, 2, 5, 6, 10], dtype=torch.int32), 3))
    assert [(part.start, part.stop, cu.tolist(), n) for part, cu, n in found] == [
        (0, 6, [0, 2, 5, 6], 3),
        (6, 10, [0, 4], 4),
    ]


def test_parts_of_a_step_add_up():
    model, batch = towers(), pairs()
    assert gradients(model, batch, 0, num_pairs_in_batch=14)[0] * 2 == pytest.approx(
        gradients(model, batch, 0)[0]
    )


def test_a_temperature_is_not_decayed():
    model = towers("sigmoid")
    decayed, kept = parameter_groups(model, 0.1)
    assert {"logit_scale", "logit_bias"} <= {*kept["names"]}
    assert "image.patches.row.weight" in decayed["names"]


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_towers_are_saved_and_loaded(tmp_path, kind):
    model, batch = towers(kind).eval(), pairs()
    model.save_pretrained(tmp_path / "m")
    loaded = TwoTowers.from_pretrained(tmp_path / "m")
    assert loaded.config.to_dict() == model.config.to_dict()
    assert is_two_towers(tmp_path / "m")
    assert torch.equal(loaded(**batch).image_embeds, model(**batch).image_embeds)
    assert torch.equal(loaded(**batch).loss, model(**batch).loss)


def test_towers_refuse(tmp_path):
    stream().save_pretrained(tmp_path / "s")
    assert not is_two_towers(tmp_path / "s")
    with pytest.raises(ValueError, match="is not of two towers: train them with fastbert pretrain"):
        TwoTowers.from_pretrained(tmp_path / "s")
    with pytest.raises(ValueError, match="loss is 'hinge': choose softmax or sigmoid"):
        ImageTextConfig(sizes(), with_patches(sizes(), 4, 8), loss="hinge")
    with pytest.raises(ValueError, match="patch_size is None and max_patches None"):
        ImageTextConfig(sizes(), sizes())
    batch = pairs() | {n: v for n, v in pairs(3).items() if n in ("patches", "places")}
    batch |= {n: v for n, v in pairs(3).items() if n.startswith("patch_")}
    for model in (towers(), stream()):
        with pytest.raises(ValueError, match="there are 3 images and 7 texts: pass pairs"):
            model(**batch)


def test_a_stream_is_a_bert_on_joined_embeddings():
    """Against BertModel on a padded batch of the same embeddings."""
    model, batch = stream().eval(), pairs()
    labels = torch.full_like(batch["input_ids"], -100)
    labels[[1, 4, 9]] = batch["input_ids"][[1, 4, 9]]
    answers = torch.tensor([0, 1, 0, 0, 1, 1, 0])
    output = model(**batch, labels=labels, matching_label=answers, return_logits=True)
    x = model.patches(batch["patches"], batch["places"])
    words = model.bert.embeddings.word(batch["input_ids"])
    losses, seen = [], 0
    for i in range(7):
        (t0, t1), (p0, p1) = (
            batch[n][i : i + 2].tolist() for n in ("cu_seqlens", "patch_cu_seqlens")
        )
        both = torch.cat([words[t0:t1], x[p0:p1]])[None]
        places = torch.cat([torch.arange(t1 - t0), torch.zeros(p1 - p0, dtype=torch.int64)])[None]
        types = (torch.arange(both.shape[1]) >= t1 - t0).long()[None]
        expected = model.bert(inputs_embeds=both, position_ids=places, token_type_ids=types)
        matching = model.matching_head(expected.pooler_output)
        torch.testing.assert_close(output.matching_logits[i], matching[0])
        losses.append(tnf.cross_entropy(matching, answers[i : i + 1]))
        for t in (labels[t0:t1] != -100).nonzero().flatten():
            table = model.bert.embeddings.word.weight
            logits = model.mlm_head(expected.last_hidden_state[0, t][None], table)
            torch.testing.assert_close(output.logits[seen], logits[0], rtol=1e-4, atol=1e-4)
            seen += 1
    assert seen == 3
    torch.testing.assert_close(output.matching_loss, torch.stack(losses).mean())
    expected = tnf.cross_entropy(output.logits, labels[labels != -100])
    torch.testing.assert_close(output.mlm_loss, expected)
    torch.testing.assert_close(output.loss, output.mlm_loss + output.matching_loss)


def test_a_stream_trains_all_its_weights_and_is_loaded(tmp_path):
    model, batch = stream(p=0.1).train(), pairs()
    labels = batch["input_ids"].clone()
    model(**batch, labels=labels, matching_label=torch.ones(7, dtype=torch.int64)).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]
    model.save_pretrained(tmp_path / "m")
    loaded = BertForImageText.from_pretrained(tmp_path / "m")
    assert torch.equal(loaded(**batch).matching_logits, model.eval()(**batch).matching_logits)
    with pytest.raises(ValueError, match="a text has 99 tokens and the model 16 positions"):
        model(**batch | {"max_seqlen": 99})
    with pytest.raises(ValueError, match="set type_vocab_size to 2"):
        BertForImageText(with_patches(sizes(type_vocab_size=0), 4, 8))
