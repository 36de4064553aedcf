"""validate(): a model as it was against its accelerated form, and against its quantised one."""

import copy
import re

import pytest
import torch
from hf_models import LENGTHS, MASK, B, S, V, accelerated, batch, build, transformers
from torch import nn
from torch.nn.functional import cosine_similarity

import fastbert
from fastbert import bert
from fastbert.backend import cpu
from fastbert.integrations import quantised
from fastbert.integrations.accelerate import is_accelerated

needs_cpu = pytest.mark.skipif(cpu.native is None, reason=str(cpu.unavailable))


def test_validate_agrees_and_leaves_no_trace(capsys):
    model, given = build("Bert", "ForMaskedLM").train(), batch("Bert", "ForMaskedLM")
    state = copy.deepcopy(model.state_dict())
    model.bert.embeddings.word_embeddings.weight.grad = mark = torch.ones(V, 32)
    drawn = torch.random.get_rng_state()
    report = fastbert.validate(model, given, rounds=1)
    assert report.agrees
    assert [r.what for r in report.rows] == [
        "logits",
        "loss",
        "gradients",
        "kept for backward",
        "inference, median",
        "training, median",
    ]
    assert str(report) in capsys.readouterr().out
    assert model.training
    assert type(model) is transformers.BertForMaskedLM
    assert model.bert.embeddings.dropout.p == 0.1
    assert model.bert.embeddings.word_embeddings.weight.grad is mark
    assert model.bert.pooler is None or model.bert.pooler.dense.weight.grad is None
    assert torch.equal(drawn, torch.random.get_rng_state())
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


def test_validate_sees_a_difference(monkeypatch):
    from fastbert.integrations import layers

    run = layers.run
    monkeypatch.setattr(layers, "run", lambda *args: run(*args) * 1.5)
    report = fastbert.validate(accelerated(build("Bert")), {"input_ids": MASK + 4}, rounds=1)
    assert not report.agrees
    assert "DIFFERS" in str(report)


def test_validate_takes_any_model_and_refuses_others():
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    assert fastbert.validate(layer, torch.randn(2, 5, 32), rounds=1).agrees
    assert fastbert.validate(layer, (torch.randn(2, 5, 32),), rounds=1).agrees
    with pytest.raises(ValueError, match="nothing to compare"):
        fastbert.validate(nn.Linear(2, 2), torch.randn(2, 2))
    with pytest.raises(TypeError, match="batch is a int"):
        fastbert.validate(layer, 3)
    with pytest.raises(ValueError, match="rounds is 0"):
        fastbert.validate(layer, torch.randn(2, 5, 32), rounds=0)


def test_validate_keeps_frozen_copies_and_at_padding():
    model = fastbert.accelerate(build("Bert"), at_padding="stock")
    fastbert.freeze(model)
    copies = model.encoder.frozen
    assert fastbert.validate(model, batch("Bert"), rounds=1).agrees
    assert model.encoder.frozen is copies
    assert model.fastbert_at_padding == "stock"


def test_as_many_classes_as_columns():
    """(B, S) are scores of places or of classes: the mask holds for the first only."""
    model, given = build("Bert", "ForSequenceClassification", num_labels=S), batch("Bert")
    row = fastbert.validate(model, given, rounds=1).rows[0]
    with torch.no_grad():
        logits = model(**given).logits
    assert logits.shape == MASK.shape
    assert row.stock == f"max {float(logits.abs().max()):.3g}"
    assert row.agrees


def test_several_batches_need_bits():
    with pytest.raises(TypeError, match="a list of batches: pass one of them, or bits=12"):
        fastbert.validate(build("Bert"), [batch("Bert")])


@pytest.mark.parametrize("bits", [None, pytest.param(12, marks=needs_cpu)])
def test_a_batch_without_a_token_is_refused(bits):
    model, full = build("Bert"), batch("Bert")
    empty = {k: v[:0] for k, v in full.items()}
    padding = {**full, "attention_mask": torch.zeros_like(MASK)}
    for given, sentence in (
        (empty, r"^(the batch|batch 1) has a tensor of shape \(0, \d+\): pass a token"),
        (empty["input_ids"], r"has a tensor of shape \(0, \d+\)"),
        (padding, "has no token, its attention_mask is 0 everywhere"),
    ):
        with pytest.raises(ValueError, match=sentence):
            fastbert.validate(model, given, rounds=1, bits=bits)
    if bits is not None:
        with pytest.raises(ValueError, match=r"^batch 2 has a tensor of shape"):
            fastbert.validate(model, [full, empty], rounds=1, bits=bits)
    assert not is_accelerated(model)


# --- bits ---


