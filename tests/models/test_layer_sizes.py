"""Layers with sizes of their own: equal to a dense model whose other heads and columns are zero, in every form."""

from __future__ import annotations

import copy
import json
import logging

import pytest
import torch
import transformers
from pairs import SIZES

import fastbert
from fastbert import bert
from fastbert.backend import cpu
from fastbert.bert import BertConfig
from fastbert.models.config import LAYER_SIZES
from fastbert.nn.blocks import EncoderLayer
from fastbert.runners.training import TrainingRunner

HEADS, COLUMNS, D = SIZES["num_attention_heads"], SIZES["intermediate_size"], 8
# the numbers of the heads and columns that a layer keeps
KEPT_HEADS = [[0, 2], [], [0, 1, 2], [1]]
KEPT_COLUMNS = [range(5, 21), range(COLUMNS), [], [3, 4, 9, 30, 43]]
KINDS = ["BertForSequenceClassification", "BertForTokenClassification", "BertForPreTraining"]


def rows_of(heads):
    """The rows of queries, keys or values that belong to these heads."""
    return torch.tensor([D * head + i for head in heads for i in range(D)], dtype=torch.int64)


def pair(kind="BertForSequenceClassification", family="bert", **settings):
    """A dense model whose heads and columns outside of KEPT_* are zero, and the model without them."""
    sizes = {**SIZES, "num_hidden_layers": 4, "model_type": family, **settings}
    own = {"layer_heads": [*map(len, KEPT_HEADS)], "layer_widths": [*map(len, KEPT_COLUMNS)]}
    dense = getattr(bert, kind)(BertConfig(**sizes)).eval()
    small = getattr(bert, kind)(BertConfig(**sizes, **own)).eval()
    state = dense.state_dict()
    with torch.no_grad():
        for value in state.values():
            value.normal_(std=0.3)
        for i, (heads, columns) in enumerate(zip(KEPT_HEADS, KEPT_COLUMNS, strict=True)):
            inner = rows_of(heads)
            kept = {
                "attention.qkv": torch.cat([inner + part * HEADS * D for part in range(3)]),
                "attention.out": inner,
                "feed_forward.up": torch.tensor([*columns], dtype=torch.int64),
                "feed_forward.down": torch.tensor([*columns], dtype=torch.int64),
            }
            for part, numbers in kept.items():
                last = part.endswith(("out", "down"))
                for leaf in ("weight",) if last else ("weight", "bias"):
                    key = f"bert.layers.{i}.{part}.{leaf}"
                    value = state[key]
                    whole = value.clone()
                    value.zero_()
                    dim = 1 if last else 0
                    value.index_copy_(dim, numbers, whole.index_select(dim, numbers))
        dense.load_state_dict(state)
        for key, value in small.state_dict().items():
            i, _, rest = key.removeprefix("bert.layers.").partition(".")
            part, _, leaf = rest.rpartition(".")
            full = state[key]
            if key.startswith("bert.layers.") and value.shape != full.shape:
                number = int(i)
                inner, columns = rows_of(KEPT_HEADS[number]), [*KEPT_COLUMNS[number]]
                numbers = {
                    "attention.qkv": torch.cat([inner + j * HEADS * D for j in range(3)]),
                    "attention.out": inner,
                }.get(part, torch.tensor(columns, dtype=torch.int64))
                full = full.index_select(
                    full.dim() - 1 if part.endswith(("out", "down")) else 0, numbers
                )
            value.copy_(full)
    return dense, small


def batch(kind=None):
    """A padded batch, with labels for a model of this kind."""
    ids = torch.randint(2, 61, (5, 12))
    mask = (torch.arange(12) < torch.tensor([12, 3, 7, 1, 9])[:, None]).long()
    given = {"input_ids": ids, "attention_mask": mask}
    if kind == "BertForSequenceClassification":
        given["labels"] = torch.randint(0, 2, (5,))
    elif kind is not None:
        given["labels"] = torch.where(mask == 1, torch.randint(0, 2, ids.shape), -100)
    return given


