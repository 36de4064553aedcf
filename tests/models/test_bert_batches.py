"""The models against themselves: packed, single, checkpointed, compiled, under autocast, without labels."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from pairs import CASES, batch, build, close, per_token, scalar_loss
from torch import Tensor, nn

from fastbert.bert import BertConfig, BertForSequenceClassification

# --- padded, packed, one by one ---


def pack(inputs: dict[str, Any]) -> dict[str, Any]:
    """The packed form of a padded batch, as a collator makes it."""
    mask = inputs["attention_mask"] == 1
    lengths = mask.sum(1)
    packed = {
        k: v[mask] if per_token(v, mask) else v for k, v in inputs.items() if k != "attention_mask"
    }
    packed["cu_seqlens"] = nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    packed["max_seqlen"] = int(lengths.max())
    if "labels" in packed and per_token(inputs["labels"], mask) and packed["labels"].max() > 2:
        packed["label_rows"] = (packed["labels"] != -100).nonzero()[:, 0]
    return packed


@pytest.mark.parametrize(("family", "name"), CASES)
def test_packed_is_padded(family: str, name: str) -> None:
    """A batch packed by the caller has the same outputs, in packed form, and the same gradients."""
    model, other = build(family, name)[0].eval(), build(family, name)[0].eval()
    inputs = batch(family, name)
    mask = inputs["attention_mask"]
    a = model(**inputs, output_hidden_states=True, output_attentions=True)
    b = other(**pack(inputs), output_hidden_states=True, output_attentions=True)
    assert a.keys() == b.keys()
    for key in set(a.keys()) - {"hidden_states", "attentions"}:
        close(b[key], a[key][mask == 1] if per_token(a[key], mask) else a[key], key)
    for x, y in zip(a.hidden_states, b.hidden_states, strict=True):
        close(y, x[mask == 1], "hidden_states")
    for x, y in zip(a.attentions, b.attentions, strict=True):
        close(y, x, "attentions")
    scalar_loss(a, mask).backward()
    loss = b.loss
    if loss is None:
        loss = b.last_hidden_state.square().sum()
        loss = loss + (0.0 if b.pooler_output is None else b.pooler_output.sum())
    loss.backward()
    shifts = {"classifier.bias", "bert.layers.1.output_norm.bias"}
    for (key, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        if p.grad is not None and not (name == "ForQuestionAnswering" and key in shifts):
            close(q.grad, p.grad, f"gradient of {key}")


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_batch_is_single(family: str) -> None:
    model = build(family, "Model")[0].eval()
    inputs = batch(family, "Model")
    whole = model(**inputs).last_hidden_state
    for b, length in enumerate((11, 7, 1)):
        one = {k: v[b : b + 1, :length] for k, v in inputs.items() if k != "attention_mask"}
        close(whole[b : b + 1, :length], model(**one).last_hidden_state, f"row {b}")


def test_tail_of_a_bucket_changes_nothing() -> None:
    """Rows after cu_seqlens[-1], as in a bucket of fixed size, do not change the outputs at tokens."""
    model = build("bert", "ForMaskedLM")[0].eval()
    packed = pack(batch("bert", "ForMaskedLM"))
    longer = dict(packed)
    # ids and labels in the tail are not read, and its outputs are 0
    for key, fill in {"input_ids": 10**6, "token_type_ids": 9, "labels": 3}.items():
        longer[key] = nn.functional.pad(packed[key], (0, 13), value=fill)
    a, b = model(**packed), model(**longer, output_attentions=True)
    close(b.loss, a.loss, "loss")
    close(b.logits[:19], a.logits, "logits")
    assert b.logits.shape[0] == 32
    assert b.logits[19:].eq(0).all()


def test_all_padding_row_gives_zeros() -> None:
    model = build("bert", "ForPreTraining")[0].train()
    inputs = batch("bert", "ForPreTraining")
    inputs["attention_mask"][1] = 0
    inputs["labels"][1] = -100
    out = model(**inputs, output_hidden_states=True, output_attentions=True, return_logits=True)
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    for x in (*out.hidden_states, *out.attentions, out.prediction_logits):
        assert x[1].eq(0).all()
    nothing = build("bert", "Model")[0]
    assert nothing(inputs["input_ids"], torch.zeros(3, 11)).last_hidden_state.eq(0).all()


# --- losses ---


def test_loss_is_zero_and_connected_without_labels() -> None:
    for name in ("ForMaskedLM", "ForTokenClassification"):
        model = build("bert", name)[0].train()
        inputs = batch("bert", name) | {"labels": torch.full((3, 11), -100)}
        loss = model(**inputs).loss
        loss.backward()
        assert loss.item() == 0.0
        assert all(p.grad is None or p.grad.eq(0).all() for p in model.parameters())
        assert model.bert.embeddings.word.weight.grad is not None


def test_prediction_logits_in_training_only_on_request() -> None:
    model = build("bert", "ForPreTraining")[0].train()
    inputs = batch("bert", "ForPreTraining")
    assert model(**inputs).prediction_logits is None
    assert model(**inputs, return_logits=True).prediction_logits.shape == (3, 11, 61)
    assert model.eval()(**inputs).prediction_logits.shape == (3, 11, 61)
    assert model(**inputs, return_logits=False).prediction_logits is None
    out = model(**inputs)
    assert out.loss == out.mlm_loss + out.nsp_loss
    alone = model(**{k: v for k, v in inputs.items() if k != "next_sentence_label"})
    assert alone.nsp_loss is None
    assert alone.loss == out.mlm_loss


def test_num_items_in_batch_makes_accumulation_exact() -> None:
    """Two micro-batches with unequal numbers of labels add up to the loss of the whole batch."""
    model = build("bert", "ForMaskedLM")[0].eval()
    inputs = batch("bert", "ForMaskedLM")
    items = (inputs["labels"] != -100).sum()
    parts = [{k: v[rows] for k, v in inputs.items()} for rows in (slice(0, 1), slice(1, 3))]
    total = sum(model(**part, num_items_in_batch=items).loss for part in parts)
    close(total, model(**inputs).loss, "loss")


# --- dropout, gradient checkpointing ---


def gradients(model: nn.Module, inputs: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    model.zero_grad()
    model(**inputs).loss.backward()
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_gradient_checkpointing_replays_dropout(family: str) -> None:
    """Gradients are bitwise those without it, with dropout on; another seed gives others."""
    model = build(family, "ForTokenClassification")[0].train()
    inputs = batch(family, "ForTokenClassification")
    plain, again = gradients(model, inputs), gradients(model, inputs)
    model.gradient_checkpointing_enable()
    less, other = gradients(model, inputs), gradients(model, inputs, seed=1)
    model.gradient_checkpointing_disable()
    assert plain.keys() == less.keys()
    assert all(torch.equal(plain[k], again[k]) for k in plain), "two runs differ"
    assert all(torch.equal(plain[k], less[k]) for k in plain), "checkpointing changes gradients"
    assert not torch.equal(plain["classifier.weight"], other["classifier.weight"])
    assert not model.bert.gradient_checkpointing


def test_no_random_number_is_drawn_where_nothing_is_dropped() -> None:
    config = BertConfig(
        vocab_size=99,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=40,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    expected = torch.rand(4, generator=torch.Generator().manual_seed(7))
    model, ids = BertForSequenceClassification(config).train(), torch.randint(5, 99, (2, 7))
    torch.manual_seed(7)
    model(ids)
    assert torch.equal(torch.rand(4), expected)
    # a dropout of one layer, or of the head alone, draws a seed
    model.bert.layers[1].p = 0.5
    for _ in range(2):
        torch.manual_seed(7)
        first = model(ids).logits
        assert not torch.equal(torch.rand(4), expected)
        assert not torch.equal(model(ids).logits, first)
        model.bert.layers[1].p = 0.0
        model.config = dataclasses.replace(config, classifier_dropout=0.5)


def test_dropout_is_off_in_eval_and_at_zero() -> None:
    inputs = batch("bert", "ForSequenceClassification")
    model = build("bert", "ForSequenceClassification")[0]
    assert not torch.equal(model.train()(**inputs).logits, model.eval()(**inputs).logits)
    ps = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = build("bert", "ForSequenceClassification", **ps)[0]
    assert torch.equal(model.train()(**inputs).logits, model.eval()(**inputs).logits)
    model = build("bert", "ForSequenceClassification", **ps, classifier_dropout=0.5)[0]
    assert not torch.equal(model.train()(**inputs).logits, model.eval()(**inputs).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    """Activations have the autocast dtype; losses and gradients of the weights are fp32."""
    model = build("bert", "ForPreTraining")[0].eval()
    inputs = batch("bert", "ForPreTraining")
    exact = model(**inputs)
    with torch.autocast("cpu", dtype):
        out = model(**inputs, output_hidden_states=True)
    assert out.prediction_logits.dtype == out.hidden_states[-1].dtype == dtype
    assert out.loss.dtype == torch.float32
    assert abs(float((out.loss - exact.loss).detach())) < 0.05
    out.loss.backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())


# --- torch.compile ---


def graphs(compiled: list[torch.fx.GraphModule]) -> int:
    """The number of compiled graphs with ops of ours, also inside of an autograd.Function."""
    return sum(
        any("fastbert" in m.code for m in g.modules() if isinstance(m, torch.fx.GraphModule))
        for g in compiled
    )


def sentences(n: int) -> tuple[Tensor, Tensor]:
    """Two sentences of n and n // 2 + 1 tokens, padded, with their mask."""
    ids = torch.randint(1, 61, (2, n), generator=torch.Generator().manual_seed(n))
    return ids, (torch.arange(n) < torch.tensor([[n], [n // 2 + 1]])).long()


LENGTHS = [20, 9, *range(5, 23)]


def test_compile_packed_has_no_break_and_two_compiles() -> None:
    """Packed pretraining steps of 20 lengths: one graph, at most 2 compiles, the gradients of eager mode."""
    torch._dynamo.reset()
    model = build("bert", "ForPreTraining", num_hidden_layers=1)[0].train()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    fast = torch.compile(model, backend=counter, fullgraph=True)
    for n in LENGTHS:
        ids, mask = sentences(n)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "labels": ids}
        inputs = pack(inputs | {"next_sentence_label": torch.tensor([0, 1])})
        expected = gradients(model, inputs)
        found = gradients(fast, inputs)
        for key, gradient in expected.items():
            close(found[f"_orig_mod.{key}"], gradient, f"gradient of {key} at {n} tokens")
    assert counter.frame_count <= 2
    torch._dynamo.reset()


def test_compile_padded_breaks_at_the_mask_only() -> None:
    """The encoder and its head are one graph, compiled at most twice for 20 lengths."""
    torch._dynamo.reset()
    model = build("bert", "ForMaskedLM", num_hidden_layers=1)[0].eval()
    report = torch._dynamo.explain(model)(**batch("bert", "ForMaskedLM"))
    places = {frame.filename.split("/")[-1] for r in report.break_reasons for frame in r.user_stack}
    assert places <= {"packing.py", "inputs.py"}
    assert graphs(report.graphs) == 1
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    fast = torch.compile(model, backend=counter)
    for n in LENGTHS:
        ids, mask = sentences(n)
        inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids}
        close(fast(**inputs).loss, model(**inputs).loss, "loss")
    assert 1 <= graphs(counter.graphs) <= 2
    torch._dynamo.reset()
