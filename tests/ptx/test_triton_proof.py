"""The machine against an independent compiler: kernels that Triton compiles and that are not ours equal torch.

Triton chooses the fragment layouts of mma.sync, ldmatrix and the swizzles itself, so a mistake in the
machine's layouts shows here, even if our CUDA code has the same mistake.
"""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs Triton's compiler")

import triton.language as tl  # noqa: E402

from fastbert import kernels  # noqa: E402
from ptx.host import on_machine  # noqa: E402

if kernels.INTERPRETED:
    pytest.skip("under TRITON_INTERPRET=1 nothing is compiled", allow_module_level=True)


@triton.jit
def softmax_kernel(x_ptr, y_ptr, N: tl.constexpr, BLOCK: tl.constexpr):
    row, cols = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * N + cols, mask=cols < N, other=float("-inf")).to(tl.float32)
    e = tl.exp(x - tl.max(x, 0))
    tl.store(y_ptr + row * N + cols, e / tl.sum(e, 0), mask=cols < N)


@triton.jit
def layernorm_kernel(x_ptr, w_ptr, b_ptr, y_ptr, N: tl.constexpr, BLOCK: tl.constexpr, eps):
    row, cols = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * N + cols, mask=cols < N, other=0.0).to(tl.float32)
    centred = tl.where(cols < N, x - tl.sum(x, 0) / N, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 0) / N + eps)
    w, b = (
        tl.load(w_ptr + cols, mask=cols < N, other=0.0),
        tl.load(b_ptr + cols, mask=cols < N, other=0.0),
    )
    tl.store(y_ptr + row * N + cols, centred * rstd * w + b, mask=cols < N)


@triton.jit
def matmul_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    M,
    N,
    K,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ACC: tl.constexpr,
    STAGES: tl.constexpr,
):
    rows, cols = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    sums = tl.zeros((BM, BN), ACC)
    for k in tl.range(0, K, BK, num_stages=STAGES):
        left = (rows < M)[:, None] & (k + inner < K)[None, :]
        right = (k + inner < K)[:, None] & (cols < N)[None, :]
        a = tl.load(a_ptr + rows[:, None] * K + k + inner[None, :], mask=left, other=0)
        b = tl.load(b_ptr + (k + inner)[:, None] * N + cols[None, :], mask=right, other=0)
        sums = tl.dot(a, b, sums, input_precision="tf32", out_dtype=ACC)
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    tl.store(c_ptr + rows[:, None] * N + cols[None, :], sums, mask=inside)


@triton.jit
def attention_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, S, scale, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    rows, cols, dims = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, D)
    q = tl.load(q_ptr + rows[:, None] * D + dims[None, :], mask=(rows < S)[:, None], other=0.0)
    most, total = tl.full((BM,), float("-inf"), tl.float32), tl.zeros((BM,), tl.float32)
    sums = tl.zeros((BM, D), tl.float32)
    for first in tl.range(0, S, BN, num_stages=2):
        at = (first + cols)[:, None] * D + dims[None, :]
        inside = first + cols < S
        k = tl.load(k_ptr + at, mask=inside[:, None], other=0.0)
        v = tl.load(v_ptr + at, mask=inside[:, None], other=0.0)
        s = tl.where(inside[None, :], tl.dot(q, tl.trans(k)) * scale, float("-inf"))
        now = tl.maximum(most, tl.max(s, 1))
        p, old = tl.exp(s - now[:, None]), tl.exp(most - now)
        total = total * old + tl.sum(p, 1)
        sums = tl.dot(p.to(v.dtype), v, sums * old[:, None])
        most = now
    tl.store(
        o_ptr + rows[:, None] * D + dims[None, :], sums / total[:, None], mask=(rows < S)[:, None]
    )


def count(launches, opcode):
    return sum(launch.counts.instructions[opcode] for launch in launches)


@pytest.mark.parametrize("N", [1, 100, 257])
def test_softmax(N):
    x = 3 * torch.randn(5, N)
    y = torch.empty_like(x)
    with on_machine("triton"):
        softmax_kernel[(5,)](x, y, N, triton.next_power_of_2(N), num_warps=2)
    torch.testing.assert_close(y, x.softmax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layernorm(dtype):
    x, w, b = torch.randn(7, 200).to(dtype), torch.randn(200), torch.randn(200)
    y = torch.empty(7, 200)
    with on_machine("triton"):
        layernorm_kernel[(7,)](x, w, b, y, 200, 256, 1e-5, num_warps=4)
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(x.float(), (200,), w, b))


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int8])
def test_matmul(dtype, stages):
    """No size is a multiple of its tile; mma on fp16, bf16, tf32 and int8."""
    M, N, K = 70, 48, 112
    if dtype == torch.int8:
        a, b = (torch.randint(-128, 128, s, dtype=dtype) for s in ((M, K), (K, N)))
    else:
        a, b = torch.randn(M, K).to(dtype), torch.randn(K, N).to(dtype)
    integer = dtype == torch.int8
    c = torch.empty(M, N, dtype=torch.int32 if integer else torch.float32)
    with on_machine("triton") as launches:
        grid = (triton.cdiv(M, 64), triton.cdiv(N, 32))
        acc = tl.int32 if integer else tl.float32
        matmul_kernel[grid](a, b, c, M, N, K, 64, 32, 32, acc, stages, num_warps=4)
    assert count(launches, "mma") > 0
    assert stages == 1 or count(launches, "cp.async") > 0
    # tf32 keeps 10 bits of each factor
    within = (
        {"rtol": 0, "atol": 0}
        if integer
        else {"rtol": 1e-3, "atol": 0.03}
        if dtype == torch.float32
        else {}
    )
    truth = a.double() @ b.double()
    torch.testing.assert_close(c, truth.to(c.dtype), **within)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("warps", [2, 4])
def test_attention(dtype, warps):
    S, D = 75, 32
    q, k, v = (torch.randn(S, D).to(dtype) for _ in range(3))
    o = torch.empty(S, D)
    with on_machine("triton") as launches:
        attention_kernel[(triton.cdiv(S, 32),)](q, k, v, o, S, D**-0.5, D, 32, 32, num_warps=warps)
    assert count(launches, "ldmatrix") > 0
    truth = torch.nn.functional.scaled_dot_product_attention(*(t.float()[None] for t in (q, k, v)))
    torch.testing.assert_close(o, truth[0], rtol=2e-2, atol=2e-2)


def test_a_wrong_layout_would_show(monkeypatch):
    """The tests above can fail: with two rows of a fragment exchanged in the machine the products differ."""
    import numpy as np

    from ptx import warp

    a, b, c = torch.randn(64, 32).half(), torch.randn(32, 32).half(), torch.empty(64, 32)
    monkeypatch.setattr(warp, "GROUP", np.array([1, 0, *range(2, 8)]).repeat(4))
    with on_machine("triton"):
        matmul_kernel[(1, 1)](a, b, c, 64, 32, 32, 64, 32, 32, tl.float32, 1, num_warps=4)
    assert not torch.allclose(c, a.float() @ b.float(), rtol=0.1, atol=0.1)
