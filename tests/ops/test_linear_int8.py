import pytest
import torch
from harness import check, compiled, parametrize, short

SLUG = "linear_int8"


@parametrize(SLUG)
def test_forward(name, sample, dtype):
    check(SLUG, name, sample, dtype, backward=False)


@parametrize(SLUG)
def test_backward(name, sample, dtype):
    check(SLUG, name, sample, dtype, backward=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_compile(dtype):
    compiled(SLUG, "torch", dtype=dtype)
