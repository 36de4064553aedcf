"""accelerate() on the families with images: ViT, CLIP, SigLIP, ViLT, VisualBERT; LayoutLM is in test_families.py."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

from hf_models import accelerated  # noqa: E402
from image_models import IMAGES, MASK, PATCH, REGIONS, SIDE, TEXT, B, batch, build  # noqa: E402
from modern_models import close, count_layers  # noqa: E402

import fastbert  # noqa: E402
from fastbert.backend import cpu  # noqa: E402
from fastbert.integrations import layers  # noqa: E402

MODELS = ("ViTModel", "CLIPVisionModel", "SiglipVisionModel", "SiglipTextModel")
MODELS = (*MODELS, "CLIPTextModel", "ViltModel", "VisualBertModel")
# the numbers of our layers' calls in a forward
HEADS = {
    "ViTForImageClassification": 3,
    "ViTForMaskedImageModeling": 3,
    "CLIPModel": 6,
    "CLIPForImageClassification": 3,
    "SiglipModel": 6,
    "SiglipForImageClassification": 3,
    "ViltForQuestionAnswering": 3,
    "ViltForMaskedLM": 3,
    "ViltForTokenClassification": 3,
    "ViltForImagesAndTextClassification": 6,
    "VisualBertForPreTraining": 3,
    "VisualBertForMultipleChoice": 3,
    "VisualBertForQuestionAnswering": 3,
    "VisualBertForVisualReasoning": 3,
    "VisualBertForRegionToPhraseAlignment": 3,
}
PATCHES = torch.tensor([h * w // PATCH**2 for h, w in IMAGES])
SEEN = {
    "CLIPTextModel": MASK,
    "ViltModel": torch.cat([MASK, (torch.arange(-1, 9) < PATCHES[:, None]).long()], 1),
    "VisualBertModel": torch.cat([MASK, REGIONS], 1),
}


def run(model, given):
    """The output; ViLT draws which of an image's hidden patches stand behind the others."""
    torch.manual_seed(7)
    return model(**given)


def doubled(given):
    return {
        n: t.double() if torch.is_tensor(t) and t.is_floating_point() else t
        for n, t in given.items()
    }


def results(model, given):
    """Ours, transformers' and those in fp64: outputs and every gradient of the loss, or of the outputs' sum."""
    found = []
    for m, g in (
        (accelerated(model), given),
        (model, given),
        (copy.deepcopy(model).double(), doubled(given)),
    ):
        m.train()
        out = run(m, g)
        y = out.loss if "loss" in out else out.pooler_output.square().sum()
        y.backward()
        found.append((out, y, {n: p.grad for n, p in m.named_parameters()}))
        m.zero_grad()
    return found


@pytest.mark.parametrize("name", MODELS)
def test_a_model_gives_the_hidden_states_of_transformers(name, monkeypatch):
    model = build(name)
    given, calls = batch(name), count_layers(monkeypatch)
    ours, stock, truth = (
        run(m, g | {"output_hidden_states": True})
        for m, g in (
            (accelerated(model), given),
            (model, given),
            (copy.deepcopy(model).double(), doubled(given)),
        )
    )
    assert len(calls) == 3
    assert list(ours) == list(stock)
    close(ours.pooler_output, stock.pooler_output, truth.pooler_output, "pooler_output")
    seen = SEEN.get(name, torch.ones(ours[0].shape[:2])).bool()
    assert not ours[0][~seen].any()
    for i, states in enumerate(zip(*(m.hidden_states for m in (ours, stock, truth)), strict=True)):
        assert states[0].shape == states[1].shape
        close(*(s[seen] for s in states), f"hidden state {i}")
    close(*(m[0][seen] for m in (ours, stock, truth)), "last_hidden_state")


