"""What a teacher and a student give for the losses, and distances of attention scores and ranks."""

import itertools

import numpy as np
import pytest
import torch
from tiny_distil import batch_of_three

from fastbert.bert import BertModel
from fastbert.distil.losses import score_distance
from fastbert.distil.plan import Wanted
from fastbert.distil.sentences import spearman
from fastbert.distil.signals import Hooks, Recorded
from fastbert.models.inputs import prepare
from fastbert.nn.packing import Packing


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("bits", [None, 12])
def test_a_recorded_teacher_gives_the_states_of_its_plain_forward(teachers, last, bits):
    model = BertModel.from_pretrained(teachers("text"), add_pooler=False).requires_grad_(False)
    batch, count = batch_of_three(), len(model.layers)
    with torch.no_grad():
        states = model(**batch, output_hidden_states=True).hidden_states
        projected = [
            layer.attention.qkv(x) for layer, x in zip(model.layers, states[:-1], strict=True)
        ]
    wanted = Wanted((0, 2, *((count,) if last else ())), (1, count - 1), vectors=True)
    recorded = Recorded(model, wanted, bits)
    signals = recorded.clear()
    model.frozen = recorded
    rows = torch.tensor([0, 14])
    with torch.no_grad():
        x = model.encode(prepare(model.config, **batch), rows).x
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if bits is None else {"rtol": 0, "atol": 0.02}
    torch.testing.assert_close(x, states[-1][rows], **tolerance)
    assert sorted(signals.hidden) == [*wanted.hidden]
    for number, state in signals.hidden.items():
        torch.testing.assert_close(state, states[number], **tolerance)
    assert sorted(signals.projections) == [*wanted.projections]
    for number, qkv in signals.projections.items():
        torch.testing.assert_close(qkv, projected[number], **tolerance)


def test_layers_behind_the_last_signal_do_not_run(teachers):
    model = BertModel.from_pretrained(teachers("text"), add_pooler=False).requires_grad_(False)
    recorded = Recorded(model, Wanted((), (2,)), None)
    assert recorded.depth == 2
    # a layer that would fail if it ran
    model.layers[3] = torch.nn.Identity()
    model.frozen = recorded
    signals = recorded.clear()
    with torch.no_grad():
        model.encode(prepare(model.config, **batch_of_three()))
    assert [*signals.projections] == [2]


def test_taps_of_a_student_leave_its_fused_ops_and_its_outputs(teachers):
    model = BertModel.from_pretrained(teachers("text"), add_pooler=False).train()
    for p in model.modules():
        if hasattr(p, "p"):
            p.p = 0.0
    batch = batch_of_three()
    plain = model(**batch, output_hidden_states=True)
    taps = Hooks(model, Wanted((0, 4), (3,), vectors=True))
    signals = taps.clear()
    found = model(**batch)
    torch.testing.assert_close(found.last_hidden_state, plain.last_hidden_state, rtol=0, atol=0)
    torch.testing.assert_close(signals.hidden[0], plain.hidden_states[0], rtol=0, atol=0)
    torch.testing.assert_close(signals.hidden[4], plain.hidden_states[4], rtol=0, atol=0)
    signals.projections[3].sum().backward()
    assert model.layers[2].feed_forward.up.weight.grad is not None
    assert model.layers[3].feed_forward.up.weight.grad is None


def test_the_distance_of_attention_scores_is_that_of_the_written_out_ones():
    lengths = torch.tensor([5, 1, 9])
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    # a row past the last sequence is not read
    own = torch.randn(16, 3, 2, 8, requires_grad=True)
    theirs = torch.randn(16, 3, 2, 4)
    found = score_distance(own, theirs, Packing(cu_seqlens, 9))
    expected = torch.zeros(())
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        scores = [
            torch.einsum("shd,thd->hst", *z[start:end].unbind(1)[:2]) * z.shape[-1] ** -0.5
            for z in (own, theirs)
        ]
        expected = expected + (scores[0] - scores[1]).square().sum() / 2
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    gradients = [torch.autograd.grad(y, own)[0] for y in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_spearman_is_scipys():
    scipy = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 9, 50) * 1.0, rng.normal(size=50)
    assert spearman(a, b) == pytest.approx(scipy.spearmanr(a, b).statistic)
