import pytest
import torch
from harness import check, compiled, gradcheck, parametrize

from fastbert import functional

SLUG = "mlm_loss"


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
    # finding the labelled rows is the one permitted break: a graph without it needs `rows` or `compacted`
    compiled(SLUG, "torch", lambda sample: sample in ("rows", "compacted"))
