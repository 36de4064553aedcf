"""Batches that hold images: the one sequence of tokens that a model makes of them, before its embeddings have run.

Each function takes a model and its arguments. It returns the arguments with the sequence as `inputs_embeds` (B, S, 1),
whose numbers mean nothing, and with its `attention_mask` (B, S) or None; or a sentence why transformers' code must run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as tnf

from fastbert.integrations.families import module_at
from fastbert.nn.watch import why_not_bypassed

Arguments = dict[str, Any]


def tower(conv: str, first: int) -> Callable[[Any, Arguments], Arguments | str]:
    """For models of images alone: a token for each step of the convolution at `conv`, behind `first` other tokens.

    Models of text in the same file get their arguments back.
    """

    def sequence(model: Any, given: Arguments) -> Arguments | str:
        if model.main_input_name != "pixel_values":
            return given
        grid = _grid(model, conv, given)
        if isinstance(grid, str):
            return grid
        length = grid[0] * grid[1] + first
        return _sequence(given, given["pixel_values"], length, given.get("attention_mask"))

    return sequence


def vilt(model: Any, given: Arguments) -> Arguments | str:
    """For ViLT: text, a first token of the image, and the patches that `pixel_mask` shows.

    ViLT puts an image's shown patches in front, and others behind them up to the length of the largest image, or draws
    `config.max_image_length` of them.
    """
    if given.get("image_embeds") is not None:
        return "image_embeds are given"
    grid = _grid(model, "embeddings.patch_embeddings.projection", given)
    if isinstance(grid, str):
        return grid
    text, mask = _text(given), given.get("pixel_mask")
    if text is None:
        return "one of input_ids and inputs_embeds must be given"
    # the length of the image follows from the mask's values
    if reason := why_not_bypassed():
        return reason
    shown, largest = None, grid[0] * grid[1]
    if mask is not None:
        if mask.dim() != 3:
            return f"pixel_mask has shape {tuple(mask.shape)}, not (B, height, width)"
        patches = tnf.interpolate(mask[:, None].float(), size=grid)[:, 0].long()
        shown = patches.flatten(1).sum(1)
        largest = int((patches[:, :, 0].sum(1) * patches[:, 0].sum(1)).max())
    most = model.config.max_image_length
    if isinstance(most, int) and most >= 0:
        largest = min(largest, most)
    masks: Tensor | None = None
    if shown is not None or given.get("attention_mask") is not None:
        counts = text.new_full((text.shape[0],), largest) if shown is None else shown
        places = torch.arange(-1, largest, device=counts.device)  # the first token is always seen
        masks = torch.cat([_mask(given, text), (places < counts[:, None]).long()], 1)
    return _sequence(given, text, text.shape[1] + 1 + largest, masks)


def visual_bert(model: Any, given: Arguments) -> Arguments | str:
    """For VisualBERT: text, then the vectors of an image's regions."""
    regions, text = given.get("visual_embeds"), _text(given)
    if regions is None:
        return given
    if text is None:
        return "one of input_ids and inputs_embeds must be given"
    if getattr(model.config, "bypass_transformer", False):
        return "config.bypass_transformer is set"
    if regions.dim() != 3:
        return f"visual_embeds has shape {tuple(regions.shape)}, not (B, regions, width)"
    return _sequence(given, text, text.shape[1] + regions.shape[1], joined_mask(given, text))


def joined_mask(given: Arguments, text: Tensor) -> Tensor | None:
    """VisualBERT's mask (B, S + regions) of a text (B, S, ...) and its regions; None where it hides nothing."""
    hidden, regions = given.get("visual_attention_mask"), given["visual_embeds"]
    if hidden is None and given.get("attention_mask") is None:
        return None
    if hidden is None:
        hidden = torch.ones(regions.shape[:2], dtype=torch.long, device=regions.device)
    return torch.cat([_mask(given, text), (hidden != 0).long()], 1)


def _mask(given: Arguments, text: Tensor) -> Tensor:
    mask = given.get("attention_mask")
    shape = text.shape[:2]
    return text.new_ones(shape, dtype=torch.long) if mask is None else (mask != 0).long()


def _text(given: Arguments) -> Tensor | None:
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    text = embeds if ids is None else ids
    both = ids is not None and embeds is not None
    return None if both or not isinstance(text, Tensor) or text.dim() < 2 else text


def _grid(model: Any, conv: str, given: Arguments) -> tuple[int, int] | str:
    """The rows and columns of patches that the convolution makes of the images."""
    images, m = given.get("pixel_values"), module_at(model, conv)
    if not isinstance(images, Tensor) or images.dim() != 4:
        return "pixel_values is not (B, channels, height, width)"
    if type(m) is not nn.Conv2d or m.padding not in ((0, 0), "valid"):
        return f"its {conv.rpartition('.')[2]} is {str(m).splitlines()[0]}"
    sizes = zip(images.shape[2:], m.kernel_size, m.stride, strict=True)
    rows, columns = (max((size - kernel) // stride + 1, 0) for size, kernel, stride in sizes)
    return rows, columns


def _sequence(given: Arguments, values: Tensor, length: int, mask: Tensor | None) -> Arguments:
    """The arguments with one sequence (B, length) in the place of text and images."""
    embeds = torch.empty((), device=values.device).expand(values.shape[0], length, 1)
    others = dict.fromkeys(("input_ids", "token_type_ids", "position_ids"))
    return given | others | {"inputs_embeds": embeds, "attention_mask": mask}
