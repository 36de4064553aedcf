"""accelerate() on models of transformers: the same results, in place, also under tools that change modules."""

import collections
import copy
import inspect
import io
import logging
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from hf_models import (
    FAMILIES,
    HEADS,
    MASK,
    OLD,
    B,
    S,
    accelerated,
    assert_same,
    at_tokens,
    batch,
    build,
    transformers,
    without_dropout,
)

import fastbert
from fastbert.integrations.families import Family
from fastbert.nn import watch

MODELS = [(f, h) for f in FAMILIES for h in HEADS if hasattr(transformers, f + h)]


@pytest.fixture
def sentences(monkeypatch, caplog):
    """The sentences that are logged once per process; no earlier test has logged them here."""
    monkeypatch.setattr(watch, "_logged", set())
    caplog.set_level(logging.INFO, logger="fastbert")
    words = ("runs transformers' code", "takes padding out", "computes all logits")
    return lambda: [m for r in caplog.records if any(w in (m := r.getMessage()) for w in words)]


def gradients(model, given):
    """The loss and the gradients of one training step."""
    loss = model(**given).loss
    loss.backward()
    return loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("family", "head"), MODELS)
def test_same_outputs_and_gradients(family, head, sentences):
    stock, given = build(family, head), batch(family, head)
    ours = accelerated(stock)
    if head == "ForQuestionAnswering":
        # scores at padding are part of transformers' loss and not of ours; without padding the losses are equal
        lowest = torch.finfo(torch.float32).min
        assert (ours(**given).start_logits[MASK == 0] == lowest).all()
        assert ours(**given).loss.item() == pytest.approx(by_sequence(stock, given), rel=1e-5)
        for name in ("start_logits", "end_logits"):
            torch.testing.assert_close(*(at_tokens(m(**given)[name]) for m in (stock, ours)))
        given["attention_mask"] = torch.ones_like(MASK)
    mask = given["attention_mask"].flatten(0, -2)
    with torch.no_grad():
        assert_same(*(m(**given, output_hidden_states=True) for m in (stock, ours)), mask)
        # without hidden states the last layer computes only the rows that the head reads
        assert_same(*(m(**given) for m in (stock, ours)), mask)
    if not {"labels", "start_positions"} & given.keys():
        return
    (x, dx), (y, dy) = (gradients(without_dropout(m), given) for m in (stock, ours))
    torch.testing.assert_close(x, y)
    assert dx.keys() == dy.keys()
    for name in dx:
        torch.testing.assert_close(dx[name], dy[name], atol=1e-5, rtol=1e-4)
    assert not sentences()


def by_sequence(model, given):
    """The mean loss of the sequences one by one, without padding."""
    losses = []
    for i, length in enumerate(MASK.sum(1).tolist()):
        one = {n: t[i : i + 1, :length] if t.dim() == 2 else t[i : i + 1] for n, t in given.items()}
        losses.append(model(**one).loss.item())
    return sum(losses) / B