def tensors(output):
    return {k: v for k, v in vars(output).items() if isinstance(v, torch.Tensor)}


def assert_close(ours, theirs, tolerance=1e-5):
    ours, theirs = tensors(ours), tensors(theirs)
    assert ours.keys() == theirs.keys()
    assert ours
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_outputs_are_those_of_the_dense_model(kind, backend):
    dense, small = pair(kind)
    given = batch(kind)
    with fastbert.use(backend), torch.no_grad():
        assert_close(small(**given), dense(**given))
        weights = small.bert(**batch(), output_attentions=True, output_hidden_states=True)
    assert [w.shape[1] for w in weights.attentions] == [2, 0, 3, 1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_is_that_of_the_dense_model(kind, checkpointing):
    # the masks of attention weights depend on the number of a head; all other masks are the same
    dense, small = pair(kind, attention_probs_dropout_prob=0.0)
    if checkpointing:
        small.gradient_checkpointing_enable()
    given, losses = batch(kind), []
    for model in (dense, small):
        torch.manual_seed(5)
        loss = model.train()(**given).loss
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    theirs = dict(dense.named_parameters())
    for name, p in small.named_parameters():
        if p.shape == theirs[name].shape:
            assert (p.grad is None) == (theirs[name].grad is None), name
            if p.grad is not None:
                torch.testing.assert_close(
                    p.grad, theirs[name].grad, rtol=1e-4, atol=1e-5, msg=name
                )
        elif p.numel():
            assert p.grad is not None, name
        else:
            # DistributedDataParallel would wait for its gradient
            assert not p.requires_grad, name


def test_a_step_trains_what_is_left():
    _, small = pair()
    before = copy.deepcopy(small.state_dict())
    optimiser = torch.optim.AdamW(small.parameters(), lr=0.1, fused=True)
    TrainingRunner(small.train())(**batch("BertForSequenceClassification"))
    optimiser.step()
    same = [k for k, v in small.state_dict().items() if v.numel() and torch.equal(v, before[k])]
    assert same == []


def test_autocast_is_close():
    dense, small = pair()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert_close(small(**batch()), dense(**batch()), 5e-2)


@pytest.mark.skipif(cpu.native is None, reason=str(cpu.unavailable))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_runs_in_the_native_call(dtype, caplog):
    dense, small = pair()
    fastbert.freeze(small)
    given = batch()
    with (
        torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16),
        caplog.at_level(logging.INFO, "fastbert"),
    ):
        assert_close(small(**given), dense(**given), 1e-5 if dtype == torch.float32 else 5e-2)
        assert "one by one" not in caplog.text
        assert fastbert.frozen_bytes(small) > 0
        # a write is seen, also beside parameters without numbers
        small.bert.layers[2].feed_forward.down.bias.data.add_(1.0)
        dense.bert.layers[2].feed_forward.down.bias.data.add_(1.0)
        for _ in range(8):
            found = small(**given)
        assert_close(found, dense(**given), 1e-5 if dtype == torch.float32 else 5e-2)


@pytest.mark.skipif(cpu.native is None, reason=str(cpu.unavailable))
@pytest.mark.parametrize("replace", [False, True])
def test_int8(replace, tmp_path):
    dense, small = pair()
    given = batch()
    with torch.no_grad():
        exact = dense(**given)
        fastbert.quantize(small, replace=replace)
        found = small(**given)
        assert_close(found, exact, 0.1)
        if replace:
            small.save_pretrained(tmp_path / "int8")
            again = bert.BertForSequenceClassification.from_pretrained(tmp_path / "int8")
            assert torch.equal(again(**given).logits, found.logits)
            fastbert.unfreeze(small)
            assert_close(small(**given), found, 1e-3)
            with pytest.raises(ValueError, match="int8, which are not padded"):
                small.save_pretrained(tmp_path / "padded", padded=True)
            assert not (tmp_path / "padded").exists()


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_a_folder_keeps_the_sizes(family, tmp_path):
    _, small = pair(family=family)
    small.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["layer_heads"] == [2, 0, 3, 1]
    assert settings["layer_widths"] == [16, 44, 0, 5]
    again = type(small).from_pretrained(tmp_path)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in small.state_dict().items())
    assert again.config.layer_sizes == small.config.layer_sizes
    lower = type(small).from_pretrained(tmp_path, num_hidden_layers=2)
    assert lower.config.layer_heads == (2, 0)
    assert lower.config.layer_widths == (16, 44)


