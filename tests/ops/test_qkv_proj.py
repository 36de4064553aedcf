import pytest
import torch
from harness import check, compiled, gradcheck, parametrize, short

SLUG = "qkv_proj"


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
