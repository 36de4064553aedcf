"""State dicts of int8 models: loaded whole into another int8 model, and never mixed with floating-point weights."""

import pytest
import torch

import fastbert
from fastbert.bert import BertConfig, BertForMaskedLM, BertModel
from fastbert.nn import int8

SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    # wide enough for columns of outliers
    "intermediate_size": 140,
    "max_position_embeddings": 24,
}


def floats(kind=BertModel, outliers=0, seed=3):
    """A model whose first layer has so many columns of outliers."""
    torch.manual_seed(seed)
    model = kind(BertConfig(**SIZES)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    with torch.no_grad():
        model.bert.layers[0].feed_forward.down.weight[:, 3 : 3 + outliers] = 1.2
    return model


def integers(kind=BertModel, embeddings=False, **settings):
    return fastbert.quantize(floats(kind, **settings), replace=True, embeddings=embeddings)


def extra(model):
    return model.bert.layers[0].feed_forward.down.sources.numel()


@torch.no_grad()
def results(model):
    ids = torch.arange(5, 35).view(2, 15)
    return [v for v in model(input_ids=ids).to_tuple() if isinstance(v, torch.Tensor)]


def unchanged(model, load, sentence):
    """`load` raises this sentence, in a line, and changes nothing."""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=sentence) as stop:
        load()
    assert len(str(stop.value)) < 500
    assert "\n" not in str(stop.value)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], before[k]) for k in before)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("kind", [BertModel, BertForMaskedLM])
def test_floating_point_weights_are_not_truncated(kind, strict):
    model, prefix = integers(kind), "" if kind is BertModel else r"bert\."
    unchanged(
        model,
        lambda: model.load_state_dict(floats(kind).state_dict(), strict),
        rf"^{prefix}layers\.0\.attention\.qkv\.weight is torch\.float32 in the state dict and int8 .*replace=True\)$",
    )


@pytest.mark.parametrize("strict", [True, False])
def test_integers_are_no_floating_point_weights(strict):
    model = floats()
    unchanged(
        model,
        lambda: model.load_state_dict(integers().state_dict(), strict),
        r"qkv\.weight is int8 in the state dict and torch\.float32 in the model: call fastbert\.quantize",
    )


def test_parts_of_a_model_and_models_of_users_are_checked_too():
    model, other = integers(embeddings=True), floats().state_dict()
    for path in ("layers.0", "layers.1.feed_forward.up", "embeddings.word"):
        part, start = model.get_submodule(path), f"{path}."
        state = {k.removeprefix(start): v for k, v in other.items() if k.startswith(start)}
        unchanged(part, lambda p=part, s=state: p.load_state_dict(s, strict=False), "and int8 in")
    wrapped = torch.nn.ModuleDict({"model": model})
    state = {f"model.{k}": v for k, v in other.items()}
    unchanged(wrapped, lambda: wrapped.load_state_dict(state, strict=False), r"^model\.\S+ is tor")


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(
    ("here", "there"), [((0, 3), (1, 5)), ((1, 3), (0, 5)), ((1, 3), (1, 5)), ((2, 3), (1, 3))]
)
def test_another_number_of_outliers(here, there, assign, tmp_path):
    model, other = (integers(outliers=n, seed=seed) for n, seed in (here, there))
    assert extra(model) != extra(other)
    results(model)
    found = model.load_state_dict(other.state_dict(), assign=assign)
    assert not found.missing_keys + found.unexpected_keys
    assert extra(model) == extra(other)
    for a, b in zip(results(model), results(other), strict=True):
        assert torch.equal(a, b)
    other.save_pretrained(tmp_path)
    model = BertModel.from_pretrained(tmp_path)
    for a, b in zip(results(model), results(other), strict=True):
        assert torch.equal(a, b)
    model = BertModel(model.config).eval()
    model.load_state_dict(other.state_dict())
    assert torch.equal(results(model)[0], results(other)[0])


DAMAGE = {
    "a scale less": (lambda s, k: s.pop(f"{k}scale"), "the state dict lacks .*down.scale: save"),
    "-128": (lambda s, k: s[f"{k}weight"][1].fill_(-128), "down.weight .* has the integer -128"),
    "a column less": (
        lambda s, k: s.update({f"{k}weight": s[f"{k}weight"][:, 1:]}),
        r"down.weight .* has shape \(24, \d+\) and not \(24, \d+\)",
    ),
    "a column outside": (lambda s, k: s[f"{k}sources"].fill_(140), r"outside \[0, 140\)"),
    "scales of NaN": (lambda s, k: s[f"{k}scale"].fill_(torch.nan), "negative or not finite"),
    "no tensor": (lambda s, k: s.update({f"{k}weight": None}), "is a NoneType and not a tensor"),
    "on meta": (
        lambda s, k: s.update({f"{k}weight": s[f"{k}weight"].to("meta")}),
        "is on the meta device",
    ),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", DAMAGE)
def test_a_state_that_does_not_fit_changes_nothing(name, strict):
    model, state = integers(outliers=2), integers(outliers=1, seed=5).state_dict()
    change, sentence = DAMAGE[name]
    change(state, "layers.0.feed_forward.down.")
    unchanged(model, lambda: model.load_state_dict(state, strict), sentence)


def test_a_state_without_a_layer_leaves_it_as_it_is():
    model, state = integers(), integers(seed=5).state_dict()
    state = {k: v for k, v in state.items() if not k.startswith("layers.1.")}
    before = model.layers[1].attention.out.weight.clone()
    assert model.load_state_dict(state, strict=False).missing_keys
    assert torch.equal(model.layers[1].attention.out.rows(), before)
    with pytest.raises(RuntimeError, match=r"it lacks .*layers\.1\.\S+, .* and \d+ more") as stop:
        model.load_state_dict(state)
    assert len(str(stop.value)) < 500


@pytest.mark.parametrize("make", [floats, integers])
def test_messages_of_load_state_dict_are_short(make):
    model = make()
    state = {f"bert.{k}": v for k, v in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"it lacks .*; the model lacks .*\. Load") as stop:
        model.load_state_dict(state)
    assert len(str(stop.value)) < 500
    wide = BertModel(BertConfig(**SIZES | {"hidden_size": 48, "intermediate_size": 70}))
    with pytest.raises(
        RuntimeError, match=r"size mismatch(.|\n)*and \d+ more|has shape|is torch"
    ) as stop:
        model.load_state_dict(wide.state_dict())
    assert len(str(stop.value).splitlines()) < 6


def test_the_lowest_integer_is_refused_by_a_module():
    m = int8.Int8Linear(4, 3)
    state = {k: v.clone() for k, v in m.state_dict().items()}
    state["weight"][0, 0] = -128
    with pytest.raises(RuntimeError, match="has the integer -128"):
        m.load_state_dict(state)
