"""Int8 weights: the modules that hold them, and how a weight of floating-point numbers becomes one.

Each row has one scale. A column of outliers is the sum of several int8 columns.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastbert import functional as F
from fastbert.backend import cpu
from fastbert.backend.reference.linear_int8 import LARGEST_WEIGHT, LEVELS, quantize_weight
from fastbert.backend.torch_private import exporting
from fastbert.nn.exports import refuse_script
from fastbert.nn.int8_checks import MOST, why_not_integers, why_not_sources, why_not_state
from fastbert.ops import _check

# the first extra columns must lower the error to _GAIN of what it is without them, and twice as many to _MORE of what
# it is with them
_GAIN, _MORE = 0.8, 0.95


def split(
    weight: Tensor,  # (N, K)
    name: str = "the weight",
) -> tuple[Tensor, Tensor, Tensor]:
    """int8 (N, K + E), the scale of each row (N,) fp32, and the columns (E,) int32 that the last E columns repeat.

    The largest number of a row sets its scale. Trained feed-forward weights have a few columns with numbers several
    times as large as the rest, which make the steps of all others coarse. The scale is taken without such columns; each
    of them is the sum of as many columns of int8 as its numbers need, and its activation is multiplied by all of them.
    The number of such columns is chosen by the weight's rounding error. Sums stay exact. Refuses numbers that are not
    finite, with the weight's `name`.
    """
    w = weight.detach().float()
    if not w.numel():
        none = torch.empty(0, dtype=torch.int32)
        return w.to(torch.int8), w.new_zeros(w.shape[0]), none
    q, scale = quantize_weight(w, name)
    best = q, scale, torch.empty(0, dtype=torch.int32)
    wanted = _GAIN * _error(w, *best)
    most = int(w.shape[1] * MOST)
    # columns by their largest number, in units of their row's spread
    spread = w.square().mean(1, keepdim=True).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    order = (w / spread).abs().amax(0).argsort(descending=True)
    count = 1
    while count <= most:
        found = _without(w, order[:count], most)
        if found is not None and (smaller := _error(w, *found)) <= wanted:
            best, wanted = found, _MORE * smaller
        count *= 2
    return best


def _without(w: Tensor, columns: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """`split` with scales from all columns but these.

    None where a row has zeros in all others, and where more than `most` columns would be added.
    """
    kept = torch.ones(w.shape[1], dtype=torch.bool)
    kept[columns] = False
    scale = w[:, kept].abs().amax(1) / LARGEST_WEIGHT
    if not bool((scale > 0).all()):
        return None
    left = torch.round(w / scale[:, None])
    parts, sources = [left.clamp(-LARGEST_WEIGHT, LARGEST_WEIGHT)], []
    left = left[:, columns] - parts[0][:, columns]
    while bool(left.any()):
        wide = left.any(0)
        columns, left = columns[wide], left[:, wide]
        parts.append(left.clamp(-LARGEST_WEIGHT, LARGEST_WEIGHT))
        sources.append(columns)
        left = left - parts[-1]
        if sum(s.numel() for s in sources) > most:
            return None
    repeated = torch.cat(sources) if sources else columns[:0]
    return torch.cat(parts, 1).to(torch.int8), scale, repeated.to(torch.int32)


def _error(w: Tensor, q: Tensor, scale: Tensor, sources: Tensor) -> float:
    """The root mean square of the weight's rounding."""
    K = w.shape[1]
    whole = q[:, :K].float().index_add(1, sources.long(), q[:, K:].float())
    return float((whole * scale[:, None] - w).square().mean().sqrt())


def pack(
    weight: Tensor,  # (N, K + E) int8
    scale: Tensor,  # (N,) fp32
    sources: Tensor,  # (E,) int32
    bits: int,
) -> Tensor:
    """The result of `split` in one tensor, in the GEMM's own order for such activations: csrc/cpu/linear_int8.h."""
    if reason := why_not_integers(weight, bits):
        raise ValueError(f"the int8 weight {reason}: quantise again")
    N, extra = weight.shape[0], sources.numel()
    K = weight.shape[1] - extra
    if reason := why_not_sources(sources, K):
        raise ValueError(f"the tensor of repeated columns {reason}: quantise again")
    levels = LEVELS[bits]
    size = cpu.native.linear_int8_packed_size(N, K, extra, levels)
    packed = cpu.fresh(weight, size, dtype=torch.uint8)
    # held until the call is over
    weight, scale, sources = weight.contiguous(), scale.contiguous(), sources.contiguous()
    cpu.native.linear_int8_pack(
        weight.data_ptr(),
        scale.data_ptr(),
        cpu.address(sources),
        packed.data_ptr(),
        N,
        K,
        extra,
        levels,
        torch.get_num_threads(),
    )
    return packed


