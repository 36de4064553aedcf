"""Instructions that a warp's lanes execute together, as steps of the machine: STEPS lists them by opcode."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ptx import warp
from ptx.access import addresses, gather
from ptx.memory import PtxError
from ptx.program import Instruction, Vector

if TYPE_CHECKING:
    from ptx.machine import Machine
    from ptx.operands import Source, Step, Write

Array = np.ndarray[Any, np.dtype[Any]]


def _by_warp(m: Machine, read: Source) -> Array:
    return m.wide(read).reshape(-1, 32)


def _whole(mask: Array, ins: Instruction) -> Array:
    """(warps,) whether each warp takes part; raises for one that takes part with some lanes only."""
    warps = mask.reshape(-1, 32)
    some = warps.any(1)
    if not warps[some].all():
        raise PtxError("divergence", f"{ins.opcode} without all lanes of a warp")
    return some


def _spread(writes: list[Write], found: list[Array], some: Array, mask: Array) -> None:
    """Write registers (some warps, 32) to those warps' lanes."""
    for write, value in zip(writes, found, strict=True):
        whole = np.zeros((len(some), 32), np.uint32)
        whole[some] = value
        write(whole.ravel(), mask)


def ldmatrix(m: Machine, ins: Instruction) -> Step:
    to = ins.operands[0]
    assert isinstance(to, Vector)
    writes = [m.target(t, "b32") for t in to.parts]
    at, rows = addresses(m, ins.operands[1]), 8 * len(to.parts)

    def run(mask: Array) -> None:
        some = _whole(mask, ins)
        lanes = (mask & (m.lanes.in_warp < rows)).nonzero()[0]
        data = gather(m, "shared", m.wide(at)[lanes], 16, lanes)
        found = warp.ldmatrix(data.reshape(-1, rows, 16), "trans" in ins.modifiers)
        _spread(writes, found, some, mask)

    return m.together(None, run)


def mma(m: Machine, ins: Instruction) -> Step:
    operands = [o.parts if isinstance(o, Vector) else (o,) for o in ins.operands]
    writes = [m.target(t, "b32") for t in operands[0]]
    reads = [[m.source(r, "b32") for r in parts] for parts in operands[1:4]]
    size = int(np.prod(warp.shape_of(ins.modifiers)))

    def run(mask: Array) -> None:
        some = _whole(mask, ins)

        def bits(read: Source) -> Array:
            return _by_warp(m, read)[some].view(np.uint32)

        found = warp.mma(ins.modifiers, *([bits(r) for r in part] for part in reads))
        m.counts.macs += size * int(some.sum())
        _spread(writes, found, some, mask)

    return m.together(None, run)


def shfl(m: Machine, ins: Instruction) -> Step:
    mode = next(x for x in ins.modifiers if x in ("up", "down", "bfly", "idx"))
    write = m.target(ins.operands[0], "b32")
    found = m.target(ins.second, "pred") if ins.second else None
    value, by, clamp = (
        m.source(o, t) for o, t in zip(ins.operands[1:4], ("b32", "s32", "s32"), strict=True)
    )

    def run(mask: Array) -> None:
        parts = (_by_warp(m, s) for s in (value, by, clamp))
        result, inside = warp.shuffle(mode, *parts, mask.reshape(-1, 32))
        write(result.ravel(), mask)
        if found:
            found(inside.ravel(), mask)

    return m.together(ins.operands[4], run)


def vote(m: Machine, ins: Instruction) -> Step:
    mode = next(x for x in ins.modifiers if x in ("any", "all", "uni", "ballot"))
    write = m.target(ins.operands[0], "b32" if mode == "ballot" else "pred")
    value = m.source(ins.operands[1], "pred")

    def run(mask: Array) -> None:
        write(warp.vote(mode, _by_warp(m, value), mask.reshape(-1, 32)).ravel(), mask)

    return m.together(ins.operands[2], run)


def redux(m: Machine, ins: Instruction) -> Step:
    mode, type_ = ins.modifiers[1], ins.types[-1]
    type_ = type_.replace("b", "u")
    write, value = m.target(ins.operands[0], type_), m.source(ins.operands[1], type_)

    def run(mask: Array) -> None:
        write(warp.reduction(mode, _by_warp(m, value), mask.reshape(-1, 32)).ravel(), mask)

    return m.together(ins.operands[2], run)


def match(m: Machine, ins: Instruction) -> Step:
    write, value = m.target(ins.operands[0], "b32"), m.source(ins.operands[1], ins.types[-1])
    if "any" not in ins.modifiers:
        raise PtxError("unsupported", "match other than any")

    def run(mask: Array) -> None:
        write(warp.matching(_by_warp(m, value), mask.reshape(-1, 32)).ravel(), mask)

    return m.together(ins.operands[2], run)


def activemask(m: Machine, ins: Instruction) -> Step:
    write = m.target(ins.operands[0], "b32")
    return lambda mask: write(
        warp.vote("ballot", mask.reshape(-1, 32), mask.reshape(-1, 32)).ravel(), mask
    )


STEPS = {
    "ldmatrix": ldmatrix,
    "mma": mma,
    "shfl": shfl,
    "vote": vote,
    "redux": redux,
    "match": match,
    "activemask": activemask,
}
