import pytest
import torch
from harness import check, compiled, gradcheck, parametrize

from fastbert import functional

SLUG = "layer_norm"


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


def test_from_output_wants_weight_and_bias():
    x = torch.randn(5, 8)
    with pytest.raises(ValueError, match="from_output is set without"):
        functional.layer_norm(x, torch.ones(8), from_output=True)
