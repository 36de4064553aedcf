"""What the losses compare: hidden states, queries, keys and values, scores, and vectors of a model on one batch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastbert.distil.plan import Wanted
from fastbert.functional import Rotary
from fastbert.nn.packing import Packing
from fastbert.runners.frozen import Frozen


class Decoded(NamedTuple):
    """Rows that a masked-LM decoder turns into scores of the vocabulary; the scores themselves are not kept."""

    rows: Tensor  # (R, C)
    weight: Tensor  # (V, C)
    bias: Tensor  # (V,)


@dataclass
class Signals:
    """A model's part of the losses on one batch of T packed tokens."""

    # by number: 0 is the embeddings' output, i the output of layer i - 1; (T, C) each
    hidden: dict[int, Tensor] = field(default_factory=dict)
    # queries, keys and values by the layer's number, (T, 3, H, D) each
    projections: dict[int, Tensor] = field(default_factory=dict)
    # scores of classes (N, K), one or several kinds of them; or the rows before the masked-LM decoder
    scores: list[Tensor] = field(default_factory=list)
    decoded: Decoded | None = None
    vectors: Tensor | None = None  # (B, C)
    # the loss of the batch's own labels, a sum over its labels
    own_loss: Tensor | None = None


class Tap:
    """Takes hidden states and projections inside of a model's forward."""

    # True: the last layer computes all rows; False: only the rows that the head reads
    whole = False

    def __init__(self) -> None:
        # of the last forward
        self.signals = Signals()

    def clear(self) -> Signals:
        """Begin a forward: the signals that it will fill."""
        self.signals = Signals()
        return self.signals


class Hooks(Tap):
    """The tap of a student, with the graph of gradients.

    Hooks on a layer and on its projection leave the layer's fused ops as they are.
    """

    def __init__(self, encoder: Any, wanted: Wanted) -> None:
        super().__init__()
        count = len(encoder.layers)
        self.whole = count in wanted.hidden
        for number in wanted.hidden:
            if number < count:
                encoder.layers[number].register_forward_pre_hook(partial(self._before, number))
            else:
                # the norm behind the last layer, where there is one
                last = encoder.final_norm or encoder.layers[count - 1]
                last.register_forward_hook(partial(self._after, number))
        for number in wanted.projections:
            qkv = encoder.layers[number].attention.qkv
            qkv.register_forward_hook(partial(self._projected, number))

    def _before(self, number: int, layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        self.signals.hidden[number] = arguments[0]

    def _after(self, number: int, layer: nn.Module, _: Any, x: Tensor) -> None:
        self.signals.hidden[number] = x

    def _projected(self, number: int, qkv: nn.Module, _: Any, y: Tensor) -> None:
        self.signals.projections[number] = y


class Recorded(Tap):
    """The tap of a teacher, in the place of its frozen copies: it runs the layers in pieces, and takes signals between.

    A piece runs on prepacked weights, in integers of `bits` bits where they are given, as `freeze` and `quantize` run a
    whole encoder. Without a head the layers after the last one that is needed do not run.
    """

    def __init__(self, encoder: Any, wanted: Wanted, bits: int | None) -> None:
        super().__init__()
        self.wanted = wanted
        self.layers = encoder.layers
        count = len(encoder.layers)
        needed = max((*wanted.hidden, *wanted.projections), default=count)
        self.depth = needed if wanted.encoder_alone else count
        bounds = sorted({0, self.depth, *wanted.hidden, *wanted.projections})
        self.pieces = [
            (start, _piece(encoder.layers[start:end]), Frozen(bits))
            for start, end in itertools.pairwise(bounds)
        ]

    def serves(self, encoder: Any, x: Tensor, last_alone: bool = True) -> bool:
        """Whether the forward runs here: always, a teacher records no gradient."""
        return True

    def encode(
        self,
        encoder: Any,
        x: Tensor,
        packing: Packing,
        rows: Tensor | None,
        rotary: Sequence[Rotary | None],
    ) -> Tensor:
        """The last layer's output (T, C), or (R, C) at `rows`; of the last piece where layers are left out."""
        last = len(self.layers) in self.wanted.hidden
        for start, piece, frozen in self.pieces:
            self._keep(encoder, start, x)
            end = start + len(piece.layers)
            of_head = rows if end == len(self.layers) and not last else None
            if frozen.serves(piece, x):
                x = frozen.encode(piece, x, packing, of_head, rotary[start:end])
            else:
                for layer, turned in zip(piece.layers, rotary[start:end], strict=True):
                    narrow = of_head if layer is piece.layers[-1] else None
                    x = layer(x, packing.cu_seqlens, packing.max_seqlen, None, 0, narrow, turned)
        self._keep(encoder, self.depth, x)
        return x.index_select(0, rows) if last and rows is not None else x

    def _keep(self, encoder: Any, number: int, x: Tensor) -> None:
        if number in self.wanted.hidden:
            last = number == len(self.layers)
            self.signals.hidden[number] = encoder.normed(x) if last else x
        if number in self.wanted.projections:
            layer = self.layers[number]
            self.signals.projections[number] = layer.attention.qkv(layer.attention_input(x))


def _piece(layers: Sequence[nn.Module]) -> Any:
    """Some layers of an encoder, as much of one as `Frozen` reads."""
    return SimpleNamespace(layers=nn.ModuleList(layers), training=False)
