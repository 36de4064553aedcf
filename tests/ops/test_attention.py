import pytest
import torch
from harness import check, compiled, gradcheck, parametrize

from fastbert import functional
from fastbert.backend import chooser, cpu

SLUG = "attention"


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
    # one of each kind of argument
    compiled(SLUG, "torch", lambda name: name in ("S5-3-H2-D4-drop", "tail", "empty", "modern"))


@pytest.mark.parametrize("name", ["reference", "torch", "cpu"])
def test_strided_cu_seqlens(name):
    if name == "cpu" and cpu.unavailable:
        pytest.skip(cpu.unavailable)
    qkv = torch.randn(9, 3, 2, 4)
    cu_seqlens = torch.tensor([[0, 77], [4, 77], [9, 77]], dtype=torch.int32)[:, 0]
    assert not cu_seqlens.is_contiguous()
    with chooser.use(name):
        found = functional.attention(qkv, cu_seqlens, 5)
        assert torch.equal(found, functional.attention(qkv, cu_seqlens.contiguous(), 5))
