import numpy as np
import pytest
import torch
from harness import backends, check, compiled, instruction_set, parametrize, short

from fastbert import functional
from fastbert.backend import chooser
from fastbert.backend.reference.linear_int8 import LEVELS, quantize_weight

SLUG = "linear_int8"
EVERY = pytest.mark.parametrize("name", backends(SLUG))
BITS = pytest.mark.parametrize("bits", [12, 8])


@parametrize(SLUG)
def test_forward(name, sample, dtype):
    check(SLUG, name, sample, dtype, backward=False)


@parametrize(SLUG)
def test_backward(name, sample, dtype):
    check(SLUG, name, sample, dtype, backward=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_compile(dtype):
    compiled(SLUG, "torch", dtype=dtype)


def run(name, x, weight, scale, bias=None, bits=12):
    """The op on this backend, cpu/<set> for an instruction set; a call that it does not take is a skip."""
    name, _, isa = name.partition("/")
    device = chooser.device_of(name)
    given = [t if t is None else t.to(device) for t in (x, weight, scale, bias)]
    try:
        with chooser.use(name), instruction_set(isa):
            return functional.linear_int8(*given, bits).cpu()
    except chooser.Unsupported as reason:
        pytest.skip(str(reason))


def integers(x, bits):
    """q (T, K) int64 and a (T,) fp32 of x (T, K) fp32, by numpy."""
    x = x.numpy()
    m, levels = np.abs(x).max(1, keepdims=True), np.float32(LEVELS[bits])
    q = np.rint(x * (levels / m)).astype(np.int64)
    assert np.abs(q).max() <= LEVELS[bits]
    return torch.from_numpy(q), torch.from_numpy((m / levels)[:, 0])


def drawn(T, K, N, seed=0):
    """x (T, K), a weight (N, K) int8 and its scales (N,), all random."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-127, 128, (N, K), generator=generator).to(torch.int8)
    scale = torch.rand(N, generator=generator) + 0.5
    return torch.randn(T, K, generator=generator), weight, scale


@EVERY
@BITS
@pytest.mark.parametrize("K", [1, 2, 31, 33, 64, 257, 768, 3073])
def test_the_law_to_the_last_bit(name, K, bits):
    """Without a bias nothing can be fused: every backend rounds in the same places."""
    x, weight, scale = drawn(5, K, 37)
    q, a = integers(x, bits)
    expected = (q @ weight.long().t()).float() * a[:, None] * scale
    assert torch.equal(run(name, x, weight, scale, bits=bits), expected)


@BITS
@pytest.mark.parametrize("name", [n for n in backends(SLUG) if n.startswith("cpu")])
def test_every_set_rounds_before_it_adds_the_bias(name, bits):
    x, weight, scale = drawn(9, 129, 37)
    bias = torch.randn(37)
    q, a = integers(x, bits)
    expected = (q @ weight.long().t()).float() * a[:, None] * scale + bias
    assert torch.equal(run(name, x, weight, scale, bias, bits), expected)


@EVERY
@BITS
@pytest.mark.parametrize("kind", ["random", "largest", "negative", "alternating"])
def test_sums_are_those_of_int64(name, bits, kind):
    """x has integers and the largest one in each row: a is 1, and y is the sum itself."""
    largest, T, K, N = LEVELS[bits], 3, 8260, 5
    if kind == "random":
        _, weight, _ = drawn(T, K, N)
        x = torch.randint(-largest, largest + 1, (T, K)).float()
        x[:, 17] = largest
    else:
        sign = torch.ones(K)
        sign[1::2] = -1 if kind == "alternating" else 1
        # the largest and the smallest sums: of products of one sign
        x = (sign * largest * (-1 if kind == "negative" else 1)).repeat(T, 1)
        weight = (127 * sign).to(torch.int8).repeat(N, 1)
        weight[1], weight[2, 1::2] = -weight[0], 0
    sums = x.long() @ weight.long().t()
    assert bool((sums.abs() < 2**31).all())
    found = run(name, x, weight, torch.ones(N), bits=bits)
    assert torch.equal(found, sums.float())


@EVERY
@BITS
def test_a_row_is_the_same_alone_and_in_any_batch(name, bits):
    x, weight, scale = drawn(67, 129, 35)
    bias = torch.randn(35)
    whole = run(name, x, weight, scale, bias, bits)
    for rows in (slice(0, 1), slice(66, 67), slice(5, 12), slice(2, 66)):
        assert torch.equal(run(name, x[rows], weight, scale, bias, bits), whole[rows]), rows
    # other rows of any size beside them
    padded = torch.cat([x[:9] * 1e6, x[20:31], torch.full((3, 129), float("nan")), 0 * x[:2]])
    assert torch.equal(run(name, padded, weight, scale, bias, bits)[9:20], whole[20:31])


@EVERY
def test_rows_that_are_not_finite_give_nan_and_leave_others_alone(name):
    x, weight, scale = drawn(6, 40, 9)
    bias = torch.randn(9)
    expected = run(name, x, weight, scale, bias)
    expected[1:4] = float("nan")
    x[1, 3], x[2, 39], x[3, 0] = float("nan"), float("inf"), -float("inf")
    found = run(name, x, weight, scale, bias)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


@EVERY
def test_tiny_rows_count_as_zeros(name):
    x, weight, _ = drawn(3, 40, 9)
    x[0] = x[0] / x[0].abs().max() * 2.0**-100
    x[1] = x[1] / x[1].abs().max() * 2.0**-101
    x[2] = 1e-45
    bias = torch.randn(9)
    found = run(name, x, weight, torch.full((9,), 2.0**99), bias)
    assert not torch.equal(found[0], bias)
    assert torch.equal(found[1:], bias.expand(2, 9))


@EVERY
def test_bf16_is_widened_before_and_rounded_after(name):
    x, weight, scale = drawn(5, 70, 33)
    x = x.bfloat16()
    found = run(name, x, weight, scale)
    assert torch.equal(found, run(name, x.float(), weight, scale).bfloat16())


@BITS
def test_the_error_is_half_a_step_of_each_element(bits):
    x, weight, scale = drawn(16, 768, 24)
    y = run("torch", x.double(), weight, scale, bits=bits)
    w = weight.double() * scale.double()[:, None]
    step = x.abs().amax(1, True).double() / LEVELS[bits]
    error, bound = (y - x.double() @ w.t()).abs(), 0.501 * step * w.abs().sum(1)
    assert bool((error <= bound).all())
    # about what independent errors of rounding give
    assert 0.5 < float((error / (step * w.norm(dim=1) / 12**0.5)).square().mean().sqrt()) < 2


def test_gradients_take_the_rounding_as_the_identity():
    x, weight, scale = drawn(7, 13, 5)
    bias = torch.zeros(5)
    for t in (x, scale, bias):
        t.requires_grad_()
    dy = torch.randn(7, 5)
    functional.linear_int8(x, weight, scale, bias).backward(dy)
    torch.testing.assert_close(x.grad, (dy * scale.detach()) @ weight.float())
    torch.testing.assert_close(bias.grad, dy.sum(0))
    assert scale.grad is None


def test_a_weight_is_rounded_by_rows():
    w = torch.randn(40, 33)
    w[3], w[4], w[5] = 0.0, 1e-43, w[5] * 1e30
    # ties go to the even number
    w[6, :4] = torch.tensor([127.0, 0.5, 1.5, -2.5])
    w[6, 4:] = 0.0
    q, scale = quantize_weight(w)
    assert (q.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert int(q.min()) >= -127
    largest = w.abs().amax(1)
    assert torch.equal(scale, torch.from_numpy(largest.numpy() / np.float32(127)))
    assert not q[3].any()
    assert float(scale[3]) == 0.0
    assert q[6, :4].tolist() == [127, 0, 2, -2]
    ordinary = largest > 1e-30
    assert bool((q.abs().amax(1)[ordinary] == 127).all())
    error = (q.double() * scale.double()[:, None] - w).abs()
    assert bool((error <= 0.501 * scale.double()[:, None] + 1e-44)[ordinary].all())
    assert torch.equal(quantize_weight(w.bfloat16())[0], quantize_weight(w.bfloat16().float())[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(bad):
    w = torch.randn(6, 4)
    w[4, 1] = w[2, 3] = bad
    with pytest.raises(ValueError, match=r"row 2 of the weight .* not finite"):
        quantize_weight(w)


def test_sums_that_could_leave_32_bits_are_refused():
    for bits, most in ((12, 8260), (8, 133144)):
        x, weight = torch.ones(1, most), torch.full((1, most), 127).to(torch.int8)
        scale = torch.ones(1)
        y = functional.linear_int8(x, weight, scale, bits=bits)
        assert float(y) == pytest.approx(127 * most, rel=1e-6)
        wider = torch.nn.functional.pad(x, (0, 1)), torch.nn.functional.pad(weight, (0, 1))
        with pytest.raises(ValueError, match=f"x has {most + 1} columns: .* up to {most}, use"):
            functional.linear_int8(*wider, scale, bits=bits)


@EVERY
@BITS
def test_sums_with_the_lowest_integer(name, bits):
    """The largest sums with -128, of both signs, up to the number of columns where they fit into 32 bits."""
    largest, most = LEVELS[bits], {12: 8196, 8: 132104}[bits]
    x = torch.full((2, most), float(largest))
    x[1] = -largest
    weight = torch.full((3, most), -128).to(torch.int8)
    weight[1] = 127
    weight[2, ::2] = 127
    sums = x.long() @ weight.long().t()
    assert 2**31 - 128 * largest <= int(sums.abs().max()) < 2**31
    assert torch.equal(run(name, x, weight, torch.ones(3), bits=bits), sums.float())


@BITS
def test_sums_with_the_lowest_integer_that_could_leave_32_bits_are_refused(bits):
    least, most = {12: (8197, 8260), 8: (132105, 133144)}[bits]
    weight = torch.full((2, most), -127).to(torch.int8)
    x, scale = torch.ones(1, most), torch.ones(2)
    y = functional.linear_int8(x, weight, scale, bits=bits)
    assert float(y[0, 0]) == pytest.approx(-127 * most, rel=1e-6)
    weight[1, 5] = -128
    for columns in (least, most):
        given = x[:, :columns], weight[:, :columns], scale
        sentence = f"has the integer -128 and {columns} columns: .* or up to {least - 1} columns"
        with pytest.raises(ValueError, match=sentence):
            functional.linear_int8(*given, bits=bits)
        with pytest.raises(ValueError, match=sentence):
            torch.compile(functional.linear_int8, backend="eager")(*given, bits=bits)
