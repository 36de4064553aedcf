"""accelerate() under torch.compile: how many graphs, how often compiled, and the same results as without it."""

import copy
import random

import pytest
import torch
import torch._dynamo.testing
from hf_models import V, accelerated, at_tokens, batch, build, config, without_dropout

from fastbert.nn.packing import READINGS, find_labelled


@pytest.mark.parametrize("reading", READINGS)
def test_the_ops_at_the_breaks_are_registered_soundly(reading):
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    checks = ("test_schema", "test_faketensor")
    ops = torch.ops.fastbert
    torch.library.opcheck(ops.find_tokens.default, (mask, reading), test_utils=checks)
    labels = mask.long() * 5 - 100 * (mask == 0)
    for given in (None, mask):
        inputs = (labels, given, labels)
        torch.library.opcheck(ops.find_labelled.default, inputs, test_utils=checks)
    assert find_labelled(labels, mask, labels)[0].tolist() == [0, 1, 3]
    assert find_labelled(labels, 1 - mask, labels[:1])[1].shape == (3, 1, 0)


def _one_layer(family, head):
    name = "n_layers" if family == "DistilBert" else "num_hidden_layers"
    return accelerated(build(family, head, **{name: 1}))


def _ragged(family, head, size, length, seed):
    """A batch whose longest sequence may be shorter than its number of columns; every fifth has no padding."""
    drawn = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, length + 1, (size,), generator=drawn)
    if seed % 5 == 4:
        lengths[:] = length
    mask = (torch.arange(length) < lengths[:, None]).long()
    ids = torch.randint(5, V, mask.shape, generator=drawn)
    ids = ids.where(mask.bool(), config(family).pad_token_id)
    given = {"input_ids": ids, "attention_mask": mask}
    if head == "ForMaskedLM":
        some = torch.rand(mask.shape, generator=drawn) < 0.4
        some[:, 1] = True
        given["labels"] = ids.where(some & mask.bool(), -100)
    elif head == "ForTokenClassification":
        given["labels"] = (ids % 3).where(mask.bool(), -100)
    elif head == "ForQuestionAnswering":
        given |= {"start_positions": lengths // 3, "end_positions": lengths - 1}
    elif head == "ForSequenceClassification":
        given["labels"] = torch.randint(0, 3, (size,), generator=drawn)
    return given


def _results(model, given, training):
    if not training:
        with torch.no_grad():
            output = model(**given)
        return {n: at_tokens(t, given["attention_mask"]) for n, t in output.items()}
    model.zero_grad()
    loss = model(**given).loss
    loss.backward()
    found = {n.removeprefix("_orig_mod."): p.grad for n, p in model.named_parameters()}
    return {"loss": loss.detach()} | {n: g.clone() for n, g in found.items() if g is not None}


slow = pytest.mark.slow


# the encoder is one graph, the head another, and our own last part of the head for answers a third
@pytest.mark.parametrize(
    ("family", "head", "training", "graphs"),
    [
        pytest.param("Bert", "Model", False, 1, marks=slow),
        ("Bert", "ForMaskedLM", True, 2),
        pytest.param("Bert", "ForSequenceClassification", False, 2, marks=slow),
        pytest.param("Bert", "ForSequenceClassification", True, 2, marks=slow),
        pytest.param("DistilBert", "ForSequenceClassification", True, 2, marks=slow),
        pytest.param("Roberta", "ForTokenClassification", True, 2, marks=slow),
        pytest.param("Bert", "ForQuestionAnswering", True, 3, marks=slow),
    ],
)
def test_one_break_at_the_mask_and_two_compiles(family, head, training, graphs):
    """20 batches of differing sizes and numbers of tokens: every graph is compiled at most twice."""
    torch._dynamo.reset()
    model = _one_layer(family, head)
    if training:
        without_dropout(model)
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    fast = torch.compile(model, backend=counter)
    sizes = random.Random(0)
    for seed in range(20):
        given = _ragged(family, head, sizes.randint(2, 6), sizes.randint(4, 20), seed)
        expected, found = (_results(m, given, training) for m in (model, fast))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        if seed == 0:
            assert counter.frame_count == graphs
    assert counter.frame_count <= 2 * graphs
    torch._dynamo.reset()


def test_left_padding_is_still_seen_when_compiled():
    torch._dynamo.reset()
    model = _one_layer("Bert", "Model")
    fast = torch.compile(model, backend="eager")
    given = batch("Bert")
    left = given | {"attention_mask": given["attention_mask"].flip(1)}
    with torch.no_grad():
        for inputs in (given, left):
            x, y = (m(**inputs).last_hidden_state for m in (fast, model))
            torch.testing.assert_close(x, y)
    torch._dynamo.reset()


@slow
def test_inductor_trains_a_masked_lm():
    torch._dynamo.reset()
    model = without_dropout(_one_layer("Bert", "ForMaskedLM"))
    fast = torch.compile(copy.deepcopy(model))
    for seed in (0, 1, 2):
        given = _ragged("Bert", "ForMaskedLM", 3 + seed, 9 + seed, seed)
        expected, found = (_results(m, given, True) for m in (model, fast))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    torch._dynamo.reset()
