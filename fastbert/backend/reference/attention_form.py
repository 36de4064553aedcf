"""What a call of attention says beside its scale: heads, window, rotary positions, biases of relative positions.

Rotary positions turn pairs of a head's elements by angles that grow with the position (Su et al. 2021, RoFormer). With
c and s the cosine and sine of position i and pair d:
    y_a = c x_a - s x_b,  y_b = c x_b + s x_a
The pair (a, b) is (d, d + R / 2), or (2 d, 2 d + 1) with `pairs`. Elements from R on stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Rotary:
    """The rotary positions of a call of `attention`: cosines and sines of every position, which get no gradient.

    `table` is (P, 2, R / 2) fp32; position i of a sequence reads row i, and P is at least the longest sequence. The
    first R elements of a head are turned, R even. `pairs`: neighbours are turned together, not the two halves of R.
    """

    table: Tensor
    pairs: bool = False

    @classmethod
    def of(
        cls,
        positions: int,
        dims: int,
        theta: float = 10000.0,
        *,
        pairs: bool = False,
        device: str | torch.device | None = None,
    ) -> Rotary:
        """Angles i theta^(-2 d / dims) for `positions` positions and `dims` elements of a head.

        Raises ValueError for a negative number of positions, dims that are odd or below 2, and a theta of 0 or less.
        """
        if positions < 0 or dims < 2 or dims % 2 or not theta > 0:
            raise ValueError(
                f"positions={positions}, dims={dims}, theta={theta}: positions must be at least 0, dims even and at "
                "least 2, theta above 0"
            )
        steps = torch.arange(0, dims, 2, device=device, dtype=torch.float32)
        return cls.of_rates(1.0 / theta ** (steps / dims), positions, pairs=pairs)

    @classmethod
    def of_rates(
        cls,
        rates: Tensor,  # (R / 2,)
        positions: int,
        *,
        factor: float = 1.0,
        pairs: bool = False,
    ) -> Rotary:
        """Angles i rates[d], with cosines and sines times `factor`, such as a transformers module's inv_freq gives."""
        places = torch.arange(positions, device=rates.device, dtype=torch.float32)
        angles = places[:, None] * rates.float()
        return cls(torch.stack([angles.cos(), angles.sin()], 1) * factor, pairs)


def rotate(
    x: Tensor,  # (..., L, D)
    table: Tensor,  # (P, 2, R / 2), P >= L
    pairs: bool,
    back: bool = False,
) -> Tensor:
    """x with row i turned by position i, or turned back."""
    c, s = table[: x.shape[-2]].to(x.dtype).unbind(1)  # each (L, R / 2)
    s = -s if back else s
    half = table.shape[2]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    a, b = turned.unflatten(-1, (half, 2) if pairs else (2, half)).unbind(-1 if pairs else -2)
    y = torch.stack([a * c - b * s, b * c + a * s], -1 if pairs else -2)
    return torch.cat([y.flatten(-2), rest], -1)


def sizes(qkv: Tensor, kv_heads: int) -> tuple[int, int, int]:
    """The number of query heads H, that of key heads, and D, of qkv (T, 3, H, D) or (T, H + 2 kv_heads, D)."""
    D = qkv.shape[-1]
    heads = qkv.shape[1] if qkv.dim() == 3 else 3 * qkv.shape[2]
    return heads - 2 * kv_heads, kv_heads, D


def split(qkv: Tensor, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q (L, H, D), k and v (L, kv_heads, D)."""
    H, _, _ = sizes(qkv, kv_heads)
    q, k, v = qkv.flatten(1, -2).split([H, kv_heads, kv_heads], 1)
    return q, k, v


def hidden_keys(queries: Tensor, keys: Tensor, left: int, right: int) -> Tensor | None:
    """(Q, K) bool, True where the window hides the key from the query; None where it hides none."""
    if left < 0 and right < 0:
        return None
    distance = keys[None, :] - queries[:, None]
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if left >= 0:
        hidden = hidden | (distance < -left)
    return hidden | (distance > right) if right >= 0 else hidden


def biases(bias: Tensor, L: int) -> Tensor:
    """The table (H, 2 P - 1) spread to scores (H, L, L): of key j for query i it is bias[:, j - i + P - 1]."""
    places = torch.arange(L, device=bias.device)
    return bias[:, places[None, :] - places[:, None] + bias.shape[1] // 2]


def diagonal_sums(x: Tensor, width: int) -> Tensor:
    """(H, L, L) -> (H, width = 2 P - 1): element j - i + P - 1 is the sum of x[:, i, j]; deterministic."""
    L = x.shape[1]
    sums = x.flatten(1)
    if L > 1:
        # in rows of 2 L - 1 elements, row i of x begins at column L - 1 - i: at i (2 L - 2) + L - 1 in all
        flat = pad(pad(x, (0, L - 2)).flatten(1), (L - 1, 1))
        sums = flat.unflatten(1, (L, 2 * L - 1)).sum(1)
    return pad(sums, ((width - 2 * L + 1) // 2,) * 2)


def bounds(window: tuple[int, int] | None, causal: bool) -> tuple[int, int]:
    """The numbers of keys that a query sees before and behind itself; -1 stands for all."""
    left, right = (-1, -1) if window is None else window
    return left, 0 if causal else right