def own(tmp_path, head="Model", **changes):
    """Our model with the weights of transformers'."""
    build("Bert", head, **changes).save_pretrained(tmp_path)
    return getattr(bert, f"Bert{head}").from_pretrained(tmp_path).eval()


def cells(report):
    """{what: row} of a report."""
    return {row.what: row for row in report.rows}


@needs_cpu
@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("bits", [12, 8])
def test_tokens_compared_over_batches(tmp_path, bits, ours):
    head = "ForTokenClassification"
    model = own(tmp_path, head) if ours else build("Bert", head)
    given = batch("Bert", head)
    batches = [{k: t[i : i + 2] for k, t in given.items()} for i in (0, 2)]
    report = fastbert.validate(model, iter(batches), rounds=1, bits=bits)
    rows = cells(report)
    assert list(rows) == [
        "logits",
        "decisions, logits",
        "accuracy, logits",
        "loss",
        "encoder weights",
        "inference, median",
    ]
    assert report.names == ("unquantised", f"{bits} bits")

    form = model if ours else accelerated(model)
    tokens, labels = MASK[:4].bool(), given["labels"][:4]
    with torch.no_grad():
        outputs = [form(**b) for b in batches]
        fastbert.quantize(form, bits)
        others = [form(**b) for b in batches]
    x, y = (torch.cat([o.logits for o in side])[tokens] for side in (outputs, others))
    found = cosine_similarity(x, y)
    assert 0 < (x - y).abs().max() < 0.1
    said = rows["logits"].difference
    assert said.startswith(f"max {float((x - y).abs().max()):.1e}, cosine mean ")
    mean, least = (float(v) for v in re.findall(r"(?:mean|least) (\S+?)(?:,|$)", said))
    # the report has six digits, of sums in another order
    assert mean == pytest.approx(float(found.mean()), abs=2e-6)
    assert least == pytest.approx(float(found.min()), abs=2e-6)
    same = int((x.argmax(1) == y.argmax(1)).sum())
    assert rows["decisions, logits"].difference.startswith(f"{same} of {len(x)} the same")
    known = labels[tokens] >= 0
    right = [float((t.argmax(1) == labels[tokens])[known].double().mean()) for t in (x, y)]
    assert rows["accuracy, logits"].stock == f"{right[0]:.2%}"
    assert rows["accuracy, logits"].fastbert == f"{right[1]:.2%}"
    losses = [float(sum(o.loss for o in side) / 2) for side in (outputs, others)]
    assert float(rows["loss"].stock) == pytest.approx(losses[0], abs=2e-6)
    assert float(rows["loss"].fastbert) == pytest.approx(losses[1], abs=2e-6)
    weights = sum(p.nbytes for n, p in form.named_parameters() if ".layer" in n)
    assert rows["encoder weights"].stock == f"{weights / 1e6:.2f} MB"
    assert rows["encoder weights"].fastbert == f"{fastbert.frozen_bytes(form) / 1e6:.2f} MB"


@needs_cpu
@pytest.mark.parametrize("ours", [True, False])
def test_bits_leave_no_trace(tmp_path, ours, capsys):
    given = batch("Bert")
    model = (own(tmp_path) if ours else build("Bert")).train()
    state, drawn = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    attributes = [dict(vars(m)) for m in model.modules()]
    report = fastbert.validate(model, given, rounds=1, bits=12)
    assert str(report) in capsys.readouterr().out
    assert "unquantised" in str(report)
    assert is_accelerated(model) is False
    assert [dict(vars(m)) for m in model.modules()] == attributes
    assert torch.equal(drawn, torch.random.get_rng_state())
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


@needs_cpu
@pytest.mark.parametrize("form", [fastbert.freeze, fastbert.quantize])
def test_copies_from_before_are_kept(form):
    model, given = form(accelerated(build("Bert"))), batch("Bert")
    with torch.no_grad():
        before = model(**given).last_hidden_state
    copies, size = model.encoder.frozen, fastbert.frozen_bytes(model)
    reports = [fastbert.validate(model, given, rounds=1, bits=12) for _ in range(2)]
    assert model.encoder.frozen is copies
    assert fastbert.frozen_bytes(model) == size
    with torch.no_grad():
        assert torch.equal(model(**given).last_hidden_state, before)
    # a quantised model is compared with its own weights, not with itself
    assert reports[0].rows[0] == reports[1].rows[0]
    assert not reports[0].rows[0].difference.startswith("max 0.0e+00")


