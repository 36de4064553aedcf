import pytest
import torch
from harness import backends, check, compiled, gradcheck, instruction_set, parametrize

from fastbert import functional
from fastbert.backend import chooser, cpu
from fastbert.testing import parity
from fastbert.testing.budget import assert_within_budget

SLUG = "lstm"
NATIVE = pytest.mark.skipif(cpu.native is None, reason=f"no native module: {cpu.unavailable}")


@parametrize(SLUG)
def test_forward(name, sample, dtype):
    check(SLUG, name, sample, dtype, backward=False)


@parametrize(SLUG)
def test_backward(name, sample, dtype):
    check(SLUG, name, sample, dtype, backward=True)


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_gradcheck(name):
    gradcheck(SLUG, name)


def test_compile():
    compiled(SLUG, "torch", {"S6-4-H5-D2-cells"}.__contains__)


def drawn(lengths, H=20, D=2, seed=0, dtype=torch.float32):
    """The arguments of a call on random tensors, with initial states and cells."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    return {
        "gates": normal(sum(lengths), D * 4 * H),
        "weights": [normal(4 * H, H, scale=H**-0.5) for _ in range(D)],
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        "max_seqlen": max(lengths),
        "h0": normal(D, len(lengths), H),
        "c0": normal(D, len(lengths), H),
        "return_cells": True,
    }


@pytest.mark.parametrize("name", backends(SLUG))
def test_it_is_torchs_cell(name):
    """Both directions of one sequence, step by step, by torch.nn.LSTMCell in fp64."""
    name, _, isa = name.partition("/")
    H, S = 6, 5
    call = drawn((S,), H)
    with chooser.use(name), instruction_set(isa):
        y, cells = functional.lstm(**call)
    for d in range(2):
        cell = torch.nn.LSTMCell(4 * H, H, bias=False, dtype=torch.float64)
        cell.weight_ih.data = torch.eye(4 * H, dtype=torch.float64)
        cell.weight_hh.data = call["weights"][d].double()
        h, c = call["h0"][d].double(), call["c0"][d].double()
        for row in (range(S), reversed(range(S)))[d]:
            gates = call["gates"][row : row + 1, d * 4 * H : (d + 1) * 4 * H]
            h, c = cell(gates.double(), (h, c))
            torch.testing.assert_close(
                y[row, d * H : (d + 1) * H].double(), h[0].detach(), rtol=1e-4, atol=1e-5
            )
            torch.testing.assert_close(
                cells[row, d * H : (d + 1) * H].double(), c[0].detach(), rtol=1e-4, atol=1e-5
            )


@NATIVE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_sequence_has_the_same_bits_alone_and_in_any_batch(dtype):
    lengths = (7, 1, 0, 5, 12, 3, 3, 9, 2)
    call = drawn(lengths, H=37, dtype=dtype)
    of_batch = ("h0", "c0")
    for isa in cpu.native.isas():
        with chooser.use("cpu"), instruction_set(isa):
            whole = parity.call(functional.lstm, call, True, torch.ones_like)
            for b, start in enumerate(call["cu_seqlens"].tolist()[:-1]):
                rows = slice(start, start + lengths[b])
                alone = call | {
                    "gates": call["gates"][rows],
                    "cu_seqlens": torch.tensor([0, lengths[b]], dtype=torch.int32),
                    **{name: call[name][:, b : b + 1] for name in of_batch},
                }
                found = parity.call(functional.lstm, alone, True, torch.ones_like)
                for key in ("output 0", "output 1", "dgates"):
                    assert torch.equal(found[key], whole[key][rows]), (isa, key, b)
                for name in of_batch:
                    assert torch.equal(found[f"d{name}"], whole[f"d{name}"][:, b : b + 1])


@NATIVE
def test_long_sequences_stay_within_the_budget():
    """Errors of a recurrence add up over its steps: 300 of them, in every instruction set."""
    call = drawn((300, 120), H=24, D=1)
    del call["return_cells"]
    wide = {
        k: parity.tree_map(v, lambda t: t.double() if t.is_floating_point() else t)
        for k, v in call.items()
    }
    with chooser.use("torch"):
        truth = parity.call(functional.lstm, wide, True)
        stock = parity.call(functional.lstm, call, True)
    for isa in cpu.native.isas():
        with chooser.use("cpu"), instruction_set(isa):
            found = parity.call(functional.lstm, call, True)
        for key, value in truth.items():
            assert_within_budget(f"{isa} {key}", found[key], value, stock[key])


@NATIVE
def test_gradients_that_nothing_needs_are_not_computed():
    call = drawn((4, 2), H=5)
    for wanted in (["gates"], ["h0"], ["weights"]):
        leaves = {k: parity.tree_map(v, torch.clone) for k, v in call.items() if k in wanted}
        flat = [
            t.requires_grad_() for v in leaves.values() for t in (v if isinstance(v, list) else [v])
        ]
        y, _ = functional.lstm(**(call | leaves))
        y.sum().backward()
        assert all(t.grad is not None and bool(t.grad.any()) for t in flat), wanted


REFUSED = {
    "three weights": ({"weights": [torch.zeros(8, 2)] * 3}, "pass one .4H, H. for each direction"),
    "a weight of other rows": ({"weights": [torch.zeros(8, 3)]}, "weights.0. has shape"),
    "gates of one direction": ({"gates": torch.zeros(6, 8)}, "gates has shape"),
    "states of another batch": ({"h0": torch.zeros(2, 5, 2)}, "h0 has shape"),
    "mixed weights": (
        {"weights": [torch.zeros(8, 2), torch.zeros(8, 2).bfloat16()]},
        "use one dtype for both",
    ),
    "no unit": ({"weights": [torch.zeros(0, 0)], "gates": torch.zeros(6, 0)}, "at least one unit"),
    "sequences past the end": (
        {"cu_seqlens": torch.tensor([0, 4, 9], dtype=torch.int32), "max_seqlen": 9},
        "cu_seqlens ends at 9 but there are 6 tokens",
    ),
    "a longer sequence": ({"max_seqlen": 3}, "sequence 0 has 4 tokens but max_seqlen is 3"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input(case):
    changed, sentence = REFUSED[case]
    with pytest.raises((ValueError, TypeError), match=sentence):
        functional.lstm(**(drawn((4, 2), H=2) | changed))
