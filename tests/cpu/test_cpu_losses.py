"""bias_gelu and cross_entropy on the native kernels: threads, tails, confident rows, infinities, the in-place entry."""

import pytest
import torch

from fastbert.backend import cpu

if cpu.native is None:
    pytest.skip(str(cpu.unavailable), allow_module_level=True)

from fastbert.backend.cpu import bias_gelu, cross_entropy
from fastbert.backend.reference import cross_entropy as reference

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
IGNORED = -100
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True, params=cpu.native.isas())
def _isa(request):
    """Every test runs once per instruction set."""
    before = cpu.native.isa()
    cpu.native.use_isa(request.param)
    yield
    cpu.native.use_isa(before)


def inplace(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Loss, lse and p - onehot, which overwrites a copy of the logits."""
    grad = logits.clone()
    loss, lse = torch.full((2, len(labels)), NAN).unbind()
    cpu.native.cross_entropy_inplace(
        cpu.DTYPES[logits.dtype],
        grad.data_ptr(),
        labels.data_ptr(),
        loss.data_ptr(),
        lse.data_ptr(),
        *logits.shape,
        IGNORED,
        torch.get_num_threads(),
    )
    return loss, lse, grad


def both(logits: torch.Tensor, labels: torch.Tensor, module=cross_entropy) -> tuple:
    """Loss, and p - onehot by a backward with ones."""
    loss, lse = module.forward(logits, labels, IGNORED)
    return loss, module.backward(torch.ones_like(loss), logits, labels, lse, IGNORED)


def over_threads(call):
    """The result of call(), after it is bitwise equal with 1, 2, 3 and 8 threads."""
    before = torch.get_num_threads()
    outputs = []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            outputs.append(call())
    finally:
        torch.set_num_threads(before)
    for other in outputs[1:]:
        for first, second in zip(outputs[0], other, strict=True):
            assert torch.equal(first, second)


@DTYPES
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_bias_gelu_does_not_depend_on_the_thread_count(dtype, approximate):
    # partitions of unequal length, columns that end in a part of a vector
    x, dy = torch.randn(2, 331, 397).to(dtype).unbind()
    bias = torch.randn(397)
    over_threads(
        lambda: (
            bias_gelu.forward(x, bias, approximate),
            *bias_gelu.backward(dy, x, bias, approximate),
        )
    )


@DTYPES
def test_cross_entropy_does_not_depend_on_the_thread_count(dtype):
    logits = torch.randn(67, 3001).to(dtype)
    labels = torch.randint(0, 3001, (67,))
    labels[::3] = IGNORED
    over_threads(lambda: (*both(logits, labels), *inplace(logits, labels)))


@DTYPES
@pytest.mark.parametrize("V", [1, 2, 3, 5, 8, 15, 17, 31, 33, 63, 1023, 1024, 1025, 2050, 5000])
def test_in_place_is_forward_and_backward(V, dtype):
    logits = (3 * torch.randn(6, V)).to(dtype)
    labels = torch.tensor([0, V - 1, V // 2, IGNORED, 0, V - 1])
    loss, lse, grad = inplace(logits, labels)
    expected, expected_grad = both(logits, labels)
    assert torch.equal(loss, expected)
    assert torch.equal(grad, expected_grad)
    truth, truth_grad = both(logits.double(), labels, reference)
    kept = labels != IGNORED
    assert (loss - truth).abs().max() < 2e-6 * (1 + truth.abs().max())
    assert (lse - logits.double().logsumexp(-1))[kept].abs().max() < 2e-6 * (1 + lse.abs().max())
    # half a unit of bf16's last place for values up to 1
    close = 1e-6 if dtype == torch.float32 else 2**-9
    assert (grad.double() - truth_grad).abs().max() <= close


def test_a_maximum_that_rises_in_every_block():
    # each block of 1024 logits lies 40 above the one before it; in the second row below it
    logits = torch.randn(2, 4 * 1024) + 40 * torch.arange(4).repeat_interleave(1024)
    logits[1] = logits[1].flip(0)
    labels = torch.tensor([5, 5])
    loss, _, grad = inplace(logits, labels)
    truth, truth_grad = both(logits.double(), labels, reference)
    assert torch.allclose(loss.double(), truth, rtol=1e-6)
    assert (grad.double() - truth_grad).abs().max() < 1e-6


def test_confident_rows_keep_their_digits():
    # losses from 1e-2 down to 1e-18; at logits of this size lse has an error of 1e-5
    margin = torch.arange(12.0, 50.0, 2.0)
    logits = torch.randn(len(margin), 3000) - 200.0
    labels = torch.arange(len(margin)) * 150
    logits[torch.arange(len(margin)), labels] = margin - 200.0
    rows = torch.arange(len(margin))
    loss, grad = both(logits, labels)
    # 1 - p in fp64 from the other classes: the reference's p - 1 has the rounding error of a number near 1
    others = (logits.double() - logits[rows, labels].double()[:, None]).exp()
    others[rows, labels] = 0.0
    rest = others.sum(1)
    assert torch.allclose(loss.double(), rest.log1p(), rtol=1e-6, atol=0.0)
    assert torch.allclose(grad[rows, labels].double(), -rest / (1 + rest), rtol=1e-6, atol=0.0)
    grad[rows, labels] = 0.0
    assert torch.allclose(grad.double(), others / (1 + rest)[:, None], rtol=1e-6, atol=0.0)


@DTYPES
def test_ignored_rows_are_zero_whatever_they_hold(dtype):
    logits = torch.randn(4, 100, dtype=dtype)
    logits[1, 3], logits[2, 5], logits[3] = INF, NAN, -INF
    labels = torch.tensor([7, IGNORED, IGNORED, IGNORED])
    for loss, grad in (both(logits, labels), inplace(logits, labels)[::2]):
        assert torch.equal(loss[1:], torch.zeros(3))
        assert torch.equal(grad[1:], torch.zeros(3, 100, dtype=dtype))
        assert loss[0].isfinite()


@DTYPES
@pytest.mark.parametrize("column", [0, 7, 1500, 2999])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_infinities_and_nan_stand_where_the_reference_has_them(value, column, dtype):
    logits = torch.randn(2, 3000, dtype=dtype)
    logits[:, column] = value
    labels = torch.tensor([column, 100])
    loss, grad = both(logits, labels)
    truth, truth_grad = both(logits.double(), labels, reference)
    assert torch.equal(loss.isnan(), truth.isnan())
    assert torch.equal(loss.isinf(), truth.isinf())
    assert torch.equal(grad.isnan(), truth_grad.isnan())


def test_masked_classes_get_exactly_nothing():
    # a first block of -inf alone, then finite logits below 0
    logits = torch.randn(1, 3000) - 200.0
    logits[0, :1500] = -INF
    loss, grad = both(logits, torch.tensor([2000]))
    assert loss.isfinite()
    assert (grad[0, :1500] == 0).all()
    loss, grad = both(torch.full((1, 3000), -INF), torch.tensor([0]))
    assert loss.isnan()
    assert grad.isnan().all()


@pytest.mark.parametrize("label", [-1, 50, 2**40])
def test_a_label_out_of_range_gives_nan_and_reads_nothing(label):
    logits = torch.randn(2, 50)
    loss, _, grad = inplace(logits, torch.tensor([label, 3]))
    assert loss[0].isnan()
    assert grad[0].isnan().all()
    assert loss[1].isfinite()
    assert grad[1].isfinite().all()


def test_labels_may_be_int32():
    logits, labels = torch.randn(9, 70), torch.randint(0, 70, (9,))
    for a, b in zip(both(logits, labels), both(logits, labels.int()), strict=True):
        assert torch.equal(a, b)


def test_bf16_gelu_adds_the_bias_in_fp32():
    x, bias = torch.full((1, 40), 256.0, dtype=torch.bfloat16), torch.full((40,), -255.5)
    y = bias_gelu.forward(x, bias, "none")
    # in bf16 the bias rounds to -256, and gelu(0) = 0
    assert torch.equal(y, torch.nn.functional.gelu(torch.full((1, 40), 0.5)).bfloat16())


@DTYPES
def test_dbias_sums_what_dx_rounds(dtype):
    x, dy = torch.randn(2, 1000, 20).to(dtype).unbind()
    dx, dbias = bias_gelu.backward(dy, x, torch.zeros(20), "none")
    pre = x.double().requires_grad_()
    (truth,) = torch.autograd.grad(torch.nn.functional.gelu(pre), pre, dy.double())
    assert (dx.double() - truth).abs().max() < 4 * torch.finfo(dtype).eps * truth.abs().max()
    assert (dbias.double() - truth.sum(0)).abs().max() < 1e-4


def test_no_bias_gives_no_dbias():
    x = torch.randn(3, 5)
    dx, dbias = bias_gelu.backward(torch.ones(3, 5), x, None, "none")
    assert dbias.shape == (0,)
    zeros = torch.zeros(5)
    assert torch.equal(dx, bias_gelu.backward(torch.ones(3, 5), x, zeros, "none")[0])
    assert torch.equal(bias_gelu.forward(x, None, "none"), bias_gelu.forward(x, zeros, "none"))
