"""Writes to a frozen model's weights that PyTorch does not count: moving averages, numpy, momentum encoders."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_freeze import CONFIG, batch, hidden

import fastbert
from fastbert.bert import BertModel
from fastbert.runners import copies


def _moving_average(weight):
    weight.data.lerp_(torch.ones(()), 0.1)


def _in_two_steps(weight):
    weight.data.mul_(0.5).add_(0.1)


def _copied(weight):
    weight.data.copy_(weight.data.flip(0))


def _negated(weight):
    weight.data.neg_()


def _doubled(weight):
    weight.data.mul_(2)


def _halved(weight):
    weight.data.mul_(0.5)


def _numpy(weight):
    weight.detach().numpy()[:] *= 1.5


@pytest.mark.parametrize("name", ["attention.qkv", "attention.out", "feed_forward.down"])
@pytest.mark.parametrize(
    "write", [_moving_average, _in_two_steps, _copied, _negated, _doubled, _halved, _numpy]
)
def test_a_whole_weight(write, name):
    model, inputs = fastbert.freeze(BertModel(CONFIG)), batch()
    before = hidden(model, inputs)
    # a deep copy has no packed weights: it packs its own
    for twin in (model, copy.deepcopy(model)):
        write(twin.layers[1].get_submodule(name).weight)
        ours = hidden(twin, inputs)
        assert not torch.equal(ours, before)
        torch.testing.assert_close(ours, hidden(fastbert.unfreeze(twin), inputs))


@pytest.mark.parametrize("write", [_negated, _doubled, _halved])
def test_whole_weights_and_rows_in_a_long_call(write):
    """The same change of many numbers must not cancel in the checksum."""
    ids = torch.randint(5, 97, (copies.WHOLE_FROM // 32, 32))
    for rows in (slice(None), slice(5, 6)):
        model = fastbert.freeze(BertModel(CONFIG))
        hidden(model, {"input_ids": ids})
        for layer in model.layers:
            for part in (layer.feed_forward.up, layer.feed_forward.down, layer.attention.qkv):
                write(part.weight[rows])
        ours = hidden(model, {"input_ids": ids})
        torch.testing.assert_close(ours, hidden(fastbert.unfreeze(model), {"input_ids": ids}))


def test_a_row_within_eight_calls():
    model, inputs = fastbert.freeze(BertModel(CONFIG)), batch()
    hidden(model, inputs)
    model.layers[1].feed_forward.up.weight.data[77] *= -1
    ours = [hidden(model, inputs) for _ in range(copies.SAMPLED)]
    torch.testing.assert_close(ours[-1], hidden(fastbert.unfreeze(model), inputs))


def test_threads_on_a_fresh_model():
    for _ in range(5):
        model, inputs = fastbert.freeze(BertModel(CONFIG)), batch()
        expected = hidden(model, inputs)
        fastbert.freeze(model)
        with ThreadPoolExecutor(6) as pool:
            found = list(pool.map(lambda _, m=model, x=inputs: hidden(m, x), range(12)))
        for y in found:
            torch.testing.assert_close(y, expected)


def test_one_number_in_a_long_call():
    model = fastbert.freeze(BertModel(CONFIG))
    inputs = {"input_ids": torch.randint(5, 97, (copies.WHOLE_FROM // 32, 32))}
    before = hidden(model, inputs)
    model.layers[1].feed_forward.up.weight.data[77, 5] += 3.0
    ours = hidden(model, inputs)
    assert not torch.equal(ours, before)
    torch.testing.assert_close(ours, hidden(fastbert.unfreeze(model), inputs))


def test_one_number_after_another_freeze():
    model, inputs = fastbert.freeze(BertModel(CONFIG)), batch()
    hidden(model, inputs)
    model.layers[1].feed_forward.up.weight.data[77, 5] += 3.0
    ours = hidden(fastbert.freeze(model), inputs)
    torch.testing.assert_close(ours, hidden(fastbert.unfreeze(model), inputs))
