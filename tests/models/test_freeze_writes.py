"""Writes to a frozen model's weights that PyTorch does not count: moving averages, numpy, momentum encoders."""

import copy

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


def _numpy(weight):
    weight.detach().numpy()[:] *= 1.5


@pytest.mark.parametrize("name", ["attention.qkv", "attention.out", "feed_forward.down"])
@pytest.mark.parametrize("write", [_moving_average, _in_two_steps, _copied, _numpy])
def test_a_whole_weight(write, name):
    model, inputs = fastbert.freeze(BertModel(CONFIG)), batch()
    before = hidden(model, inputs)
    # a deep copy has no packed weights: it packs its own
    for twin in (model, copy.deepcopy(model)):
        write(twin.layers[1].get_submodule(name).weight)
        ours = hidden(twin, inputs)
        assert not torch.equal(ours, before)
        torch.testing.assert_close(ours, hidden(fastbert.unfreeze(twin), inputs))


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
