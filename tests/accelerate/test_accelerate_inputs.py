"""Bad and odd inputs give the results of transformers and torch.nn, or those that docs/accelerate.md names."""

import copy

import pytest
import torch
from hf_models import (
    MASK,
    OLD,
    B,
    S,
    V,
    accelerated,
    at_tokens,
    batch,
    build,
)
from torch import nn

import fastbert

IDS = batch("Bert")["input_ids"]
MODELS = {family: build(family) for family in ("Bert", "Roberta", "DistilBert")}
OURS = {family: accelerated(model) for family, model in MODELS.items()}

LEFT = MASK.flip(1)
HOLES = MASK * torch.tensor([1, 1, 0, 1, 0, 1, 1, 1, 1, 0, 1])
FOUR_D = MASK.bool()[:, None, None, :].expand(B, 1, S, S)
CAUSAL = FOUR_D & torch.ones(S, S, dtype=torch.bool).tril()
EMPTY_ROW = MASK * torch.tensor([1, 1, 0, 1, 1])[:, None]
EMBEDS = torch.randn(B, S, 32, generator=torch.Generator().manual_seed(0))

# name: (arguments, mask of the outputs that are compared)
ODD = {
    "no mask": ({"input_ids": IDS}, None),
    "ones": ({"input_ids": IDS, "attention_mask": torch.ones_like(MASK)}, None),
    "int64 mask": ({"input_ids": IDS, "attention_mask": MASK}, MASK),
    "int32 mask": ({"input_ids": IDS, "attention_mask": MASK.int()}, MASK),
    "bool mask": ({"input_ids": IDS, "attention_mask": MASK.bool()}, MASK),
    "uint8 mask": ({"input_ids": IDS, "attention_mask": MASK.to(torch.uint8)}, MASK),
    "float mask": ({"input_ids": IDS, "attention_mask": MASK.float()}, MASK),
    "half mask": ({"input_ids": IDS, "attention_mask": MASK.half()}, MASK),
    "mask of twos": ({"input_ids": IDS, "attention_mask": 2 * MASK}, MASK),
    "mask of fractions": ({"input_ids": IDS, "attention_mask": 0.3 * MASK}, MASK),
    "additive float mask": (
        {"input_ids": IDS, "attention_mask": torch.where(MASK.bool(), 0.0, -1e4)},
        1 - MASK * 0,
    ),
    "4-D bool mask": ({"input_ids": IDS, "attention_mask": FOUR_D}, MASK),
    "4-D causal mask": ({"input_ids": IDS, "attention_mask": CAUSAL}, MASK),
    "4-D additive mask": (
        {"input_ids": IDS, "attention_mask": torch.where(CAUSAL, 0.0, -1e9)},
        MASK,
    ),
    "left padding": ({"input_ids": IDS.flip(1), "attention_mask": LEFT}, None),
    "holes": ({"input_ids": IDS, "attention_mask": HOLES}, HOLES),
    "a fully padded row": ({"input_ids": IDS, "attention_mask": EMPTY_ROW}, EMPTY_ROW),
    "one token": ({"input_ids": IDS[:, :1]}, None),
    "one row": ({"input_ids": IDS[:1]}, None),
    "one row of one token": ({"input_ids": IDS[:1, :1], "attention_mask": MASK[:1, :1]}, None),
    "lengths of one": (
        {"input_ids": IDS, "attention_mask": (torch.arange(S) < 1).long().repeat(B, 1)},
        (torch.arange(S) < 1).long().repeat(B, 1),
    ),
    "non-contiguous ids": ({"input_ids": IDS.t().contiguous().t(), "attention_mask": MASK}, MASK),
    "non-contiguous mask": ({"input_ids": IDS, "attention_mask": MASK.t().contiguous().t()}, MASK),
    "expanded ids": ({"input_ids": IDS[:1].expand(B, S), "attention_mask": MASK}, MASK),
    "strided ids": (
        {"input_ids": IDS.repeat_interleave(2, 1)[:, ::2], "attention_mask": MASK},
        MASK,
    ),
    "int32 ids": ({"input_ids": IDS.int(), "attention_mask": MASK}, MASK),
    "embeddings": ({"inputs_embeds": EMBEDS, "attention_mask": MASK}, MASK),
    "non-contiguous embeddings": (
        {"inputs_embeds": EMBEDS.transpose(0, 1).contiguous().transpose(0, 1)},
        None,
    ),
    "positions": (
        {
            "input_ids": IDS,
            "attention_mask": MASK,
            "position_ids": torch.arange(S).flip(0).expand(B, S),
        },
        MASK,
    ),
    "one row of positions": (
        {"input_ids": IDS, "attention_mask": MASK, "position_ids": torch.arange(3, S + 3)[None]},
        MASK,
    ),
    "ids of padding inside": (
        {"input_ids": IDS * (torch.arange(S) != 2), "attention_mask": MASK},
        MASK,
    ),
}


