"""Patches of images on packed rows: the bytes of each patch become a vector, with learned positions in two dimensions.

The form is that of ViT (Dosovitskiy et al. 2021) with rows and columns added, so that one table serves every size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastbert import functional as F
from fastbert.nn.base import Block


class PatchEmbedding(Block):
    """A linear map of a patch's 3 p p bytes + the row's vector + the column's: (P, 3 p p) uint8 -> (P, C).

    Bytes are normalised to [-1, 1]. `sides` is the number of rows of patches, and of columns, in the largest image.
    """

    def __init__(self, patch_size: int, hidden_size: int, sides: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.projection = nn.Linear(3 * patch_size**2, hidden_size)
        self.row = nn.Embedding(sides, hidden_size)
        self.column = nn.Embedding(sides, hidden_size)

    def forward(
        self,
        patches: Tensor,  # (P, 3 p p) uint8, or floating point in [-1, 1]
        places: Tensor,  # (P, 2) int64, row and column
    ) -> Tensor:
        """Raises ValueError for patches of another size."""
        weight = self.projection.weight
        if patches.dim() != 2 or patches.shape[1] != weight.shape[1]:
            raise ValueError(
                f"patches are {tuple(patches.shape)}: pass (P, {weight.shape[1]}), bytes of {self.patch_size} x "
                f"{self.patch_size} pixels of 3 colours"
            )
        if not patches.is_floating_point():
            patches = normalised(patches, weight.dtype)
        x = F.linear(patches, weight, self.projection.bias)
        # a vector of positions has the dtype of its table, and autocast's product may have another
        return x + (self.row(places[:, 0]) + self.column(places[:, 1])).to(x.dtype)


def normalised(patches: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Bytes as numbers in [-1, 1]."""
    return patches.to(dtype) * (2.0 / 255.0) - 1.0
