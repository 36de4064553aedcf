"""accelerate() with transformers 4 (`make test-transformers4`), and its sentence for versions before 4.48."""

import logging

import pytest
import torch
from hf_models import (
    OLD,
    B,
    S,
    accelerated,
    assert_same,
    batch,
    build,
    without_dropout,
)
from torch import nn

import fastbert
from fastbert.integrations import layers
from fastbert.nn import watch

old = pytest.mark.skipif(not OLD, reason="of transformers 4, see make test-transformers4")
ARCHITECTURES = ("Bert", "Roberta", "DistilBert", "Electra")
KINDS = ("Model", "ForMaskedLM", "ForSequenceClassification")
EAGER, SDPA = ({"attn_implementation": name} for name in ("eager", "sdpa"))


@pytest.fixture
def said(monkeypatch, caplog):
    """The sentences of accelerate(); no earlier test has logged them here."""
    monkeypatch.setattr(watch, "_logged", set())
    caplog.set_level(logging.INFO, logger="fastbert")
    return lambda: " ".join(r.getMessage() for r in caplog.records)


def compare(stock, ours, **given):
    """Assert that both return the same type with the same values at tokens."""
    with torch.no_grad():
        x, y = (m(**given) for m in (stock, ours))
    assert type(x) is type(y)
    if isinstance(x, tuple):
        # hidden states and attentions are tuples inside the tuple
        flat = [[t for v in o for t in (v if isinstance(v, tuple) else (v,))] for o in (x, y)]
        x, y = (dict(enumerate(tensors)) for tensors in flat)
    else:
        x, y = dict(x), dict(y)
        for o in (x, y):
            for i, t in enumerate(o.pop("attentions", None) or ()):
                o[f"attention {i}"] = t
    assert_same(x, y, atol=2e-5)


@pytest.mark.parametrize("version", ["4.47.1", "4.9.0", "3.5.1"])
def test_versions_before_4_48_are_left_alone(version, monkeypatch, said):
    stock = build("Bert")
    # patched by name, since 4.57 replaces its module in sys.modules
    monkeypatch.setattr("transformers.__version__", version)
    model = accelerated(stock)
    assert type(model) is type(stock)
    assert type(model.embeddings.LayerNorm) is fastbert.nn.LayerNorm
    assert f"transformers {version} is older than 4.48" in said()
    compare(stock, model, **batch("Bert"))


@old
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ARCHITECTURES)
@pytest.mark.parametrize(
    ("changes", "word"),
    [
        (EAGER, ""),
        (SDPA, ""),
        ({"output_hidden_states": True}, ""),
        ({"return_dict": False}, ""),
        ({"torchscript": True, "output_hidden_states": True}, ""),
        ({"pruned_heads": {0: [1], 1: [0, 2]}}, ""),
        ({"output_attentions": True, **EAGER}, "output_attentions is set"),
        ({"position_embedding_type": "relative_key"}, "'relative_key' positions"),
    ],
)
def test_configurations(family, kind, changes, word, said):
    """Settings of the configuration that transformers 4 applies in its encoder."""
    if (family, changes) == ("Electra", SDPA):
        pytest.skip("transformers 4 has no sdpa for ELECTRA")
    if family == "DistilBert" and "positions" in word:
        word = ""  # DistilBERT has no other kinds of positions
    stock = build(family, kind, **changes)
    compare(stock, accelerated(stock), **batch(family, kind))
    assert word in said()
    assert bool(word) == ("layer by layer" in said() or "runs transformers' code" in said())


@old
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_arguments(family, kind, said):
    """Arguments that only transformers 4 has, and arguments that its heads pass on as None."""
    stock, given = build(family, kind), batch(family, kind)
    ours = accelerated(stock)
    compare(stock, ours, **given, return_dict=False, output_hidden_states=True)
    assert "transformers' code" not in said()
    compare(stock, ours, **given, head_mask=torch.tensor([1.0, 0.0, 1.0, 1.0]))
    assert "head_mask is not known" in said()


@old
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_heads_pruned_afterwards(family, said):
    stock, given = build(family, "ForMaskedLM"), batch(family, "ForMaskedLM")
    ours = accelerated(stock)
    for m in (stock, ours):
        m.prune_heads({0: [1, 3], 1: [2]})
    compare(stock, ours, **given)
    losses = [without_dropout(m)(**given).loss for m in (stock, ours)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for p, q in zip(stock.parameters(), ours.parameters(), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, atol=1e-5, rtol=1e-4)
    assert "transformers' code" not in said()


@old
@pytest.mark.parametrize("changes", [EAGER, SDPA])
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_one_layer_of_transformers_own(family, changes, said):
    """A layer that runs transformers' code gets its usual mask; the other layers pack their inputs one by one."""
    if (family, changes) == ("Electra", SDPA):
        pytest.skip("transformers 4 has no sdpa for ELECTRA")
    stock = build(family, **changes)
    stack = stock.transformer if family == "DistilBert" else stock.encoder
    stack.layer[0].attention.register_forward_hook(lambda m, i, o: None)
    ours = accelerated(stock)
    compare(stock, ours, **batch(family), output_hidden_states=True)
    compare(stock, ours, **batch(family), return_dict=False)
    assert "layer 0 runs transformers' code: hooks" in said()


@old
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_what_a_head_reads_reaches_the_last_layer(family, monkeypatch):
    seen, run = [], layers.run
    monkeypatch.setattr(layers, "run", lambda *args: seen.append(args[2].rows) or run(*args))
    for kind, rows in (("ForSequenceClassification", B), ("ForMaskedLM", None)):
        model, given = accelerated(build(family, kind)).train(), batch(family, kind)
        model(**given)
        wanted = int((given["labels"] != -100).sum()) if rows is None else rows
        assert seen[-2] is None
        assert seen[-1].shape == (wanted,)


@old
@pytest.mark.parametrize("family", ARCHITECTURES)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_replays(family, reentrant, monkeypatch):
    given, calls, run, found = batch(family, "ForMaskedLM"), [], layers.run, []
    monkeypatch.setattr(layers, "run", lambda *args: calls.append(1) or run(*args))
    for on in (False, True):
        model = accelerated(build(family, "ForMaskedLM")).train()
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(3)
        model(**given).loss.backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(calls) == 2 + 4  # the backward runs every layer once more
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@old
def test_the_rate_of_sdpa_is_its_own():
    """In transformers 4 SDPA has its own dropout rate, which accelerate() follows too."""
    model, given = accelerated(build("Bert", **SDPA)), batch("Bert")
    for m in model.train().modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    assert not torch.equal(model(**given)[0], model(**given)[0])
    for m in model.modules():
        if hasattr(m, "dropout_prob"):
            m.dropout_prob = 0.0
    assert torch.equal(model(**given)[0], model(**given)[0])
    assert model(**given)[0].shape == (B, S, 32)