def outputs(model, given):
    """All of a model's outputs."""
    with torch.no_grad():
        return model(**given, output_hidden_states=True)


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("family", MODELS)
def test_odd_inputs(family, name):
    given, mask = ODD[name]
    if name == "a fully padded row":
        # with another id than padding's these positions would be computed
        padding = MODELS[family].config.pad_token_id
        given = given | {"input_ids": IDS.where(mask.bool(), padding)}
    try:
        x = outputs(MODELS[family], given)
    except (TypeError, ValueError) as error:
        assert OLD  # transformers 4 takes neither 4-D masks nor DistilBERT's positions
        with pytest.raises(type(error)):
            outputs(OURS[family], given)
        return
    y = outputs(OURS[family], given)
    for a, b in zip((*x.hidden_states, x[0]), (*y.hidden_states, y[0]), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        if mask is not None:
            a, b = at_tokens(a, mask), at_tokens(b, mask)
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    if name == "a fully padded row":
        assert not y[0][2].any()
        if "pooler_output" in x:
            rows = [0, 1, 3, 4]
            torch.testing.assert_close(x.pooler_output[rows], y.pooler_output[rows])
    elif "pooler_output" in x:
        torch.testing.assert_close(x.pooler_output, y.pooler_output, atol=1e-5, rtol=1e-5)


def test_nothing_but_padding():
    y = OURS["Bert"](input_ids=0 * IDS, attention_mask=0 * MASK)
    assert not y.last_hidden_state.any()
    assert y.pooler_output.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    stock = copy.deepcopy(MODELS["Bert"]).to(dtype)
    x, y = (
        outputs(m, {"input_ids": IDS, "attention_mask": MASK}) for m in (stock, accelerated(stock))
    )
    exact = outputs(MODELS["Bert"], {"input_ids": IDS, "attention_mask": MASK}).last_hidden_state
    x, y, exact = (at_tokens(t) for t in (x.last_hidden_state, y.last_hidden_state, exact))
    assert x.dtype == y.dtype
    assert (y - exact).abs().max() <= 2 * (x - exact).abs().max() + 1e-5


# wrong inputs, which stock and accelerated models refuse
BAD = {
    "ids out of range": {"input_ids": IDS + V},
    "negative ids": {"input_ids": -IDS - 1},
    "float ids": {"input_ids": IDS.float()},
    "bool ids": {"input_ids": IDS.bool()},
    "no batch": {"input_ids": IDS[0]},
    "both inputs": {"input_ids": IDS, "inputs_embeds": EMBEDS},
    "no input": {"attention_mask": MASK},
    "too long": {"input_ids": torch.ones(2, 600, dtype=torch.long)},
    "too long with positions": {"input_ids": IDS, "position_ids": torch.full((B, S), 600)},
    "short mask": {"input_ids": IDS, "attention_mask": MASK[:, :4]},
    "mask of another batch": {"input_ids": IDS, "attention_mask": MASK[:3]},
    "embeddings of another width": {"inputs_embeds": EMBEDS[..., :7]},
    "types out of range": {"input_ids": IDS, "token_type_ids": torch.full_like(IDS, 7)},
    "types of another shape": {"input_ids": IDS, "token_type_ids": torch.zeros_like(IDS[:, :3])},
    "positions of another shape": {"input_ids": IDS, "position_ids": torch.arange(4)[None]},
    "an unknown type": {"input_ids": "the cat"},
}


@pytest.mark.parametrize("name", BAD)
def test_bad_inputs_are_refused_as_by_transformers(name):
    for model in (MODELS["Bert"], OURS["Bert"]):
        with pytest.raises(
            (ValueError, RuntimeError, IndexError, TypeError, AttributeError)
        ) as error:
            outputs(model, BAD[name])
        assert str(error.value)


def test_too_long_is_a_sentence():
    with pytest.raises(ValueError, match="600 tokens long but the model has 512 positions"):
        OURS["Bert"](input_ids=torch.ones(2, 600, dtype=torch.long))


@pytest.mark.parametrize("shape", [(0, S), (B, 0), (0, 0)])
def test_empty_batches(shape):
    given = {"input_ids": IDS.new_zeros(shape), "attention_mask": IDS.new_ones(shape)}
    found = []
    for model in (MODELS["Bert"], OURS["Bert"]):
        try:
            found.append(tuple(outputs(model, given).last_hidden_state.shape))
        except (ValueError, RuntimeError, IndexError) as error:
            found.append(type(error))
    assert found[0] == found[1]


# --- labels ---


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("head", ["ForMaskedLM", "ForTokenClassification"])
@pytest.mark.parametrize("kind", ["at padding", "none", "all tokens", "out of range", "short"])
def test_odd_labels(head, training, kind):
    labels = IDS % 3
    labels = {
        "at padding": labels,
        "none": torch.full_like(labels, -100),
        "all tokens": labels.where(MASK.bool(), -100),
        "out of range": torch.full_like(labels, V),
        "short": labels[:, :3].contiguous(),
    }[kind]
    given, found = {"input_ids": IDS, "attention_mask": MASK, "labels": labels}, []
    stock = build("Bert", head, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    for model in (stock, accelerated(stock)):
        try:
            found.append(model.train(training)(**given).loss)
        except (ValueError, IndexError) as error:
            found.append(error)
    x, y = found
    if isinstance(x, Exception):
        assert type(x) is type(y)
    elif kind == "none" and training and head == "ForMaskedLM":
        # transformers' loss is NaN; ours is 0 and has a gradient
        assert x.isnan()
        assert y == 0
        assert y.requires_grad
    else:
        torch.testing.assert_close(x, y, equal_nan=True)


@pytest.mark.parametrize("where", ["inside", "at padding", "beyond", "negative", "a column"])
def test_answers_anywhere(where):
    position = {
        "inside": torch.zeros(B, dtype=torch.long),
        "at padding": torch.full((B,), S - 1),
        "beyond": torch.full((B,), S + 7),
        "negative": torch.full((B,), -1),
        "a column": torch.zeros(B, 1, dtype=torch.long),
    }[where]
    model = accelerated(build("Bert", "ForQuestionAnswering"))
    given = {
        "input_ids": IDS,
        "attention_mask": MASK,
        "start_positions": position,
        "end_positions": position,
    }
    loss = model(**given).loss
    assert loss.isnan() if where == "beyond" else loss < 1e4


# --- torch.nn's layers ---

X = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(0))
PAD = torch.arange(7) >= torch.tensor([7, 3, 5])[:, None]
TRIANGLE = nn.Transformer.generate_square_subsequent_mask(7)
LABELS = torch.tensor([0, 1, 2, 3, 4, 0])
LOGITS = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))


