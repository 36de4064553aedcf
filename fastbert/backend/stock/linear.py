"""linear by torch's GEMMs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def unsupported(*args: object) -> str | None:
    """Stock ops run every call."""
    return None


def cast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias in x's dtype."""
    if weight.dtype != x.dtype:
        weight = weight.to(x.dtype)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    return weight, bias


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The parts stacked on their rows: a view where they already lie side by side in memory, else a copy."""
    first = parts[0]
    if len(parts) == 1:
        return first
    stride = first.numel() * first.element_size()
    storage = first.untyped_storage().data_ptr()
    adjacent = all(
        p.is_contiguous()
        and p.untyped_storage().data_ptr() == storage
        and p.data_ptr() == first.data_ptr() + i * stride
        for i, p in enumerate(parts)
    )
    if adjacent:
        return first.detach().as_strided(
            (len(parts) * first.shape[0], *first.shape[1:]), first.stride()
        )
    return torch.cat(list(parts))


# CUDA's library stores its fp32 sums as fp32 from torch 2.8 on
_WIDE = torch.version.cuda is not None and "dtype" in torch.ops.aten.mm.overloads()


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in this dtype, rounded once where the library can."""
    low = a.dtype in (torch.bfloat16, torch.float16)
    if _WIDE and a.is_cuda and low and dtype == torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def forward(
    x: Tensor,  # (T, K)
    weight: Tensor,  # (N, K)
    bias: Tensor | None,  # (N,)
) -> Tensor:
    """y (T, N) in x's dtype."""
    return torch.nn.functional.linear(x, *cast(x, weight, bias))


def backward(
    dy: Tensor,  # (T, N)
    x: Tensor,  # (T, K)
    weight: Tensor,  # (N, K)
    needs: Sequence[bool],  # for x, weight, bias
    dtype: torch.dtype,  # of dweight
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (T, K), dweight (N, K), dbias (N,) fp32; empty where not needed."""
    dx = dy @ weight.to(dy.dtype) if needs[0] else dy.new_empty(0)
    dweight = _product(dy.t(), x, dtype) if needs[1] else dy.new_empty(0)
    wide = torch.promote_types(dy.dtype, torch.float32)
    dbias = dy.sum(0, dtype=wide) if needs[2] else dy.new_empty(0)
    return dx, dweight, dbias
