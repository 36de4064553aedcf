import pytest
import torch
from harness import check, compiled, gradcheck, instruction_set, parametrize, short

from fastbert import functional
from fastbert.backend import chooser, cpu

SLUG = "gated_feed_forward"


@parametrize(SLUG)
def test_forward(name, sample, dtype):
    check(SLUG, name, sample, dtype, backward=False)


@parametrize(SLUG)
def test_backward(name, sample, dtype):
    check(SLUG, name, sample, dtype, backward=True)


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_gradcheck(name):
    gradcheck(SLUG, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_compile(dtype):
    compiled(SLUG, "torch", dtype=dtype)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_one_weight_is_two_side_by_side(activation):
    """The activated half comes first: in `chunk`'s order, as in ModernBERT, and as the first of two weights."""
    x, w1, b1, w2 = torch.randn(5, 8), torch.randn(12, 8), torch.randn(12), torch.randn(8, 6)
    a, g = torch.nn.functional.linear(x, w1, b1).chunk(2, -1)
    act = {
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda a: torch.nn.functional.gelu(a, approximate="tanh"),
        "silu": torch.nn.functional.silu,
    }[activation]
    one = functional.gated_feed_forward(x, [w1], [b1], w2, None, activation)
    two = functional.gated_feed_forward(x, w1.chunk(2), b1.chunk(2), w2, None, activation)
    assert one.equal(two)
    torch.testing.assert_close(one, (act(a) * g) @ w2.t(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_no_features(backward):
    """Without a feature the result is the last bias."""
    x, w1, w2 = torch.randn(5, 8, requires_grad=backward), torch.randn(0, 8), torch.randn(3, 0)
    bias = torch.randn(3)
    for name in chooser.order("cpu"):
        with chooser.use(name):
            y = functional.gated_feed_forward(x, [w1, w1], None, w2, bias)
        assert y.equal(bias.expand(5, -1))
        if backward:
            y.sum().backward()
            assert x.grad.eq(0).all()


@pytest.mark.skipif(cpu.native is None, reason=str(cpu.unavailable))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("isa", cpu.native.isas() if cpu.native else [])
def test_a_packed_weight_gives_the_same_bits(isa, dtype):
    """For inference on prepacked weights: K of several slices, features that fill no vector, NaN in fresh memory."""
    T, C, F, native, kind = 37, 301, 53, cpu.native, cpu.DTYPES[dtype]
    x, (wa, wg), bias = torch.randn(T, C).to(dtype), torch.randn(2, F, C), torch.randn(2 * F)
    h, again = (torch.full((T, F), float("nan"), dtype=dtype) for _ in range(2))
    with instruction_set(isa):
        packed = torch.full([native.gated_feed_forward_packed_size(kind, F, C)], float("nan"))
        halves, threads = (wa.data_ptr(), wg.data_ptr()), torch.get_num_threads()
        native.gated_feed_forward_pack(kind, 0, *halves, packed.data_ptr(), F, C, threads)
        for out, given in ((h, (*halves, 0)), (again, (0, 0, packed.data_ptr()))):
            inputs = (x.data_ptr(), *given, bias.data_ptr(), 0, out.data_ptr())
            native.gated_feed_forward_up(kind, 0, 3, *inputs, T, F, C, threads)
    a, g = (x.float() @ w.t() + b for w, b in zip((wa, wg), bias.chunk(2), strict=True))
    assert again.equal(h)
    expected = torch.nn.functional.silu(a) * g
    assert (h.float() - expected).norm() <= expected.norm() * (
        1e-2 if dtype.itemsize == 2 else 1e-5
    )