@pytest.mark.parametrize("name", [*MODELS, *HEADS])
def test_every_gradient_is_as_near_as_transformers(name, monkeypatch):
    model, calls = build(name), count_layers(monkeypatch)
    ours, stock, truth = results(model, batch(name))
    assert len(calls) == HEADS.get(name, 3)
    close(*(found[1] for found in (ours, stock, truth)), "loss")
    assert sum(g is not None for g in truth[2].values()) > 10
    # the bias of a key or of a choice's score changes no softmax: its gradient is rounding alone
    floor = 1e-6 * max(g.abs().max().item() for g in truth[2].values() if g is not None)
    for n, gradient in truth[2].items():
        if gradient is None:
            assert ours[2][n] is None or not ours[2][n].any(), n
        else:
            close(ours[2][n], stock[2][n], gradient, n, floor)


@pytest.mark.skipif(cpu.native is None, reason=str(cpu.unavailable))
@pytest.mark.parametrize("name", [n for n in MODELS if n != "SiglipTextModel"])
def test_a_frozen_model_gives_the_same_outputs_and_a_quantised_one_near_ones(name, monkeypatch):
    model, given = accelerated(build(name)), batch(name)
    with torch.no_grad():
        expected = run(model, given)[0]
        monkeypatch.setattr(layers, "run", lambda *_: pytest.fail("a layer ran by itself"))
        y = run(fastbert.freeze(model), given)[0]
        assert (y - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert fastbert.frozen_bytes(model) > 0
        errors = []
        for bits in (12, 8):
            y = run(fastbert.quantize(model, bits), given)[0]
            errors.append(((y - expected).norm() / expected.norm()).item())
    # the weights' rounding is the larger part of 12 bits' error
    assert 0 < errors[0] < 0.02
    assert errors[0] < errors[1] < 0.2


@pytest.mark.parametrize(
    "name", ["ViTModel", "CLIPModel", "ViltForMaskedLM", "VisualBertForPreTraining"]
)
def test_validate_compares_at_tokens(name, capsys):
    report = fastbert.validate(build(name), batch(name), rounds=1)
    assert report.agrees
    assert "agrees" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["ViTForImageClassification", "ViltForQuestionAnswering"])
def test_gradient_checkpointing_gives_the_same_gradients(name):
    found = []
    for checkpointed in (False, True):
        fast = accelerated(build(name)).train()
        if checkpointed:
            fast.gradient_checkpointing_enable()
        run(fast, batch(name)).loss.backward()
        found.append([p.grad for p in fast.parameters() if p.grad is not None])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


LORA = {
    "ViTModel": ["q_proj", "fc1"],
    "CLIPTextModel": ["q_proj", "fc2"],
    "ViltModel": ["query", "value"],
}


@pytest.mark.parametrize("first", ["adapters", "accelerate"])
@pytest.mark.parametrize("name", LORA)
def test_adapters_train_as_in_transformers(name, first):
    peft = pytest.importorskip("peft")
    model, given, found = build(name), batch(name), []

    def adapted(m):
        torch.manual_seed(5)
        config = peft.LoraConfig(target_modules=LORA[name], init_lora_weights=False)
        return peft.get_peft_model(m, config)

    fast = accelerated(adapted(copy.deepcopy(model)) if first == "adapters" else model)
    for m in (fast if first == "adapters" else adapted(fast), adapted(model)):
        m.eval()
        y = run(m, given).pooler_output
        (y * torch.arange(y.numel()).view(y.shape).sin()).sum().backward()
        found.append((y, {n: p.grad for n, p in m.named_parameters() if p.grad is not None}))
    (ours, of_ours), (stock, of_stock) = found
    assert torch.allclose(ours, stock, atol=1e-5)
    assert of_ours.keys() == of_stock.keys()
    largest = max(g.abs().max() for g in of_stock.values())
    for n, gradient in of_stock.items():
        assert torch.allclose(of_ours[n], gradient, rtol=1e-4, atol=1e-5 * largest), n


