"""An encoder of images and one of texts with one space of vectors (CLIP, SigLIP), trained in exact chunks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as tnf

from fastbert.files import folder_or_new, parse_json, quoted, read_text
from fastbert.models.checkpoint import write_files
from fastbert.models.config import BertConfig, model_folder
from fastbert.models.encoder import BertModel, Encoded
from fastbert.models.images import ImageEncoder, patch_sizes
from fastbert.models.inputs import prepare
from fastbert.models.losses import contrastive_loss
from fastbert.models.weight_files import read_weights
from fastbert.nn.base import Linear

# the model_type in the config.json of two towers
TWO_TOWERS = "fastbert-two-towers"
# the first temperature and bias of each loss, and the greatest scale, as in CLIP's and SigLIP's code
_SCALES = {"softmax": (1 / 0.07, 0.0), "sigmoid": (10.0, -10.0)}
_MOST = math.log(100.0)


@dataclass
class ImageTextConfig:
    """The settings of two towers; those of patches are in the image encoder's `extra`, as `with_patches` puts them.

    Raises ValueError for settings that can't be.
    """

    text: BertConfig
    image: BertConfig
    # the length of a vector
    projection_dim: int = 256
    # softmax: CLIP's (Radford et al. 2021); sigmoid: SigLIP's (Zhai et al. 2023)
    loss: str = "softmax"

    def __post_init__(self) -> None:
        if self.loss not in _SCALES:
            raise ValueError(f"loss is {quoted(self.loss)}: choose {' or '.join(_SCALES)}")
        if self.projection_dim < 1:
            raise ValueError(f"projection_dim is {self.projection_dim}: it must be at least 1")
        patch_sizes(self.image)

    def to_dict(self) -> dict[str, Any]:
        """The contents of a config.json."""
        towers = {"text_config": self.text.to_dict(), "vision_config": self.image.to_dict()}
        sizes = {"projection_dim": self.projection_dim, "loss": self.loss}
        return {"model_type": TWO_TOWERS, **towers, **sizes}

    @classmethod
    def from_file(cls, folder: Path) -> ImageTextConfig:
        """Read the config.json of two towers; raises FileNotFoundError, or ValueError for another one."""
        file = folder / "config.json"
        if not is_two_towers(folder):
            raise ValueError(
                f"{file} is not of two towers: train them with fastbert pretrain --images"
            )
        values = parse_json(read_text(file))
        try:
            return cls(
                BertConfig.from_dict(values["text_config"]),
                BertConfig.from_dict(values["vision_config"]),
                values["projection_dim"],
                values["loss"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file}: {error}") from error


def is_two_towers(folder: str | Path) -> bool:
    """Whether a model folder holds two towers."""
    file = model_folder(folder) / "config.json"
    if not file.is_file():
        return False
    with suppress(ValueError):
        values = parse_json(read_text(file))
        return isinstance(values, dict) and values.get("model_type") == TWO_TOWERS
    return False


@dataclass
class ImageTextOutput:
    """The results of two towers: the loss of a batch of pairs, and vectors (B, D) of length 1."""

    loss: Tensor | None
    image_embeds: Tensor
    text_embeds: Tensor

    @property
    def contrastive_loss(self) -> Tensor | None:
        """The loss, by its name in the metrics of a training."""
        return self.loss


class TwoTowers(nn.Module):
    """An encoder of images and one of texts, the mean of each one's tokens, and a map of each mean to one space.

    With `chunk` above 0 so many images or texts are encoded at once. In training each chunk keeps its vectors alone,
    and backward computes it again with the same dropout (Gao et al. 2021): the gradients are those of the whole batch.
    """

    chunk = 0

    def __init__(self, config: ImageTextConfig) -> None:
        super().__init__()
        self.config = config
        self.text = BertModel(config.text, add_pooler=False)
        self.image = ImageEncoder(config.image)
        self.text_projection = Linear(config.text.hidden_size, config.projection_dim, bias=False)
        self.image_projection = Linear(config.image.hidden_size, config.projection_dim, bias=False)
        for projection in (self.text_projection, self.image_projection):
            nn.init.normal_(projection.weight, std=projection.in_features**-0.5)
        scale, bias = _SCALES[config.loss]
        self.logit_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.logit_bias = nn.Parameter(torch.tensor(bias)) if bias else None

    def embed_images(
        self, patches: Tensor, places: Tensor, patch_cu_seqlens: Tensor, patch_max_seqlen: int
    ) -> Tensor:
        """(B, D), rows of length 1; arguments as `image_batch` makes them."""

        def encode(patches: Tensor, places: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
            e = self.image(patches, places, cu_seqlens, longest)
            return _vectors(self.image_projection, e)

        weights = chain(self.image.parameters(), self.image_projection.parameters())
        rows = (patches, places)
        return self._chunked(encode, weights, rows, patch_cu_seqlens, patch_max_seqlen)

    def embed_texts(self, input_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """(B, D), rows of length 1, of packed tokens (T,)."""

        def encode(ids: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
            sizes: dict[str, Any] = {"cu_seqlens": cu_seqlens, "max_seqlen": longest}
            e = self.text.encode(prepare(self.config.text, ids, **sizes))
            return _vectors(self.text_projection, e)

        weights = chain(self.text.parameters(), self.text_projection.parameters())
        return self._chunked(encode, weights, (input_ids,), cu_seqlens, max_seqlen)

    def _chunked(
        self,
        encode: Callable[..., Tensor],
        weights: Iterable[Tensor],
        rows: tuple[Tensor, ...],
        cu_seqlens: Tensor,
        longest: int,
    ) -> Tensor:
        """`encode` of packed rows with the vectors of all chunks in order."""
        count = cu_seqlens.shape[0] - 1
        if not 0 < self.chunk < count:
            return encode(*rows, cu_seqlens, longest)
        wanted = [w for w in weights if w.requires_grad]
        found = []
        for part, bounds, longest in chunks(cu_seqlens, self.chunk):
            arguments = (*(r[part] for r in rows), bounds, longest)
            if torch.is_grad_enabled():
                found.append(recomputed(encode, arguments, wanted))
            else:
                found.append(encode(*arguments))
        return torch.cat(found)

    def similarity(self, images: Tensor, texts: Tensor) -> Tensor:
        """(images, texts): the logits of all pairs of two lists of vectors."""
        logits = self.logit_scale.clamp(max=_MOST).exp() * (images @ texts.T)
        return logits if self.logit_bias is None else logits + self.logit_bias

    def forward(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        patches: Tensor,
        places: Tensor,
        patch_cu_seqlens: Tensor,
        patch_max_seqlen: int,
        num_pairs_in_batch: int | None = None,
    ) -> ImageTextOutput:
        """Image i and text i are a pair; the loss is the mean over pairs, or their sum / num_pairs_in_batch."""
        images = self.embed_images(patches, places, patch_cu_seqlens, patch_max_seqlen)
        texts = self.embed_texts(input_ids, cu_seqlens, max_seqlen)
        if len(images) != len(texts):
            raise ValueError(f"there are {len(images)} images and {len(texts)} texts: pass pairs")
        loss = contrastive_loss(self.similarity(images, texts), self.config.loss)
        if num_pairs_in_batch is not None:
            loss = loss * (len(images) / num_pairs_in_batch)
        return ImageTextOutput(loss, images, texts)

    def gradient_checkpointing_enable(self) -> None:
        """In training, keep only the layers' inputs of both encoders."""
        self.text.gradient_checkpointing_enable()
        self.image.gradient_checkpointing_enable()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.logit_scale.device

    @property
    def layers_to_shard(self) -> Iterable[nn.Module]:
        """The layers of both encoders."""
        return chain(self.text.layers, self.image.bert.layers)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors, each whole or not at all; from_pretrained alone loads them."""
        folder = folder_or_new(directory, "pass a directory to save into")
        state = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
        write_files(folder, state, self.config.to_dict())

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> TwoTowers:
        """Load what save_pretrained wrote, in eval mode; raises FileNotFoundError or ValueError for anything else."""
        folder = model_folder(directory)
        model = cls(ImageTextConfig.from_file(folder))
        state = read_weights(folder)
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"the weights in {folder} do not fit its config.json: {reason}"
            ) from error
        return model.eval()


def recomputed(
    function: Callable[..., Tensor], arguments: tuple[Any, ...], weights: list[Tensor]
) -> Tensor:
    """function(*arguments), which backward computes again for the gradients of `weights`, with the same dropout.

    torch.utils.checkpoint would keep a graph of each call, whose many small pieces hold large parts of malloc's memory.
    The gradients are results of one node, so that DistributedDataParallel sees each weight's once.
    """
    result: Tensor = _Recomputed.apply(function, arguments, *weights)
    return result


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Any, arguments: Any, *weights: Tensor) -> Tensor:
        ctx.function, ctx.arguments = function, arguments
        ctx.save_for_backward(*weights)
        device = ctx.device = weights[0].device
        kind = device.type
        ctx.autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        # a model draws the seed of its dropout from the generator
        ctx.states = torch.get_rng_state(), kind == "cuda" and torch.cuda.get_rng_state(device)
        return function(*arguments)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        device, (enabled, dtype) = ctx.device, ctx.autocast
        cuda = [device] if device.type == "cuda" else []
        cast = torch.autocast(device.type, dtype=dtype, enabled=enabled)
        with torch.random.fork_rng(cuda), torch.enable_grad(), cast:
            torch.set_rng_state(ctx.states[0])
            if cuda:
                torch.cuda.set_rng_state(ctx.states[1], device)
            y = ctx.function(*ctx.arguments)
        grads = torch.autograd.grad(y, ctx.saved_tensors, dy, allow_unused=True)
        return (None, None, *grads)


def _vectors(projection: nn.Module, e: Encoded) -> Tensor:
    """The means of sequences, mapped and of length 1, in fp32."""
    return tnf.normalize(projection(e.packing.mean(e.x)).float())


def chunks(cu_seqlens: Tensor, size: int) -> Iterator[tuple[slice, Tensor, int]]:
    """Parts of `size` sequences: their rows, their cu_seqlens, and their longest length; a sync on a GPU."""
    bounds = cu_seqlens.tolist()
    for first in range(0, len(bounds) - 1, size):
        some = bounds[first : first + size + 1]
        longest = max(b - a for a, b in pairwise(some))
        here = cu_seqlens[first : first + size + 1]
        yield slice(some[0], some[-1]), here - here[0], longest
