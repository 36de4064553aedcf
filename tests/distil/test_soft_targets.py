"""Soft targets against the formula written out in fp64: values, gradients, chunks, memory, refusals."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastbert.backend import chooser
from fastbert.distil import soft_targets as module
from fastbert.distil.soft_targets import soft_targets, soft_targets_mlm
from fastbert.testing.budget import assert_within_budget

NAMES = ("hidden", "weight", "bias", "teacher_hidden", "teacher_weight", "teacher_bias")


def inputs(rows=37, words=101, width=24, of_teacher=40, dtype=torch.float32):
    """Random arguments of soft_targets_mlm; the student's three require gradients."""
    sizes = ((rows, width), (words, width), (words,))
    sizes += ((rows, of_teacher), (words, of_teacher), (words,))
    drawn = [torch.randn(*s) * (s[-1] ** -0.25 if len(s) > 1 else 0.5) for s in sizes]
    return [t.to(dtype).requires_grad_(i < 3) for i, t in enumerate(drawn)]


def written_out(logits, teacher_logits, temperature):
    """The definition, by softmax and logarithm."""
    p, q = ((z / temperature).softmax(-1) for z in (logits, teacher_logits))
    return temperature**2 * (q * (q.log() - p.log())).sum()


def usual(logits, teacher_logits, temperature):
    """The calls of torch that users write."""
    logs = [(z / temperature).log_softmax(-1) for z in (logits, teacher_logits)]
    return temperature**2 * F.kl_div(*logs, reduction="sum", log_target=True)


def of_decoders(args, temperature, loss=written_out):
    """The loss of the masked LM by torch's operations in the arguments' dtype."""
    logits, teacher_logits = (
        h @ w.t() if b is None else h @ w.t() + b for h, w, b in (args[:3], args[3:])
    )
    return loss(logits, teacher_logits, temperature)


def truth_and_eager(args, low, temperature):
    """(loss, gradients) in fp64, and by torch on `low`."""
    return (
        with_gradients(of_decoders, as_fp64(args), temperature=temperature),
        with_gradients(of_decoders, low, temperature=temperature, loss=usual),
    )


def with_gradients(function, args, **options):
    """The loss, and the gradients of those arguments that require them."""
    loss = function(args, **options)
    return loss, torch.autograd.grad(
        loss * 0.75, [t for t in args if t is not None and t.requires_grad]
    )


def ours(args, **options):
    return soft_targets_mlm(*args, **options)


def as_fp64(args):
    return [t if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in args]