def test_transformers_refuses_it_and_saving_says_so(tmp_path, caplog):
    _, small = pair()
    from fastbert.nn import watch

    watch._logged.clear()
    with caplog.at_level(logging.INFO, "fastbert"):
        small.save_pretrained(tmp_path)
    assert "transformers has no field for sizes of single layers" in caplog.text
    with pytest.raises(Exception, match="mismatch"):
        transformers.BertForSequenceClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_padded_with_zeros_transformers_loads_it(family, tmp_path):
    dense, small = pair(family=family)
    small.save_pretrained(tmp_path, padded=True)
    assert not {*LAYER_SIZES} & json.loads((tmp_path / "config.json").read_text()).keys()
    assert small.config.layer_heads == (2, 0, 3, 1)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    given = batch()
    if family == "roberta":
        given["input_ids"] = given["input_ids"].masked_fill(given["attention_mask"] == 0, 1)
    with torch.no_grad():
        expected = dense(**given).logits
        torch.testing.assert_close(theirs(**given).logits, expected, rtol=1e-5, atol=1e-5)
        ours = type(small).from_pretrained(tmp_path)
        torch.testing.assert_close(ours(**given).logits, expected, rtol=1e-5, atol=1e-5)


def test_layers_of_one_size_are_plain_hugging_face(tmp_path):
    settings = {**SIZES, "layer_heads": [3, 3], "layer_widths": [20, 20]}
    model = bert.BertModel(BertConfig(**settings))
    assert model.config == BertConfig(**{**SIZES, "intermediate_size": 20})
    model.save_pretrained(tmp_path)
    assert not {*LAYER_SIZES} & json.loads((tmp_path / "config.json").read_text()).keys()
    transformers.BertModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"layer_heads": [3]}, "layer_heads has 1 numbers and num_hidden_layers is 2"),
        ({"layer_heads": [3, 4]}, "use whole numbers from 0 to num_attention_heads 3"),
        ({"layer_heads": [3, -1]}, "use whole numbers from 0 to num_attention_heads 3"),
        ({"layer_heads": [3, 1.0]}, "use whole numbers from 0"),
        ({"layer_heads": [3, True]}, "use whole numbers from 0"),
        ({"layer_widths": [3, 45]}, "use whole numbers from 0 to intermediate_size 44"),
        ({"layer_widths": 3}, "layer_widths is 3: it must be a list"),
        ({"layer_widths": "33"}, "it must be a list"),
    ],
)
def test_bad_sizes_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        BertConfig(**SIZES, **settings)


def test_sizes_of_another_file_are_refused(tmp_path):
    _, small = pair()
    small.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "layer_heads": [2, 1, 3, 1]}))
    with pytest.raises(ValueError, match=r"layer.1.attention.self.query.weight is \(0, 24\)"):
        bert.BertForSequenceClassification.from_pretrained(tmp_path)


def test_a_layer_without_heads_and_columns_is_norms_and_biases():
    layer = EncoderLayer(24, 0, 0, head_size=8).eval()
    x, cu = torch.randn(7, 24), torch.tensor([0, 7], dtype=torch.int32)
    y = torch.nn.functional.layer_norm(x + layer.attention.out.bias, (24,), eps=1e-12)
    y = torch.nn.functional.layer_norm(y + layer.feed_forward.down.bias, (24,), eps=1e-12)
    torch.testing.assert_close(layer(x, cu, 7), y)
    rows = torch.tensor([3, 3, 0])
    torch.testing.assert_close(layer(x, cu, 7, None, 0, rows), y[rows])
    with pytest.raises(ValueError, match="not divisible"):
        EncoderLayer(24, 5, 0)
