import pytest
import torch
from harness import check, compiled, gradcheck, parametrize

from fastbert import functional

SLUG = "rms_norm"


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_default_eps_is_that_of_torch(dtype):
    """Rows that are small beside eps: another default would change them."""
    x = (torch.randn(5, 8) * 2**-12).to(dtype)
    expected = torch.nn.functional.rms_norm(x, (8,))
    torch.testing.assert_close(functional.rms_norm(x), expected, rtol=1e-2, atol=0)
