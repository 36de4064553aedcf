"""Public Triton kernels for the same work as an op of ours, called as their users call them.

liger-kernel and flash-mlm are imported where they are installed (`python benchmarks/peers/install.py kernels`), else
left out, as is flash-attn; the attention of Triton's tutorial is written in peers/tutorial_attention.py. Most cover
plain cases only: dense sequences of one length without dropout, and LayerNorm without a sum before it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

# a call and its arguments: those of our op, or its own
Call = tuple[Callable[..., Any], dict[str, Any]]
# peers without a backward
FORWARD_ONLY = ("flash-mlm",)


def _importable() -> None:
    """Put the folder of the peers' packages at the end of sys.path."""
    from benchmarks.peers.install import environment

    home = environment("kernels")
    if (home / "installed").is_file():
        sys.path += [
            str(p) for p in home.glob("lib/python*/site-packages") if str(p) not in sys.path
        ]


def of(slug: str, arguments: dict[str, Any]) -> dict[str, Call]:
    """{name: (call, its arguments)} of the peers that compute the same as this call of ours."""
    _importable()
    found: dict[str, Call] = {}
    for name, make in _MAKERS.get(slug, {}).items():
        try:
            call = make(arguments)
        except ImportError:
            continue
        if call is not None:
            found[name] = call
    return found


def _liger_norm(arguments: dict[str, Any]) -> Call:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return LigerLayerNormFunction.apply(x, weight, bias, 1e-12)

    return call, arguments


def _liger_loss(arguments: dict[str, Any]) -> Call:
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    def call(logits: Tensor, labels: Tensor) -> Tensor:
        # its forward overwrites the logits with their gradient
        return LigerCrossEntropyFunction.apply(logits, labels, None)[0]

    return call, arguments


def _liger_fused_loss(arguments: dict[str, Any]) -> Call:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    def call(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        return LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, labels, bias)[0]

    return call, arguments


def _dense(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """q, k and v (B, H, S, D), each contiguous, of sequences that all have max_seqlen tokens."""
    three = arguments["qkv"].unflatten(0, (-1, arguments["max_seqlen"])).permute(2, 0, 3, 1, 4)
    return {name: t.contiguous() for name, t in zip("qkv", three.unbind(0), strict=True)}


def _tutorial(arguments: dict[str, Any]) -> Call | None:
    from benchmarks.peers.tutorial_attention import attention

    plain = not arguments.get("p") and arguments["max_seqlen"] % 128 == 0
    return (attention, _dense(arguments)) if plain else None


def _flash_mlm(arguments: dict[str, Any]) -> Call | None:
    from flash_mlm.host import flash_attn_mlm

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn_mlm(q, k, v, scale=q.shape[-1] ** -0.5)

    # flash-mlm runs on a GPU only and has no dropout
    able = arguments["qkv"].is_cuda and not arguments.get("p")
    return (call, _dense(arguments)) if able else None


def _flash_attn(arguments: dict[str, Any]) -> Call:
    from flash_attn import flash_attn_varlen_qkvpacked_func

    def call(
        qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, p: float = 0.0, **rest: Any
    ) -> Tensor:
        return flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen, dropout_p=p)

    return call, arguments


_MAKERS: dict[str, dict[str, Callable[[dict[str, Any]], Call | None]]] = {
    "layer_norm": {"liger": _liger_norm},
    "cross_entropy": {"liger": _liger_loss},
    "mlm_loss": {"liger": _liger_fused_loss},
    "attention": {"tutorial": _tutorial, "flash-mlm": _flash_mlm, "flash-attn": _flash_attn},
}
