"""Branches, calls, ends and barriers, as steps of the machine; STEPS lists them by opcode."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ptx.memory import PtxError
from ptx.program import Instruction, Symbol, Vector

if TYPE_CHECKING:
    from ptx.machine import Machine
    from ptx.operands import Step

Array = np.ndarray[Any, np.dtype[Any]]


def bra(m: Machine, ins: Instruction) -> Step:
    """Jump to a label of the same function."""
    label = ins.operands[0]
    assert isinstance(label, Symbol)
    to = m.starts[m.compiling.name] + m.compiling.labels[label.name]
    return lambda mask: [(to, mask)]


def call(m: Machine, ins: Instruction) -> Step:
    """call (result), function, (arguments): parameters are copied, lane by lane."""
    parts = list(ins.operands)
    results = parts.pop(0).parts if isinstance(parts[0], Vector) else ()
    name = parts[0]
    given = parts[1].parts if len(parts) > 1 and isinstance(parts[1], Vector) else ()
    assert isinstance(name, Symbol)
    function, back = m.program.functions[name.name], m.pc + 1
    into = [(m.frame(v.name), p) for v, p in zip(function.parameters, given, strict=True)]
    out = [(p, v) for v, p in zip(function.results, results, strict=True)]

    def step(mask: Array) -> list[tuple[int, Array]]:
        for formal, actual in into:
            formal[mask] = m.frames[actual.name][mask]  # type: ignore[union-attr]
        m.stack.append((mask.copy(), back))
        return [(m.starts[function.name], mask)]

    m.returns[back] = out
    return step


def ret(m: Machine, ins: Instruction) -> Step:
    """Return to the last call of each lane, with its result; in a kernel, end the lanes."""
    if m.compiling.entry:
        return leave(m, ins)

    def step(mask: Array) -> list[tuple[int, Array]]:
        groups, left = [], mask.copy()
        for i in range(len(m.stack) - 1, -1, -1):
            callers, back = m.stack[i]
            some = left & callers
            if some.any():
                callers &= ~some
                left &= ~some
                for actual, formal in m.returns[back]:
                    m.frames[actual.name][some] = m.frame(formal.name)[some]
                groups.append((back, some))
        m.stack = [(callers, back) for callers, back in m.stack if callers.any()]
        return groups

    return step


def leave(m: Machine, ins: Instruction) -> Step:
    """End these lanes."""

    def step(mask: Array) -> list[tuple[int, Array]]:
        m.live &= ~mask
        return []

    return step


def trap(m: Machine, ins: Instruction) -> Step:
    """trap: an error that the kernel itself raises."""

    def step(mask: Array) -> None:
        raise PtxError("trap", f"in {m.lanes.describe(int(mask.argmax()))}")

    return step


def bar(m: Machine, ins: Instruction) -> Step:
    """bar.sync of a block, or bar.warp.sync of a warp's lanes: it orders their accesses before and after it."""
    if "warp" in ins.modifiers:
        return m.together(ins.operands[0], m.lanes.pass_warp)
    if "sync" not in ins.modifiers:
        raise PtxError("unsupported", "bar other than sync")
    number = m.source(ins.operands[0], "u32")
    of = m.source(ins.operands[1], "u32") if len(ins.operands) > 1 else None
    pc, who = m.pc, m.lanes

    def step(mask: Array) -> list[tuple[int, Array]]:
        numbers = m.wide(number)
        if (numbers[mask] > 15).any() or (of is not None and (m.wide(of)[mask] % 32).any()):
            raise PtxError("divergence", "a barrier above 15, or for a part of a warp")
        passed = [one(mask & (numbers == n)) for n in np.unique(numbers[mask])]
        return [group for groups in passed for group in groups]

    def one(mask: Array) -> list[tuple[int, Array]]:
        m.at_barrier[mask] = m.wide(number)[mask]
        m.resume[mask] = pc + 1
        here = (m.at_barrier == m.at_barrier[mask.argmax()]).reshape(-1, who.threads)
        wanted = m.all.reshape(here.shape).sum(1)
        if of is not None:
            wanted = m.wide(of)[mask][:1]
        full = ((here.sum(1) == wanted) & here.any(1)).repeat(who.threads) & here.ravel()
        if not full.any():
            return []
        if (m.resume[full] != pc + 1).any():
            raise PtxError("divergence", "threads of a block wait at different barriers")
        m.at_barrier[full] = -1
        who.pass_block(full)
        return [(pc + 1, full)]

    return step


STEPS = {
    "bra": bra,
    "call": call,
    "ret": ret,
    "exit": leave,
    "trap": trap,
    "bar": bar,
    "barrier": bar,
}