class _Int8(nn.Module):
    """What the modules have in common: `weight` int8, `scale` fp32, one number for each of its rows."""

    __prepare_scriptable__ = refuse_script
    scale: Tensor
    bits: int
    # the tensors of a state dict that belong together
    leaves: tuple[str, ...] = ("weight", "scale")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != torch.float32:
            # the model was cast: scales stay as exact as they were
            self.scale = scale.to(self.scale.device)
        return self

    def _make_room(self, state: Mapping[str, Any], prefix: str) -> None:
        """Let a state dict that fits be copied into the buffers."""

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *args: Any) -> None:
        if reason := why_not_state(self, state, prefix):
            raise RuntimeError(reason)
        self._make_room(state, prefix)
        super()._load_from_state_dict(state, prefix, *args)

    def _refuse_training(self) -> None:
        if self.training:
            raise RuntimeError(
                "the model's weights are int8, which can't be trained: call eval(), or train the floating-point model "
                "and quantise it afterwards"
            )


# one thread packs at a time
_PACKING = threading.Lock()


class Int8Linear(_Int8):
    """y = x weight^T + bias from exact sums of integers, for inference; a training forward raises RuntimeError.

    `weight` (N, K + E), `scale` (N,) and `sources` (E,) are what `split` returns; E is 0 at first. x is rounded to
    `bits` bits, 12 or 8, row by row. With `num_heads` the result is (T, 3, H, D), as QKVProjection's.

    The encoder's native call reads the integers in another order. They are held once: in `weight`, which is None while
    they are in `panels`. `rows` returns them in both cases, and state dicts, copies and pickles have them as `weight`.
    """

    leaves = ("sources", "weight", "scale")
    weight: Tensor | None
    sources: Tensor
    panels: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        bits: int = 12,
        num_heads: int | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.num_heads = bits, num_heads
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scale", torch.zeros(out_features))
        self.register_buffer("sources", torch.zeros(0, dtype=torch.int32))
        self.register_buffer("panels", None, persistent=False)
        self.bias = nn.Parameter(torch.zeros(out_features), requires_grad=False) if bias else None
        # the instruction set and the bits that `panels` were packed for
        self._packed_for = "", 0

    @classmethod
    def like(cls, m: Any, bits: int) -> Int8Linear:
        """A module of zeros in the shape of a Linear or a QKVProjection."""
        N, K = m.weight.shape
        return cls(K, N, m.bias is not None, bits, getattr(m, "num_heads", None))

    @classmethod
    def of(cls, m: Any, bits: int) -> Int8Linear:
        """A Linear or a QKVProjection with its weight as int8, and the same bias."""
        made = cls.like(m, bits).to(m.weight.device)
        made.hold(*split(m.weight.cpu()))
        made.bias = m.bias if m.bias is None else m.bias.requires_grad_(False)
        return made.train(m.training)

    def hold(self, weight: Tensor, scale: Tensor, sources: Tensor) -> None:
        """Take these in the place of the present ones; `split` has the shapes."""
        device = self.scale.device
        self.weight, self.scale, self.sources = (t.to(device) for t in (weight, scale, sources))
        self.panels = None

    @property
    def shape(self) -> torch.Size:
        """(N, K), that of the floating-point weight."""
        return torch.Size((self.out_features, self.in_features))

    def rows(self) -> Tensor:
        """The integers (N, K + E); a copy of them while they are in `panels`."""
        weight = self.weight
        if weight is not None:
            return weight
        assert self.panels is not None
        columns = self.in_features + self.sources.numel()
        weight = torch.empty(self.out_features, columns, dtype=torch.int8, device="cpu")
        isa = cpu.native.isa()
        # panels have the order of the instruction set that packed them
        cpu.native.use_isa(self._packed_for[0])
        try:
            cpu.native.linear_int8_unpack(
                self.panels.data_ptr(),
                weight.data_ptr(),
                self.out_features,
                torch.get_num_threads(),
            )
        finally:
            cpu.native.use_isa(isa)
        return weight

    def packed(self) -> Tensor:
        """The integers and scales in the order of the native call (CPU only); they leave `weight`."""
        with _PACKING:
            wanted = cpu.native.isa(), self.bits
            if self.weight is not None or self._packed_for != wanted:
                self.panels = pack(self.rows(), self.scale, self.sources, self.bits)
                self._packed_for, self.weight = wanted, None
            assert self.panels is not None
            return self.panels

    def unpack(self) -> None:
        """Take the integers back into `weight`."""
        self.weight, self.panels = self.rows(), None

    def forward(self, x: Tensor) -> Tensor:  # (..., K) -> (..., N), or (T, K) -> (T, 3, H, D)
        self._refuse_training()
        if self.weight is None and (torch.compiler.is_compiling() or exporting()):
            raise RuntimeError(
                "the int8 weights are packed for the native call, which can't be traced: call "
                "fastbert.unfreeze(model) first"
            )
        if self.sources.numel():
            x = torch.cat([x, x.index_select(-1, self.sources)], -1)
        y = F.linear_int8(x, self.rows(), self.scale, self.bias, self.bits)
        if self.num_heads is None:
            return y
        return y.view(x.shape[0], 3, self.num_heads, self.out_features // (3 * self.num_heads))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.unpack()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.rows()

    def _make_room(self, state: Mapping[str, Any], prefix: str) -> None:
        self.unpack()
        sources = state.get(f"{prefix}sources")
        # the other model may repeat another number of columns
        if sources is not None and sources.shape != self.sources.shape:
            columns = self.in_features + sources.numel()
            size = self.out_features, columns
            self.weight = torch.empty(size, dtype=torch.int8, device=self.scale.device)
            self.sources = self.sources.new_empty(sources.shape)

    def __getstate__(self) -> dict[str, Any]:
        buffers = {**self._buffers, "weight": self.rows(), "panels": None}
        return {**vars(self), "_buffers": buffers}


class Int8Embedding(_Int8):
    """A table of int8 rows (V, C), each with a scale, for inference; a training forward raises RuntimeError.

    A masked-LM decoder that is tied to the table computes from the same integers, on rows of `bits` bits.
    """

    weight: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        bits: int = 12,
    ) -> None:
        super().__init__()
        self.padding_idx, self.bits = padding_idx, bits
        self.register_buffer("weight", torch.zeros(num_embeddings, embedding_dim, dtype=torch.int8))
        self.register_buffer("scale", torch.zeros(num_embeddings))

    @classmethod
    def like(cls, m: nn.Embedding, bits: int) -> Int8Embedding:
        """A table of zeros in the shape of an embedding."""
        V, C = m.weight.shape
        return cls(V, C, m.padding_idx, bits)

    @classmethod
    def of(cls, m: nn.Embedding, bits: int) -> Int8Embedding:
        """An embedding with its rows as int8."""
        made = cls.like(m, bits)
        made.hold(*quantize_weight(m.weight))
        return made.train(m.training)

    def hold(self, weight: Tensor, scale: Tensor) -> None:
        """Take these in the place of the present ones, int8 (V, C) and (V,)."""
        self.weight, self.scale = weight, scale

    @property
    def shape(self) -> torch.Size:
        """(V, C)."""
        return self.weight.shape

    def forward(self, ids: Tensor) -> Tensor:  # (...) -> (..., C) fp32
        self._refuse_training()
        if ids.device.type == "cpu" and not (torch.compiler.is_compiling() or exporting()):
            _check.word_ids(ids, self.shape[0])
        return self.weight[ids].float() * self.scale[ids].unsqueeze(-1)

    def scores(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x weight^T + bias: (..., C) -> (..., V)."""
        return F.linear_int8(x, self.weight, self.scale, bias, self.bits)


# the parts of an EncoderLayer that multiply by a weight
MATRICES = ("attention.qkv", "attention.out", "feed_forward.up", "feed_forward.down")


def replace_matrices(layer: nn.Module, make: Callable[[Any], Int8Linear]) -> None:
    """Put what `make` returns for a part of a layer in its place, unless it is int8 already."""
    for path in MATRICES:
        owner, _, name = path.rpartition(".")
        part = layer.get_submodule(path)
        if not isinstance(part, Int8Linear):
            setattr(layer.get_submodule(owner), name, make(part))