def _encoder():
    layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True, activation="gelu")
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


TORCH = {
    "encoder": (_encoder, (X,), {}),
    "encoder, padding": (_encoder, (X,), {"src_key_padding_mask": PAD}),
    "encoder, causal": (_encoder, (X, TRIANGLE), {"is_causal": True}),
    "encoder, any mask": (_encoder, (X, torch.eye(7).bool().roll(1, 0)), {}),
    "encoder, empty": (_encoder, (X[:0],), {}),
    "encoder, one sequence": (_encoder, (X[0],), {}),
    "encoder, strided": (_encoder, (X.transpose(0, 1).contiguous().transpose(0, 1),), {}),
    "attention": (lambda: nn.MultiheadAttention(32, 4, batch_first=True), (X, X, X), {}),
    "attention without weights": (
        lambda: nn.MultiheadAttention(32, 4, batch_first=True),
        (X, X, X),
        {"need_weights": False},
    ),
    "cross-attention": (
        lambda: nn.MultiheadAttention(32, 4, batch_first=True),
        (X, X[:, :5], X[:, :5]),
        {"need_weights": False},
    ),
    "encoder and decoder": (
        lambda: nn.Transformer(32, 4, 1, 1, 64, 0.0, batch_first=True),
        (X, X[:, :5]),
        {},
    ),
    "norm of a vector": (lambda: nn.LayerNorm(32), (X[0, 0],), {}),
    "norm of nothing": (lambda: nn.LayerNorm(32), (X[:0],), {}),
    "norm of columns": (lambda: nn.LayerNorm(7), (X.transpose(1, 2),), {}),
    "norm of two dimensions": (lambda: nn.LayerNorm((7, 32)), (X,), {}),
    "bare norm": (lambda: nn.LayerNorm(32, elementwise_affine=False), (X,), {}),
    "rms norm": (lambda: nn.RMSNorm(32), (X,), {}),
    "rms norm of two dimensions": (lambda: nn.RMSNorm((7, 32), 1e-3, False), (X,), {}),
    "gelu of a number": (nn.GELU, (torch.tensor(0.5),), {}),
    "gelu of nothing": (nn.GELU, (X[..., :0],), {}),
    "gelu, tanh": (lambda: nn.GELU("tanh"), (X.transpose(0, 2),), {}),
    "loss": (nn.CrossEntropyLoss, (LOGITS, LABELS), {}),
    "loss without labels": (nn.CrossEntropyLoss, (LOGITS, LABELS * 0 - 100), {}),
    "loss of nothing": (nn.CrossEntropyLoss, (LOGITS[:0], LABELS[:0]), {}),
    "loss of one row": (nn.CrossEntropyLoss, (LOGITS[0], LABELS[0]), {}),
    "loss of images": (nn.CrossEntropyLoss, (LOGITS.view(2, 5, 3), LABELS.view(2, 3)), {}),
    "loss of probabilities": (nn.CrossEntropyLoss, (LOGITS, LOGITS.softmax(-1)), {}),
    "weighted loss": (lambda: nn.CrossEntropyLoss(torch.arange(1.0, 6)), (LOGITS, LABELS), {}),
    "smoothed loss": (lambda: nn.CrossEntropyLoss(label_smoothing=0.1), (LOGITS, LABELS), {}),
}