@pytest.mark.parametrize("backend", [None, "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_equals_the_formula(dtype, temperature, backend):
    args = inputs(dtype=dtype)
    truth, eager = truth_and_eager(args, args, temperature)
    with chooser.use(backend):
        loss, grads = with_gradients(ours, args, temperature=temperature)
    assert loss.dtype == torch.float32
    assert_within_budget("loss", loss, truth[0], eager[0])
    for name, argument, *found in zip(NAMES, args, grads, truth[1], eager[1], strict=False):
        assert found[0].dtype == argument.dtype
        assert_within_budget(name, *found)


def test_fp64_equals_the_formula():
    args = inputs(dtype=torch.float64)
    for found in zip(
        with_gradients(ours, args, temperature=2.5),
        with_gradients(of_decoders, args, temperature=2.5),
        strict=True,
    ):
        torch.testing.assert_close(*found, rtol=1e-11, atol=1e-13)


def test_one_row_is_as_exact_as_many():
    """MKL adds up the product of one row and a long column term by term."""
    g, h, weight = torch.rand(16, 30000) - 0.5, torch.randn(16, 32), torch.randn(30000, 32)
    truth = g.double() @ weight.double()

    def error(rows):
        with chooser.use("torch"):
            found = module._linear_gradients(g[:rows], h[:rows], weight, None, [True, False, False])
        return float((found[0] - truth[:rows]).norm() / truth[:rows].norm())

    assert error(1) < 2 * error(16)


def test_gradcheck():
    args = inputs(7, 11, 3, 5, torch.float64)

    def function(*student):
        return soft_targets_mlm(*student, *args[3:], temperature=1.7)

    assert torch.autograd.gradcheck(function, args[:3])
    z, of_teacher = torch.randn(4, 6).double().requires_grad_(), torch.randn(4, 6).double()
    assert torch.autograd.gradcheck(lambda z: soft_targets(z, of_teacher, 1.7), z)


@pytest.mark.parametrize("chunk", [1, 101 * 16, 101 * 36, 101 * 37])
def test_chunks_equal_one_chunk(chunk, monkeypatch):
    args = inputs()
    expected = with_gradients(ours, args, temperature=2.0)
    monkeypatch.setattr(module, "CHUNK", chunk)
    loss, grads = with_gradients(ours, args, temperature=2.0)
    torch.testing.assert_close(loss, expected[0], rtol=1e-6, atol=0.0)
    for a, b in zip(grads, expected[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


class Largest(TorchDispatchMode):
    """Records the largest number of elements of a tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for t in found if isinstance(found, tuple | list) else (found,):
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.numel())
        return found


@pytest.mark.parametrize("backend", [None, "torch"])
def test_makes_no_tensor_of_all_logits(backend, monkeypatch):
    rows, words = 200, 150
    args = inputs(rows, words, 8, 9)
    monkeypatch.setattr(module, "CHUNK", 16 * words)
    with chooser.use(backend), Largest() as seen:
        ours(args).backward()
    # the largest that are left: a chunk's logits, the decoders
    assert seen.elements == 16 * words < rows * words


def test_an_equal_student_has_no_loss():
    args = inputs()
    same = [*args[:3], *(t.detach().clone() for t in args[:3])]
    loss, grads = with_gradients(ours, same)
    assert loss.item() == 0.0
    assert all(g.abs().max() == 0.0 for g in grads)


def test_no_row_is_a_connected_zero():
    for reduction in ("sum", "mean"):
        loss, grads = with_gradients(ours, inputs(rows=0), reduction=reduction)
        assert loss.item() == 0.0
        assert [g.shape for g in grads] == [(0, 24), (101, 24), (101,)]
        assert all((g == 0).all() for g in grads)
    z = torch.zeros(0, 3, requires_grad=True)
    assert torch.equal(torch.autograd.grad(soft_targets(z, z.detach()), z)[0], z)


def test_mean_is_over_rows_and_both_functions_agree():
    args = inputs(dtype=torch.float64)
    logits, of_teacher = (torch.nn.functional.linear(*a) for a in (args[:3], args[3:]))
    expected = soft_targets(logits, of_teacher, 3.0)
    assert torch.allclose(ours(args, temperature=3.0, reduction="mean"), expected)
    assert torch.allclose(expected * 37, soft_targets(logits, of_teacher, 3.0, "sum"))
    assert torch.allclose(expected * 37, written_out(logits, of_teacher, 3.0))
    # any number of leading dimensions: rows are all but the last
    assert torch.allclose(expected, soft_targets(logits[None], of_teacher[None], 3.0))


def test_only_wanted_gradients():
    args = inputs()
    args[2] = args[5] = None
    args[1].requires_grad_(False)
    args[3].requires_grad_()
    loss = ours(args)
    loss.backward()
    assert args[1].grad is None
    assert args[3].grad is None
    expected = torch.autograd.grad(of_decoders(args, 1.0), args[0])[0]
    torch.testing.assert_close(args[0].grad, expected, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        without = ours(args)
    assert not without.requires_grad
    assert without.item() == loss.item()


def test_backward_twice_through_one_graph():
    args = inputs()
    loss = ours(args)
    first = torch.autograd.grad(loss, args[:3], retain_graph=True)
    second = torch.autograd.grad(loss, args[:3])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_autocast_is_as_exact_as_torch():
    args = inputs()
    low = [t.detach().bfloat16().requires_grad_(t.requires_grad) for t in args]
    truth, eager = truth_and_eager(args, low, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradients(ours, args, temperature=1.0)
    assert_within_budget("loss", found[0], truth[0], eager[0])
    for name, argument, *each in zip(NAMES, args, found[1], truth[1], eager[1], strict=False):
        assert each[0].dtype == argument.dtype == torch.float32
        assert_within_budget(name, *each)


def test_second_derivatives_are_refused():
    args = inputs()
    (grad,) = torch.autograd.grad(ours(args), args[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(grad.sum(), args[0])


@pytest.mark.parametrize(
    ("place", "value", "sentence"),
    [
        (4, torch.randn(90, 40), "student's vocabulary has 101 words and the teacher's 90"),
        (3, torch.randn(36, 40), r"teacher_hidden has shape \(36, 40\), expected \(37, -1\)"),
        (1, torch.randn(101, 23), r"weight has shape \(101, 23\), expected \(-1, 24\)"),
        (5, torch.randn(1), r"teacher_bias has shape \(1,\), expected \(101,\)"),
        (0, torch.ones(37, 24).int(), "hidden is torch.int32"),
        (3, torch.randn(37, 40, device="meta"), "teacher_hidden is on meta"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(place, value, sentence):
    args = inputs()
    args[place] = value
    with pytest.raises((ValueError, TypeError), match=sentence):
        ours(args)


def test_settings_that_make_no_sense_are_refused():
    z = torch.randn(2, 3)
    for temperature in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"temperature is {temperature}: pass a number above"):
            soft_targets(z, z, temperature)
        with pytest.raises(ValueError, match="temperature is"):
            ours(inputs(), temperature=temperature)
    with pytest.raises(ValueError, match="reduction is 'none': choose one of mean, sum"):
        ours(inputs(), reduction="none")
    with pytest.raises(ValueError, match=r"logits are \(2, 3\) and the teacher's \(2, 4\)"):
        soft_targets(z, torch.randn(2, 4))
