import pytest
import torch
from harness import check, compiled, gradcheck, parametrize

from fastbert import functional
from fastbert.integrations.memory import saved_bytes

SLUG = "dropout_add_layer_norm"


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
    compiled(SLUG, "torch")


def test_the_output_is_kept_instead_of_the_sum():
    """Backward needs no tensor of the size of x but the output. A weight of 0 gives no NaN."""
    x, residual = (torch.randn(50, 24, requires_grad=True) for _ in range(2))
    weight, bias = torch.ones(24, requires_grad=True), torch.zeros(24, requires_grad=True)

    def saved(**options):
        call = functional.dropout_add_layer_norm
        return saved_bytes(lambda: call(x, residual, weight, bias, **options), [weight, bias])

    assert saved() == saved(from_output=True) == x.nbytes + 2 * 50 * 4
    with torch.no_grad():
        weight[3] = 0
    y = functional.dropout_add_layer_norm(x, residual, weight, bias, from_output=True)
    y.square().sum().backward()
    assert x.grad.isfinite().all()
    assert weight.grad.isfinite().all()
