"""output_attentions of accelerated models: the kernels run, and the weights are transformers' own."""

import modern_models
import pytest
import torch
from hf_models import FAMILIES, MASK, OLD, accelerated, batch, build

import fastbert
from fastbert.nn import watch

pytestmark = pytest.mark.skipif(OLD, reason="written for transformers 5")
EAGER = {"attn_implementation": "eager"}


@pytest.fixture
def said(monkeypatch, caplog):
    monkeypatch.setattr(watch, "_logged", set())
    caplog.set_level("INFO", logger="fastbert")
    return lambda: [m for r in caplog.records if "transformers' code" in (m := r.getMessage())]


def compare(stock, given, mask, said, **options):
    """Both models' outputs; the weights agree at tokens, and are zeros at padding."""
    with torch.no_grad():
        theirs, ours = (
            m(**given, output_attentions=True, **options) for m in (stock, accelerated(stock))
        )
    assert not said()
    assert list(ours.keys()) == list(theirs.keys())
    assert len(ours.attentions) == len(theirs.attentions) > 0
    token = mask.bool()[:, None, :, None] & mask.bool()[:, None, None, :]
    for x, y in zip(ours.attentions, theirs.attentions, strict=True):
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        torch.testing.assert_close(x, y * token, atol=2e-6, rtol=1e-4)
    return ours, theirs


@pytest.mark.parametrize("head", ["Model", "ForMaskedLM", "ForSequenceClassification"])
@pytest.mark.parametrize("family", FAMILIES)
def test_of_bert_and_its_kin(family, head, said):
    ours, theirs = compare(build(family, head, **EAGER), batch(family), MASK, said)
    # the model's other outputs are those of its packed path
    assert torch.isfinite(ours[0]).all()
    assert ours[0].shape == theirs[0].shape


DEBERTA = [family for family in modern_models.FAMILIES if "Deberta" in family]


@pytest.mark.parametrize("family", [f for f in modern_models.FAMILIES if f not in DEBERTA])
def test_of_newer_families(family, said):
    stock = modern_models.build(family, **EAGER)
    compare(stock, modern_models.batch(stock), modern_models.MASK, said)


@pytest.mark.parametrize("family", DEBERTA)
def test_of_deberta_transformers_own_code_runs(family, said):
    stock = modern_models.build(family)
    with torch.no_grad():
        maps = accelerated(stock)(**modern_models.batch(stock), output_attentions=True).attentions
    assert len(maps) == 3
    assert "terms of positions" in said()[0]


def test_with_hidden_states_as_a_tuple_and_from_the_configuration(said):
    stock, given = build("Bert", **EAGER), batch("Bert")
    ours, theirs = compare(stock, given, MASK, said, output_hidden_states=True)
    assert len(ours.hidden_states) == len(theirs.hidden_states)
    model = accelerated(stock)
    model.config.output_attentions = True
    with torch.no_grad():
        last, _, maps, *_ = model(**given, return_dict=False)
    torch.testing.assert_close(maps, ours.attentions)
    torch.testing.assert_close(last, ours.last_hidden_state)


def test_sdpa_which_shows_none_in_transformers_has_them_too(said):
    stock, given = build("Bert", **EAGER), batch("Bert")
    ours, _ = compare(stock, given, MASK, said)
    model = accelerated(stock)
    model.config._attn_implementation = "sdpa"
    with torch.no_grad():
        torch.testing.assert_close(
            model(**given, output_attentions=True).attentions, ours.attentions
        )


def test_a_frozen_model_shows_them():
    stock, given = build("Bert", **EAGER), batch("Bert")
    model = fastbert.freeze(accelerated(stock))
    with torch.no_grad():
        maps = model(**given, output_attentions=True).attentions
        assert model(**given).get("attentions") is None
    torch.testing.assert_close(
        maps[1].sum(-1), MASK[:, None, :].expand(-1, 4, -1).float(), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("case", ["gradient", "training", "hook", "padding"])
def test_where_the_weights_must_be_transformers_own(case, said):
    stock, given = build("Bert", **EAGER), batch("Bert")
    model = accelerated(stock)
    if case == "hook":
        model.encoder.layer[0].register_forward_hook(lambda *_: None)
    if case == "padding":
        model = fastbert.accelerate(model, at_padding="stock")
    model.train(case == "training")
    with torch.set_grad_enabled(case == "gradient"):
        maps = model(**given, output_attentions=True).attentions
    assert len(maps) == 2
    assert maps[0].requires_grad == (case == "gradient")
    assert "output_attentions is set, and" in said()[0]