def test_nothing_but_classes_changes():
    model = build("Bert", "ForMaskedLM")
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    keys, signature = list(model.state_dict()), inspect.signature(model.forward)
    names = [type(m).__name__ for m in model.modules()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    assert fastbert.accelerate(fastbert.accelerate(model)) is model
    assert all(m is modules[n] for n, m in model.named_modules())
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert list(model.state_dict()) == keys
    assert inspect.signature(model.forward) == signature
    assert [type(m).__name__ for m in model.modules()] == names
    assert type(model).__module__ == "fastbert.integrations.huggingface"
    before = model.bert.embeddings.word_embeddings.weight.clone()
    gradients(model.train(), batch("Bert", "ForMaskedLM"))
    optimizer.step()
    assert not torch.equal(before, model.bert.embeddings.word_embeddings.weight)
    fastbert.restore(model)
    assert {type(m).__module__.split(".")[0] for m in model.modules()} == {"transformers", "torch"}
    assert not any("fastbert" in name for m in model.modules() for name in vars(m))


def test_transformers_is_imported_only_when_used():
    code = (
        "import sys, torch, fastbert; fastbert.accelerate(torch.nn.LayerNorm(4)); "
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_padding_is_removed_once(monkeypatch):
    """Every layer takes the packed tokens; nothing is packed or padded in between."""
    model, rows = accelerated(build("Bert")), []
    from fastbert.integrations import layers

    run = layers.run
    monkeypatch.setattr(
        layers,
        "run",
        lambda m, x, call: rows.append(tuple(x.shape)) or run(m, x, call),
    )
    output = model(**batch("Bert")).last_hidden_state
    assert rows == [(int(MASK.sum()), 32)] * 2
    assert output.shape == (B, S, 32)
    assert not output[MASK == 0].any()


def test_a_layer_costs_few_checks():
    """One more layer costs at most 50 Python calls in fastbert/integrations and fastbert/nn."""

    def calls(count):
        model, given = accelerated(build("Bert", num_hidden_layers=count)), batch("Bert")
        seen = collections.Counter()

        def watch(frame, event, _):
            if event == "call":
                seen[frame.f_code.co_filename.rpartition("fastbert")[2]] += 1

        with torch.no_grad():
            model(**given)
            sys.setprofile(watch)
            try:
                model(**given)
            finally:
                sys.setprofile(None)
        return sum(n for path, n in seen.items() if path.startswith(("/integrations", "/nn")))

    assert calls(3) - calls(2) <= 50


@pytest.mark.parametrize("family", ["Bert", "DistilBert"])
def test_a_forward_looks_up_the_layers_once(family, monkeypatch):
    model, calls, found = accelerated(build(family)), [], Family.layers_of
    monkeypatch.setattr(
        Family, "layers_of", lambda self, stack: calls.append(1) or found(self, stack)
    )
    model(**batch(family))
    assert len(calls) == 1


def test_training_computes_labelled_rows_only():
    model, given = accelerated(build("Bert", "ForMaskedLM")).train(), batch("Bert", "ForMaskedLM")
    assert model(**given).logits is None
    assert len(model(**given, return_dict=False)) == 1
    assert model(**given, return_logits=True).logits.shape == (B, S, 99)
    assert OLD or model(**given, num_items_in_batch=7).logits is None
    assert model.eval()(**given).logits.shape == (B, S, 99)
    none = given | {"labels": torch.full_like(given["labels"], -100)}
    loss = model.train()(**none).loss
    loss.backward()
    assert loss == 0
    assert model.cls.predictions.decoder.weight.grad is not None


def test_dropout_drops_and_follows_the_seed():
    model, given = (
        accelerated(build("Bert", "ForSequenceClassification")).train(),
        batch("Bert", "ForSequenceClassification"),
    )
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(model(**given).loss.item())
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    given, found = batch("Bert", "ForMaskedLM"), []
    for on in (False, True):
        model = accelerated(build("Bert", "ForMaskedLM")).train()
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(3)
        found.append(gradients(model, given))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(found[0][1][n], found[1][1][n]) for n in found[0][1])


# --- copies, files, threads, precision, compilers ---


def test_copies_and_files(tmp_path):
    model, given = accelerated(build("Bert", "ForMaskedLM")), batch("Bert", "ForMaskedLM")
    expected = model(**given).logits
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    model.save_pretrained(tmp_path)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
        transformers.BertForMaskedLM.from_pretrained(tmp_path),
        type(model).from_pretrained(tmp_path),
    ]
    for m in copies:
        torch.testing.assert_close(at_tokens(m.eval()(**given).logits), at_tokens(expected))
    assert transformers.BertConfig.from_pretrained(tmp_path).architectures == ["BertForMaskedLM"]
    assert type(fastbert.restore(copies[1])) is transformers.BertForMaskedLM
    build("Bert", "ForMaskedLM").load_state_dict(model.state_dict())


@pytest.mark.slow
def test_unpickled_in_another_process(tmp_path):
    model, given = accelerated(build("DistilBert")), batch("DistilBert")
    torch.save((model, given), tmp_path / "model.pt")
    code = (
        f"import torch; m, given = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False); "
        "o = m(**given, output_hidden_states=True); assert len(o.hidden_states) == 3; "
        f"torch.save(o.last_hidden_state, {str(tmp_path / 'out.pt')!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), model(**given).last_hidden_state)


def test_threads():
    model, given, found = accelerated(build("Bert")), batch("Bert"), []

    def work():
        with torch.no_grad():
            found.append(model(**given, output_hidden_states=True).hidden_states)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(found) == 4
    assert all(
        torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    stock = build("Bert", "ForMaskedLM")
    given = batch("Bert", "ForMaskedLM")
    exact = stock(**given)
    models = without_dropout(stock), without_dropout(accelerated(stock))
    with torch.autocast("cpu", dtype):
        (x, dx), (y, dy) = (gradients(m, given) for m in models)
        states = [m.bert(given["input_ids"], MASK).last_hidden_state for m in models]
    assert states[0].dtype == states[1].dtype
    assert abs(y - exact.loss) <= 2 * abs(x - exact.loss) + 0.02
    for name in dx:
        assert dx[name].dtype == dy[name].dtype
    cosine = torch.cosine_similarity(
        *(torch.cat([g.flatten() for g in d.values()]) for d in (dx, dy)), 0
    )
    assert cosine > 0.999


@pytest.mark.slow
def test_compiles_whole_without_a_mask_and_with_breaks_with_one():
    model, given = accelerated(build("Bert")), batch("Bert")
    torch._dynamo.reset()
    with torch.no_grad():
        whole = torch.compile(model, fullgraph=True, backend="aot_eager")
        x = whole(input_ids=given["input_ids"]).last_hidden_state
        torch.testing.assert_close(x, model(input_ids=given["input_ids"]).last_hidden_state)
        x = torch.compile(model, backend="aot_eager")(**given).last_hidden_state
        torch.testing.assert_close(x, model(**given).last_hidden_state)
    torch._dynamo.reset()


def test_attention_takes_heads_of_eight(capsys):
    qkv = torch.randn(31, 3, 4, 8, requires_grad=True)
    bounds = torch.tensor([0, 11, 31], dtype=torch.int32)
    assert fastbert.explain("attention", qkv, bounds, 20)["cpu"] is None
