"""rope: rotary positions, which turn pairs of a head's elements by angles that grow with the position.

Su et al. 2021 (RoFormer). With c and s the cosine and sine of position i and pair d:
    y_a = c x_a - s x_b,  y_b = c x_b + s x_a
The pair (a, b) is (d, d + R / 2), or (2 d, 2 d + 1) with `pairs`. Elements from R on stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
