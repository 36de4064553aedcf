"""An encoder of images: BERT's layers on packed patches, as fastbert.data.images.image_batch makes them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from fastbert.files import quoted
from fastbert.models.config import BertConfig
from fastbert.models.encoder import BertModel, Encoded, Pretrained
from fastbert.models.inputs import prepare
from fastbert.nn.patches import PatchEmbedding


def with_patches(config: BertConfig, patch_size: int, max_patches: int) -> BertConfig:
    """The settings of an encoder of patches: their side in pixels, and how many the longest side of an image has."""
    extra = {**config.extra, "patch_size": patch_size, "max_patches": max_patches}
    return dataclasses.replace(config, extra=extra)


def patch_sizes(config: BertConfig) -> tuple[int, int]:
    """The side of a patch in pixels, and the most patches in a side of an image."""
    found = tuple(config.extra.get(name) for name in ("patch_size", "max_patches"))
    if not all(isinstance(n, int) and n > 0 for n in found):
        raise ValueError(
            f"patch_size is {quoted(found[0])} and max_patches {quoted(found[1])}: an encoder of images has both, "
            "whole numbers above 0"
        )
    return found  # type: ignore[return-value]


def patch_embedding(config: BertConfig) -> PatchEmbedding:
    """A fresh embedding of patches by the settings of an encoder."""
    patch_size, sides = patch_sizes(config)
    return PatchEmbedding(patch_size, config.hidden_size, sides)


class ImageEncoder(Pretrained):
    """An encoder of patches. Its table of positions has one row, which every patch has: positions are the patches'."""

    architecture = "ImageEncoder"

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooler=False)
        # no word is looked up
        self.bert.embeddings.word.requires_grad_(False)
        self.patches = patch_embedding(config)
        self.init_weights()

    def forward(
        self,
        patches: Tensor,  # (P, 3 p p) uint8
        places: Tensor,  # (P, 2) int64
        patch_cu_seqlens: Tensor,  # (B + 1,) int32
        patch_max_seqlen: int,
    ) -> Encoded:
        """Encode images: x is (P, C)."""
        return self.encode(self.patches(patches, places), patch_cu_seqlens, patch_max_seqlen)

    def encode(self, x: Tensor, patch_cu_seqlens: Tensor, patch_max_seqlen: int) -> Encoded:
        """Encode embedded patches (P, C)."""
        first = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
        sizes: dict[str, Any] = {"cu_seqlens": patch_cu_seqlens, "max_seqlen": patch_max_seqlen}
        return self.bert.encode(prepare(self.config, inputs_embeds=x, position_ids=first, **sizes))
