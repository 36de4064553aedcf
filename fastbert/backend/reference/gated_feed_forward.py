"""gated_feed_forward: y = (act(x wa^T + ba) * (x wg^T + bg)) w2^T + b2 (Shazeer 2020: GEGLU and SwiGLU)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastbert.backend.reference import bias_gelu, linear
from fastbert.backend.reference.layer_norm import widen
from fastbert.backend.reference.samples import Cost, Draw, Sample, low_precision, nbytes

# the values of bias_gelu's `approximate`
_GELUS = {"gelu": "none", "gelu_tanh": "tanh"}


def unsupported(*args: object) -> str | None:
    """The reference runs every call."""
    return None


def _joined(parts: Sequence[Tensor]) -> Tensor | None:
    return torch.cat(list(parts)) if parts else None


def _act(a: Tensor, activation: str) -> Tensor:
    """gelu(a), exact or by tanh, or silu(a) = a sigmoid(a)."""
    if activation == "silu":
        return a * torch.sigmoid(a)
    return bias_gelu.forward(a, None, _GELUS[activation])


def _act_backward(dy: Tensor, a: Tensor, activation: str) -> Tensor:
    """dy act'(a); silu'(a) = s + a s (1 - s) with s = sigmoid(a)."""
    if activation == "silu":
        s = torch.sigmoid(a)
        return dy * (s + a * s * (1 - s))
    return bias_gelu.backward(dy, a, None, _GELUS[activation])[0]


def forward(
    x: Tensor,  # (T, C)
    w1: Sequence[Tensor],  # [(2F, C)] or 2 of (F, C): the activated half, then the other
    b1: Sequence[Tensor],  # likewise, or empty
    w2: Tensor,  # (C, F)
    b2: Tensor | None,  # (C,)
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """y (T, C) and the pre-activations u = [a, g] (T, 2F) in x's dtype, u empty without `save`."""
    u = linear.forward(*widen(x, _joined(w1), _joined(b1)))
    a, g = u.chunk(2, 1)
    y = linear.forward(_act(a, activation) * g, *widen(w2, b2))
    return y.to(x.dtype), u.to(x.dtype) if save else x.new_empty(0, u.shape[1])


def backward(
    dy: Tensor,  # (T, C)
    x: Tensor,  # (T, C)
    u: Tensor,  # (T, 2F)
    w1: Sequence[Tensor],
    w2: Tensor,
    activation: str,
    needs: Sequence[bool],  # for x, w1, b1, w2, b2
    dtype: torch.dtype,  # of dw1 and dw2
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dw1 (2F, C), db1 (2F,), dw2, db2, empty where not needed; act(a) * g is built again from u."""
    wide_dy, wide_u, wide_x = widen(dy, u, x)
    a, g = wide_u.chunk(2, 1)
    h = _act(a, activation)
    dh, dw2, db2 = linear.backward(wide_dy, h * g, w2, [True, *needs[3:]], dtype)
    du = torch.cat([_act_backward(dh * g, a, activation), dh * h], 1)
    dx, dw1, db1 = linear.backward(du, wide_x, torch.cat(list(w1)), needs[:3], dtype)
    return dx.to(x.dtype), dw1, db1, dw2, db2


def eager(
    x: Tensor,
    w1: Sequence[Tensor],
    b1: Sequence[Tensor] | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str = "gelu",
) -> Tensor:
    """Stock ops in the tested dtype."""
    a, g = linear.eager(x, torch.cat(list(w1)), _joined(b1 or [])).chunk(2, -1)
    if activation == "silu":
        a = torch.nn.functional.silu(a)
    else:
        a = bias_gelu.eager(a, None, _GELUS[activation])
    return linear.eager(a * g, w2, b2)


def sample_inputs(
    dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0
) -> Iterator[Sample]:
    """Calls of `functional.gated_feed_forward`."""
    draw = Draw(dtype, device, seed)

    def call(
        T: int,
        C: int,
        F: int,
        parts: int = 1,
        bias: bool = True,
        weights: torch.dtype | None = None,
        activation: str = "gelu",
    ) -> dict:
        rows = 2 * F // parts
        return {
            "x": draw.normal(T, C),
            "w1": [draw.normal(rows, C, scale=C**-0.5, dtype=weights) for _ in range(parts)],
            "b1": [draw.normal(rows, dtype=weights) for _ in range(parts)] if bias else None,
            "w2": draw.normal(C, F, scale=F**-0.5, dtype=weights),
            "b2": draw.normal(C, dtype=weights) if bias else None,
            "activation": activation,
        }

    yield Sample("T1-C1-F1", call(1, 1, 1), "one element")
    yield Sample("T5-C7-F11-split", call(5, 7, 11, 2), "primes, two weights")
    yield Sample("T5-C8-F16-tanh", call(5, 8, 16, activation="gelu_tanh"), "the tanh form")
    yield Sample("T7-C9-F13-silu", call(7, 9, 13, 2, activation="silu"), "SwiGLU")
    yield Sample("T33-C192-F288", call(33, 192, 288, bias=False), "a small ModernBERT")
    yield Sample(
        "T35-C96-F256-silu", call(35, 96, 256, 2, False, activation="silu"), "a small EuroBERT"
    )
    yield Sample("T67-C16-F24", call(67, 16, 24, 2), "more tokens than Triton's own GEMM takes")
    yield Sample("nobias", call(13, 20, 12, bias=False), "no biases")
    yield Sample("T0-C8-F16", call(0, 8, 16), "empty")
    leading = call(6, 16, 3)
    yield Sample("leading", leading | {"x": leading["x"].view(2, 3, 16)}, "leading dimensions")
    strided = call(6, 16, 5, 2, bias=False)
    strided["x"] = strided["x"].t().contiguous().t()
    strided["w1"] = list(draw.normal(10, 16, scale=0.25).split(5))
    yield Sample("strided", strided, "x is not contiguous, both weights side by side in memory")
    if low_precision(dtype):
        yield Sample("mixed", call(9, 32, 48, 2, weights=torch.float32), "fp32 weights")


def cost(
    x: Tensor,
    w1: Sequence[Tensor],
    b1: Sequence[Tensor] | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str = "gelu",
) -> Cost:
    """Two GEMMs forward, four backward; the activation between them is written and read once."""
    rows, size = x.numel() // max(x.shape[-1], 1), x.element_size()
    F, out = w2.shape[1], rows * w2.shape[0] * size
    flops = 2 * rows * (sum(w.numel() for w in w1) + w2.numel())
    read = nbytes(x, *w1, *(b1 or []), w2, b2)
    return Cost(
        read + out + 2 * rows * F * size,
        flops + 12 * rows * F,
        2 * read + out + 8 * rows * F * size,
        2 * flops + 24 * rows * F,
    )