@needs_cpu
def test_answers_are_places(tmp_path):
    head = "ForQuestionAnswering"
    given = batch("Bert", head)
    model = own(tmp_path, head)
    rows = cells(fastbert.validate(model, given, rounds=1, bits=12))
    with torch.no_grad():
        scores = model(**given).end_logits.masked_fill(MASK == 0, -torch.inf)
    right = float((scores.argmax(1) == given["end_positions"]).double().mean())
    assert rows["accuracy, end_logits"].stock == f"{right:.2%}"
    assert rows["decisions, end_logits"].difference.startswith(f"{B} of {B} the same")
    # the same texts, packed
    tokens = MASK.bool()
    packed = {
        "input_ids": given["input_ids"][tokens],
        "cu_seqlens": torch.cat([torch.zeros(1), LENGTHS.cumsum(0)]).int(),
        "max_seqlen": S,
        "start_positions": given["start_positions"],
        "end_positions": given["end_positions"],
    }
    again = cells(fastbert.validate(model, packed, rounds=1, bits=12))
    for what in ("accuracy, start_logits", "accuracy, end_logits"):
        assert again[what] == rows[what]


@needs_cpu
def test_batches_of_every_kind(tmp_path):
    model, ids = own(tmp_path), torch.randint(5, V, (4, S))
    expected = cells(fastbert.validate(model, {"input_ids": ids}, rounds=1, bits=12))
    what = "last_hidden_state"
    loader = torch.utils.data.DataLoader(ids, 4)
    for one in (ids, (ids, torch.ones_like(ids)), [ids], loader, [(ids,)], [{"input_ids": ids}]):
        assert cells(fastbert.validate(model, one, rounds=1, bits=12))[what] == expected[what]


def test_agreement_sees_differences():
    x = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 3.0]])
    y = torch.tensor([[1.0, 0.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 3.5]])
    agreement = quantised._Agreement(torch.nn.Identity())
    given = {"labels": torch.tensor([0, 1, -100, 1])}
    agreement.add(given, {"logits": x, "loss": x[0, 0]}, {"logits": y, "loss": y[3, 2]})
    outputs, decisions, accuracy, loss = agreement.rows()
    assert outputs.difference == "max 2.0e+00, cosine mean 0.750000, least 0.000000"
    assert decisions.difference == "3 of 4 the same, 75.00%"
    # logits are judged by their decisions
    assert (outputs.agrees, decisions.agrees) == (None, False)
    assert (accuracy.stock, accuracy.fastbert) == ("66.67%", "33.33%")
    assert accuracy.difference == "-33.33 points, 3 labels"
    assert loss.difference == "+2.5e+00"
    hidden = quantised._Agreement(torch.nn.Identity())
    hidden.add({}, {"hidden": x}, {"hidden": y})
    assert next(hidden.rows()).agrees is False
    hidden.add({}, {"hidden": x}, {"hidden": x * float("nan")})
    row = next(hidden.rows())
    assert row.difference == "max nan, cosine mean nan, least nan"
    assert row.agrees is False


@needs_cpu
def test_bad_use_of_bits_is_one_sentence(tmp_path):
    model, given = build("Bert"), batch("Bert")

    def refused(kind, sentence, *arguments, model=model, **options):
        with pytest.raises(kind, match=sentence):
            fastbert.validate(model, *arguments, **{"rounds": 1, "bits": 12, **options})

    refused(ValueError, "bits is 4: pass 12 or 8", given, bits=4)
    refused(ValueError, "there are no batches", [])
    refused(TypeError, "batch is a int", 3)
    refused(TypeError, "batch is a int", [3])
    refused(ValueError, "Linear holds no encoder", torch.ones(1, 2), model=nn.Linear(2, 2))
    refused(
        ValueError,
        "BertModel is on meta: move it to the CPU",
        given,
        model=build("Bert").to("meta"),
    )
    refused(
        ValueError,
        "can't be quantised: its layers would .*, layer 0: the activation is not GELU",
        given,
        model=build("Bert", hidden_act="relu"),
    )
    refused(
        ValueError,
        "no layer of this BertModel was quantised",
        given | {"attention_mask": given["attention_mask"].flip(1)},
        model=build("Bert"),
    )
    integers = fastbert.quantize(own(tmp_path), replace=True)
    refused(ValueError, "weights of this BertModel are int8", given, model=integers)
    assert not is_accelerated(model)
    assert fastbert.frozen_bytes(model) == 0


@needs_cpu
def test_nan_never_agrees():
    """argmax takes the first NaN of both models as their decision."""
    sizes = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = bert.BertForSequenceClassification(bert.BertConfig(intermediate_size=64, **sizes))
    given = {"input_ids": MASK + 4, "attention_mask": MASK}
    assert fastbert.validate(model, given, rounds=1, bits=12).agrees
    with torch.no_grad():
        model.bert.layers[0].output_norm.weight[0] = torch.nan
    assert not fastbert.validate(model, given, rounds=1, bits=12).agrees