@pytest.mark.parametrize("name", TORCH)
def test_torch_layers(name):
    make, args, kwargs = TORCH[name]
    stock = make()
    ours = accelerated(stock)
    assert type(ours) is not type(stock) or name == "encoder and decoder"
    assert list(ours.state_dict()) == list(stock.state_dict())
    x, y = stock(*args, **kwargs), ours(*args, **kwargs)
    if isinstance(x, tuple):
        assert (x[1] is None) == (y[1] is None)
        x, y = x[0], y[0]
    if "src_key_padding_mask" in kwargs:
        x, y = x[~PAD], y[~PAD]
    torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5, equal_nan=True)
    assert type(fastbert.restore(ours)) is type(stock)


def test_torch_func_runs_torch_code():
    norm = fastbert.accelerate(nn.LayerNorm(32))
    gradient = torch.func.grad(lambda x: norm(x).pow(3).sum())(X)
    x = X.clone().requires_grad_()
    norm(x).pow(3).sum().backward()
    torch.testing.assert_close(gradient, x.grad, atol=1e-4, rtol=1e-4)


def test_what_accelerate_and_restore_refuse(caplog):
    for function in (fastbert.accelerate, fastbert.restore, fastbert.validate):
        with pytest.raises(TypeError, match="pass a torch"):
            function({"a": 1}, *(({},) if function is fastbert.validate else ()))
    linear = nn.Linear(2, 2)
    assert fastbert.accelerate(linear) is linear
    assert "holds no layer that fastbert knows" in caplog.text
    norm = fastbert.accelerate(nn.Sequential(nn.LayerNorm(4)))
    nn.utils.parametrize.register_parametrization(norm[0], "weight", nn.Identity())
    with pytest.raises(ValueError, match="became a ParametrizedLayerNorm"):
        fastbert.restore(norm)