@pytest.mark.parametrize("name", ["ViTModel", "CLIPVisionModel", "CLIPTextModel"])
def test_without_a_mask_the_whole_model_is_one_graph(name):
    model, given = build(name, num_hidden_layers=1), batch(name)
    given.pop("attention_mask", None)
    torch._dynamo.reset()
    fast = torch.compile(accelerated(model), backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(fast(**given)[0], model(**given)[0], atol=1e-5)


def test_vilt_packs_what_the_masks_show(monkeypatch):
    """Every mask alone, none, and images of which `max_image_length` patches are drawn."""
    seen, inner = [], layers.run
    monkeypatch.setattr(layers, "run", lambda m, x, c: seen.append(len(x)) or inner(m, x, c))
    given = batch("ViltModel")
    cases = (
        (("attention_mask", "pixel_mask"), {}, TEXT.sum() + PATCHES.sum() + B),
        (("attention_mask",), {}, TEXT.sum() + 10 * B),
        (("pixel_mask",), {}, 11 * B + PATCHES.sum() + B),
        ((), {}, 21 * B),
        (("pixel_mask",), {"max_image_length": 4}, 11 * B + PATCHES.clamp(max=4).sum() + B),
        ((), {"max_image_length": 4}, 16 * B),
    )
    for masks, changes, tokens in cases:
        model = build("ViltModel", **changes)
        part = {n: t for n, t in given.items() if not n.endswith("mask") or n in masks}
        seen.clear()
        ours, stock = (run(m, part) for m in (accelerated(model), model))
        assert seen == [tokens] * 3
        assert ours[0].shape == stock[0].shape
        assert torch.allclose(ours.pooler_output, stock.pooler_output, atol=1e-5)


def test_images_of_another_size_run_with_interpolated_positions(monkeypatch):
    for name in ("ViTModel", "CLIPVisionModel", "SiglipVisionModel"):
        model, calls = build(name), count_layers(monkeypatch)
        given = {"pixel_values": torch.randn(2, 3, 32, 40), "interpolate_pos_encoding": True}
        assert torch.allclose(accelerated(model)(**given)[0], model(**given)[0], atol=2e-5)
        assert len(calls) == 3
        with pytest.raises((RuntimeError, ValueError, TypeError, AttributeError)) as theirs:
            model(given["pixel_values"])
        with pytest.raises(theirs.type):
            accelerated(model)(given["pixel_values"])


def test_vit_with_a_mask_skips_hidden_patches(monkeypatch):
    model, given = build("ViTModel"), batch("ViTModel")
    given["attention_mask"] = (torch.arange(10) < torch.tensor([10, 4, 7, 1, 9])[:, None]).long()
    seen, inner = [], layers.run
    monkeypatch.setattr(layers, "run", lambda m, x, c: seen.append(len(x)) or inner(m, x, c))
    ours, stock = accelerated(model)(**given), model(**given)
    assert seen == [31] * 3
    token = given["attention_mask"].bool()
    assert torch.allclose(ours[0][token], stock[0][token], atol=1e-5)
    assert not ours[0][~token].any()


def test_the_pooler_of_siglips_text_reads_the_last_column_also_where_it_is_padding(monkeypatch):
    model, calls = build("SiglipTextModel"), count_layers(monkeypatch)
    for choice in ("auto", "zeros"):
        fast = fastbert.accelerate(copy.deepcopy(model), at_padding=choice)
        ours, stock = (m(**batch("SiglipTextModel")) for m in (fast, model))
        assert torch.allclose(ours.pooler_output, stock.pooler_output, atol=1e-5)
        assert torch.allclose(ours[0], stock[0], atol=2e-5)
    assert len(calls) == 6


@pytest.mark.parametrize("name", ["ViTModel", "CLIPTextModel", "ViltModel"])
def test_attention_weights_are_those_of_transformers(name, monkeypatch):
    model, given = (
        build(name, attn_implementation="eager"),
        batch(name) | {"output_attentions": True},
    )
    calls = count_layers(monkeypatch)
    with torch.no_grad():
        ours, stock = (run(m, given) for m in (accelerated(model), model))
    assert len(calls) == 3
    seen = SEEN.get(name, torch.ones(ours[0].shape[:2])).bool()
    for a, b in zip(ours.attentions, stock.attentions, strict=True):
        assert torch.allclose(a.transpose(1, 2)[seen], b.transpose(1, 2)[seen], atol=1e-5)


@pytest.mark.parametrize("name", ["ViTModel", "CLIPVisionModel", "ViltModel"])
def test_hooks_see_the_padded_batch(name, said):
    model, found = build(name), []
    given = batch(name)
    for m in (accelerated(model), model):
        family = getattr(type(m), "fastbert_family", None) or found[0][1]
        shapes = []
        layer = family.layers_of(family.stack_of(m))[1]
        layer.register_forward_hook(lambda m, args, y, s=shapes: s.append(args[0].shape))
        y = run(m, given).pooler_output
        found.append((shapes, family, y))
    assert found[0][0] == found[1][0]
    assert torch.allclose(found[0][2], found[1][2], atol=1e-5)
    assert any("hooks are attached to the layer 1" in line for line in said())


def test_labels_of_visual_bert_at_padding_count_as_in_transformers(said):
    model, given = build("VisualBertForPreTraining"), batch("VisualBertForPreTraining")
    given["labels"][2, -1] = 1
    ours, stock = accelerated(model)(**given), model(**given)
    assert torch.allclose(ours.loss, stock.loss, atol=1e-5)
    assert any("labels at padding are not -100" in line for line in said())


def _replaced(model):
    old = model.embeddings.patch_embeddings.projection
    model.embeddings.patch_embeddings.projection = torch.nn.Sequential(old)


def _embeds(given):
    given.pop("pixel_values")
    given["image_embeds"] = torch.randn(B, 6, 48)
    given["pixel_mask"] = torch.ones(B, 2, 3)


FALLBACKS = {
    "image_embeds": ("ViltModel", {}, None, _embeds, "image_embeds are given"),
    "patches": ("ViTModel", {}, _replaced, None, "its projection is Sequential"),
    "bypass": (
        "VisualBertModel",
        {"bypass_transformer": True},
        None,
        lambda g: [g.pop(n) for n in ("attention_mask", "visual_attention_mask")],
        "config.bypass_transformer is set",
    ),
    "left": (
        "ViltModel",
        {},
        None,
        lambda g: g.update(attention_mask=MASK.flip(1)),
        "a sequence begins with padding",
    ),
}


@pytest.mark.parametrize("case", FALLBACKS)
def test_what_is_not_served_runs_transformers_code(case, said, monkeypatch):
    name, config, change, prepare, sentence = FALLBACKS[case]
    model, given = build(name, **config), batch(name)
    calls = count_layers(monkeypatch)
    if change is not None:
        change(model)
    if prepare is not None:
        prepare(given)
    try:
        stock = run(model, given)
    except Exception as error:  # as transformers does
        with pytest.raises(type(error)):
            run(accelerated(model), given)
    else:
        assert torch.allclose(run(accelerated(model), given)[0], stock[0], atol=1e-5)
    assert not calls
    assert any(sentence in line for line in said())


@pytest.mark.parametrize("wrong", [torch.randn(B, 4, SIDE, SIDE), torch.randn(B, 3, SIDE), None])
def test_wrong_images_raise_what_transformers_raises(wrong):
    model = build("ViTModel")
    with pytest.raises((RuntimeError, ValueError, TypeError, AttributeError)) as theirs:
        model(pixel_values=wrong)
    with pytest.raises(theirs.type):
        accelerated(model)(pixel_values=wrong)


def test_restored_models_are_transformers_again():
    for name in ("ViTModel", "ViltModel", "CLIPModel"):
        model, given = build(name), batch(name)
        restored = fastbert.restore(accelerated(model))
        assert type(restored) is type(model)
        assert all(
            type(a) is type(b) for a, b in zip(restored.modules(), model.modules(), strict=True)
        )
        assert torch.equal(run(restored, given)[0], run(model, given)[0])


@pytest.mark.parametrize("name", ["ViTForImageClassification", "ViltForQuestionAnswering"])
def test_hidden_states_that_the_config_asks_for_are_all_there(name):
    model, given = build(name, output_hidden_states=True), batch(name)
    ours, stock = (run(m, given).hidden_states for m in (accelerated(model), model))
    assert [s.shape for s in ours] == [s.shape for s in stock]
