"""Outputs at masked positions: zeros, or the original class's where they may be used."""

import copy
import logging

import pytest
import torch
from hf_models import FAMILIES, MASK, B, S, V, accelerated, batch, build, without_dropout
from torch import nn

import fastbert
from fastbert.integrations.accelerate import is_accelerated
from fastbert.nn import watch


def expanded(family):
    """A batch whose masked positions hold an id that is not padding's, as ColBERT's queries do."""
    ids = batch(family)["input_ids"]
    return {"input_ids": ids.where(MASK.bool(), V - 1), "attention_mask": MASK}


@pytest.fixture
def log(caplog, monkeypatch):
    monkeypatch.setattr(watch, "_logged", set())
    caplog.set_level(logging.INFO, logger="fastbert")
    return caplog


@pytest.mark.parametrize("family", FAMILIES)
def test_other_ids_than_paddings_are_computed(family, log):
    model, given = build(family), expanded(family)
    ours = accelerated(model)
    with torch.no_grad():
        x = model(**given, output_hidden_states=True)
        y = ours(**given, output_hidden_states=True)
    torch.testing.assert_close(x[0], y[0], atol=1e-5, rtol=1e-5)
    for a, b in zip(x.hidden_states, y.hidden_states, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    warned = [r.getMessage() for r in log.records if r.levelno == logging.WARNING]
    assert len(warned) == 1
    assert 'at_padding="zeros"' in warned[0]
    assert "config.pad_token_id" in warned[0]


def test_gradients_of_masked_positions():
    model, given = without_dropout(build("Bert")), expanded("Bert")
    ours = accelerated(model)
    for m in (model, ours):
        m(**given).last_hidden_state.square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), ours.parameters(), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, atol=2e-4, rtol=1e-4, msg=name)


def test_padding_stays_zero_and_unread(log):
    ours, given = accelerated(build("Bert")), batch("Bert")
    with torch.no_grad():
        y = ours(**given).last_hidden_state
    assert not y[~MASK.bool()].any()
    assert not [r for r in log.records if "masked positions" in r.getMessage()]


def test_the_argument_decides():
    model, given = build("Bert"), expanded("Bert")
    padding = ~MASK.bool()
    with torch.no_grad():
        ours = fastbert.accelerate(copy.deepcopy(model), at_padding="zeros")
        assert not ours(**given).last_hidden_state[padding].any()
        # a second call changes the choice, without changing a class
        fastbert.accelerate(ours, at_padding="stock")
        for batch_ in (given, batch("Bert")):
            torch.testing.assert_close(ours(**batch_)[0], model(**batch_)[0], atol=1e-5, rtol=1e-5)
        fastbert.accelerate(ours, at_padding="auto")
        assert not ours(**batch("Bert"))[0][padding].any()
    restored = fastbert.restore(ours)
    assert not [n for m in restored.modules() for n in vars(m) if "fastbert" in n]


def test_another_value_is_refused_before_any_change():
    model = build("Bert")
    with pytest.raises(ValueError, match="at_padding is 'zero': pass one of auto, zeros, stock"):
        fastbert.accelerate(model, at_padding="zero")
    assert not is_accelerated(model)


def test_a_frozen_model_computes_them_too():
    model, given = build("Bert"), expanded("Bert")
    frozen = fastbert.freeze(accelerated(model))
    with torch.no_grad():
        torch.testing.assert_close(frozen(**given)[0], model(**given)[0], atol=1e-5, rtol=1e-5)


# --- torch.nn ---


def pair():
    torch.manual_seed(0)
    stock = nn.Transformer(16, 2, 2, 2, 32, dropout=0.0, batch_first=True)
    return stock, fastbert.accelerate(copy.deepcopy(stock))


SRC, TGT = torch.randn(B, S, 16), torch.randn(B, 4, 16)
PADDING = MASK == 0
HOLES = PADDING | (torch.arange(S) == 1)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "padding", [PADDING, PADDING.flip(1), HOLES], ids=["right", "left", "holes"]
)
@pytest.mark.parametrize("hidden", [False, True], ids=["seen", "hidden"])
@pytest.mark.parametrize("fast", [True, False], ids=["fast path", "no fast path"])
def test_a_decoder_sees_what_it_sees_in_torch(training, padding, hidden, fast):
    stock, ours = (m.train(training) for m in pair())
    given = {"src_key_padding_mask": padding}
    if hidden:
        given["memory_key_padding_mask"] = padding.clone()
    masked = given | {"src_mask": nn.Transformer.generate_square_subsequent_mask(S).isinf()}
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast)
    try:
        # the first of every other position's keys is a token where the mask is causal
        for options in (given, masked) if padding is PADDING else (given,):
            for recorded in (True, False):
                with torch.set_grad_enabled(recorded):
                    x, y = stock(SRC, TGT, **options), ours(SRC, TGT, **options)
                torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def test_a_decoder_that_is_called_by_hand():
    stock, ours = pair()
    found = [m.decoder(TGT, m.encoder(SRC, src_key_padding_mask=PADDING)) for m in (stock, ours)]
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)
    zeros = fastbert.accelerate(ours, at_padding="zeros")
    assert not zeros.encoder.layers[0](SRC, src_key_padding_mask=PADDING)[PADDING].any()


def test_another_call_keeps_the_choice():
    model, given = build("Bert"), batch("Bert")
    ours = fastbert.accelerate(copy.deepcopy(model), at_padding="stock")
    ours.encoder.layer[1] = copy.deepcopy(model.encoder.layer[1])
    fastbert.accelerate(ours)
    with torch.no_grad():
        torch.testing.assert_close(ours(**given)[0], model(**given)[0], atol=1e-5, rtol=1e-5)


def test_answers_at_padding():
    model = build("Bert", "ForQuestionAnswering")
    ours = fastbert.accelerate(copy.deepcopy(model), at_padding="stock")
    given = batch("Bert", "ForQuestionAnswering")
    with torch.no_grad():
        x, y = model(**given), ours(**given)
    torch.testing.assert_close(x.start_logits, y.start_logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x.loss, y.loss)


def test_hooks_in_the_encoder_change_no_value():
    stock, ours = pair()
    for m in (stock, ours):
        m.encoder.layers[1].register_forward_hook(lambda m, args, y: None)
    given = {"src_key_padding_mask": PADDING}
    torch.testing.assert_close(
        stock(SRC, TGT, **given), ours(SRC, TGT, **given), atol=1e-5, rtol=1e-5
    )


def test_an_encoder_of_torch_with_at_padding_stock():
    torch.manual_seed(0)
    stock = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2
    )
    ours = fastbert.accelerate(copy.deepcopy(stock), at_padding="stock")
    for m in (stock, ours):
        m.train()
    x, y = (m(SRC, src_key_padding_mask=PADDING) for m in (stock, ours))
    torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)
    assert y[PADDING].any()
    x, y = (m.layers[0](SRC, src_key_padding_mask=PADDING) for m in (stock, ours))
    torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)
