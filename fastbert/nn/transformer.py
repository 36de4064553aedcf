"""Drop-ins for torch.nn's MultiheadAttention, TransformerEncoderLayer and TransformerEncoder."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastbert.nn.base import Linear
from fastbert.nn.drop_in import GELU, LayerNorm, log_stock, why_not_fused
from fastbert.nn.exports import replaces
from fastbert.nn.layer import (
    LayerCall,
    LayerSettings,
    LayerWeights,
    Rates,
    activation_name,
    attention_block,
    encoder_layer,
)
from fastbert.nn.packing import Packing
from fastbert.nn.watch import hooked, why_not_bypassed
from fastbert.ops.context import seed_for

# the class of torch.nn.MultiheadAttention's output projection is not public
_STOCK_OUT = nn.MultiheadAttention(1, 1, device="meta").out_proj


class _Batch(NamedTuple):
    """A batch as the layers see it."""

    packing: Packing
    # (B, S) bool: nothing is packed, and padding is computed as in torch.nn; None: packed
    tokens: Tensor | None = None

    def call(self, seed: Tensor | None = None, site: int = 0) -> LayerCall:
        """The arguments of one layer."""
        packing = self.packing
        return LayerCall(packing.cu_seqlens, packing.max_seqlen, seed, site, tokens=self.tokens)


def _read(mask: Tensor | None, x: Tensor, at_padding: str) -> tuple[_Batch, str | None]:
    """x (B, S, C) by torch.nn's key_padding_mask: bool, True = padding, or float, -inf = padding."""
    full = (x.shape[0], x.shape[1], x.device)
    if mask is None:
        return _Batch(Packing.full(*full)), None
    if mask.shape != x.shape[:2]:
        raise ValueError(
            f"key_padding_mask has shape {tuple(mask.shape)}: pass (B, S) = {tuple(x.shape[:2])}"
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(
            f"key_padding_mask is {mask.dtype}: pass bool, True at padding, for instance mask == 0"
        )
    packing, others = Packing.read(mask, "key_padding")
    reason = "the float key_padding_mask holds other values than 0 and -inf" if others else None
    if at_padding == "stock":
        return _Batch(Packing.full(*full), mask == 0), reason
    return _Batch(packing), reason


def _changed(m: nn.Module, kind: type[nn.Module]) -> str | None:
    """Why a part of a module can't be read instead of called: only an untouched torch.nn (or our) module can."""
    # an adapter or a parametrization is a class of its own, whose weight alone says nothing
    if type(m) is not kind and type(m) is not _OURS.get(kind):
        return f"a {kind.__name__} was replaced by a {type(m).__name__}"
    if hooked(m):
        return f"hooks are attached to a {kind.__name__} inside"
    return None


def _attention_reason(m: nn.MultiheadAttention, x: Tensor) -> str | None:
    """Why packed attention can't serve these settings of torch.nn.MultiheadAttention and this input."""
    if not m.batch_first:
        return "batch_first is False: pass batch_first=True"
    if x.is_nested or x.dim() != 3 or x.numel() == 0:
        return "the input is not a padded batch (B, S, C)"
    if reason := why_not_fused(x) or why_not_bypassed():
        return reason
    if m.in_proj_weight is None:
        return "kdim or vdim differ from embed_dim"
    if reason := _changed(m.out_proj, type(_STOCK_OUT)):
        return reason
    if m.bias_k is not None or m.add_zero_attn:
        return "add_bias_kv or add_zero_attn is set"
    if m.head_dim > 128:
        return f"the head size is {m.head_dim}, more than 128"
    if m.training and m.dropout == 1.0:
        return "a dropout is 1"
    return None


def _activation(m: nn.TransformerEncoderLayer) -> str | None:
    """The name of the layer's activation as it is now; None for any other than GELU and ReLU."""
    activation = m.activation
    if activation in (nn.functional.relu, torch.relu):
        return "relu"
    if activation is nn.functional.gelu:
        return "gelu"
    if not isinstance(activation, nn.Module) or hooked(activation):
        return None
    if type(activation) in (nn.GELU, GELU):
        return activation_name(str(activation.approximate))
    return "relu" if type(activation) is nn.ReLU else None


def _rate(m: nn.Dropout) -> float:
    return m.p if m.training else 0.0


def _weights(m: nn.MultiheadAttention) -> LayerWeights:
    """The fields of an attention block."""
    return LayerWeights(
        qkv=[m.in_proj_weight],
        qkv_bias=None if m.in_proj_bias is None else [m.in_proj_bias],
        out=m.out_proj.weight,
        out_bias=m.out_proj.bias,
    )


class MultiheadAttention(nn.MultiheadAttention):
    """torch.nn.MultiheadAttention; self-attention with batch_first=True and need_weights=False runs packed.

    The weights that torch.nn returns by default (need_weights=True) exist in its own code only, which then runs.
    """

    # accelerate()'s at_padding; "auto" is "zeros" here
    fastbert_at_padding = "auto"

    @replaces(nn.MultiheadAttention)
    def forward(
        self,
        query: Tensor,  # (B, S, C)
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,  # (B, S)
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        reason = _attention_reason(self, query)
        if query is not key or key is not value:
            reason = "query, key and value are not the same tensor"
        elif need_weights:
            reason = "the attention weights are asked for: pass need_weights=False"
        elif attn_mask is not None and not is_causal:
            reason = "attn_mask is set: pass is_causal=True if it is the causal one"
        batch = None
        if reason is None:
            batch, reason = _read(key_padding_mask, query, self.fastbert_at_padding)
        if batch is None or reason is not None:
            log_stock(self, reason)
            return super().forward(
                query,
                key,
                value,
                key_padding_mask,
                need_weights,
                attn_mask,
                average_attn_weights,
                is_causal,
            )
        rates = Rates(attention=self.dropout if self.training else 0.0)
        settings = LayerSettings(self.num_heads, rates=rates, causal=is_causal)
        y = attention_block(batch.packing.unpad(query), _weights(self), settings, batch.call())
        return batch.packing.pad(y), None


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """torch.nn.TransformerEncoderLayer, post- or pre-norm, GELU or ReLU, on packed tokens."""

    fastbert_at_padding = "auto"

    @replaces(nn.TransformerEncoderLayer)
    def forward(
        self,
        src: Tensor,  # (B, S, C)
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,  # (B, S)
        is_causal: bool = False,
    ) -> Tensor:
        reason = self.stock_reason(src)
        if src_mask is not None and not is_causal:
            reason = "src_mask is set: pass is_causal=True if it is the causal one"
        batch = None
        if reason is None:
            batch, reason = _read(src_key_padding_mask, src, self.fastbert_at_padding)
        if batch is None or reason is not None:
            log_stock(self, reason)
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        return batch.packing.pad(self.packed(batch.packing.unpad(src), batch, is_causal))

    def stock_reason(self, src: Tensor) -> str | None:
        """Why the packed path can't serve this layer and input, or None."""
        if reason := _attention_reason(self.self_attn, src):
            return reason
        if _activation(self) is None:
            return "the activation is neither GELU nor ReLU"
        for name in ("_sa_block", "_ff_block"):
            if name in self.__dict__:
                return f"its {name} was replaced"
        parts = (
            (nn.Linear, self.linear1, self.linear2),
            (nn.LayerNorm, self.norm1, self.norm2),
            (nn.Dropout, self.dropout, self.dropout1, self.dropout2),
            (nn.MultiheadAttention, self.self_attn),
        )
        for kind, *modules in parts:
            for m in modules:
                if reason := _changed(m, kind):
                    return reason
        return "a dropout is 1" if max(self.rates()) == 1.0 else None

    def rates(self) -> Rates:
        """The probabilities of dropout now."""
        attention = self.self_attn.dropout if self.self_attn.training else 0.0
        return Rates(attention, _rate(self.dropout1), _rate(self.dropout), _rate(self.dropout2))

    def packed(
        self,
        x: Tensor,  # (T, C)
        batch: _Batch,
        causal: bool = False,
        seed: Tensor | None = None,
        site: int = 0,
    ) -> Tensor:
        """The layer on packed tokens; its four dropouts take the sites from `site` on."""
        up, down, norm1, norm2 = self.linear1, self.linear2, self.norm1, self.norm2
        weights = _weights(self.self_attn)._replace(
            attention_norm=norm1.weight,
            attention_norm_bias=norm1.bias,
            up=up.weight,
            up_bias=up.bias,
            down=down.weight,
            down_bias=down.bias,
            output_norm=norm2.weight,
            output_norm_bias=norm2.bias,
        )
        rates = self.rates()
        settings = LayerSettings(
            self.self_attn.num_heads,
            _activation(self),
            norm1.eps,
            norm2.eps,
            rates,
            pre_norm=self.norm_first,
            causal=causal,
            inner_site=True,
        )
        seed = seed_for(max(rates), seed, x)
        return encoder_layer(x, weights, settings, batch.call(seed, site))


class TransformerEncoder(nn.TransformerEncoder):
    """torch.nn.TransformerEncoder of fastbert's layers: unpads once, pads once; a final norm sees tokens only."""

    fastbert_at_padding = "auto"

    @replaces(nn.TransformerEncoder)
    def forward(
        self,
        src: Tensor,  # (B, S, C)
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,  # (B, S)
        is_causal: bool | None = None,
    ) -> Tensor:
        causal = bool(is_causal)
        reason = self._stock_reason(src)
        if reason is None and mask is not None and not causal:
            causal = is_causal is None and _is_causal(mask, src.shape[1])
            reason = None if causal else "the mask is not the causal one"
        batch = None
        if reason is None:
            chosen = self.fastbert_at_padding
            if chosen == "stock" and src_key_padding_mask is not None:
                chosen = (
                    "zeros" if self._zeros_in_torch(src, mask, src_key_padding_mask) else "stock"
                )
            batch, reason = _read(src_key_padding_mask, src, chosen)
        if batch is None or reason is not None:
            log_stock(self, reason)
            return super().forward(src, mask, src_key_padding_mask, is_causal)
        x = batch.packing.unpad(src)
        seed = seed_for(max(max(layer.rates()) for layer in self.layers), None, x)
        for i, layer in enumerate(self.layers):
            x = layer.packed(x, batch, causal, seed, 4 * i)
        return batch.packing.pad(x if self.norm is None else self.norm(x))

    def _zeros_in_torch(self, src: Tensor, mask: Tensor | None, padding: Tensor) -> bool:
        """Whether torch.nn's encoder runs on nested tensors, without padding, and gives zeros there."""
        first = self.layers[0]
        if (
            mask is not None
            or first.training
            or not getattr(self, "use_nested_tensor", False)
            or not torch.backends.mha.get_fastpath_enabled()
            or torch.compiler.is_compiling()
            or torch.is_autocast_enabled()
        ):
            return False
        if torch.is_grad_enabled() and any(t.requires_grad for t in (src, *first.parameters())):
            return False
        hidden = _hides(padding)
        # with mask_check torch.nn does so only where all padding is on the right
        return not (
            getattr(self, "mask_check", True) and bool((hidden[:, :-1] & ~hidden[:, 1:]).any())
        )

    def _stock_reason(self, src: Tensor) -> str | None:
        for layer in self.layers:
            if not isinstance(layer, TransformerEncoderLayer):
                return f"the layers are {type(layer).__name__}: use fastbert.nn.TransformerEncoderLayer"
            if hooked(layer):
                return "hooks are attached to a layer"
            if reason := layer.stock_reason(src):
                return reason
        return None


def _hides(mask: Tensor) -> Tensor:
    """True at positions that a key_padding_mask hides."""
    return mask if mask.dtype == torch.bool else mask == float("-inf")


def _is_causal(mask: Tensor, length: int) -> bool:
    """Whether a mask hides exactly the columns right of the diagonal; one host sync, as in torch.nn."""
    if mask.shape != (length, length):
        return False
    hidden = _hides(mask)
    seen_is_zero = True if mask.dtype == torch.bool else bool((mask[~hidden] == 0).all())
    upper = torch.ones_like(hidden).triu(1)
    return seen_is_zero and torch.equal(hidden, upper)


# the class of ours that stands for one of torch.nn's inside a layer
_OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.LayerNorm: LayerNorm,
    nn.Linear: Linear,
    nn.MultiheadAttention: MultiheadAttention,
}
