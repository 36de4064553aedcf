"""Instructions that touch memory: each function makes the machine's step of one opcode, as STEPS lists them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx import arithmetic
from ptx.memory import (
    IN_FLIGHT,
    LOCAL_WINDOW,
    SHARED_WINDOW,
    PtxError,
    Space,
    sectors,
    wavefronts,
)
from ptx.program import SIZES, Address, Immediate, Instruction, Operand, Register, Symbol, Vector

if TYPE_CHECKING:
    from ptx.machine import Machine
    from ptx.operands import Source, Step

Array = np.ndarray[Any, np.dtype[Any]]
SPACES = ("global", "shared", "local", "param", "const")


def _space(ins: Instruction) -> str:
    return next((m for m in ins.modifiers if m in SPACES), "generic")


def addresses(m: Machine, operand: Operand) -> Source:
    """A function that returns every lane's address."""
    if not isinstance(operand, Address):
        raise PtxError("unsupported", f"address {operand}")
    wide = isinstance(operand.base, Register) and m.register(operand.base.name).dtype.itemsize == 8
    base = m.source(operand.base, "s64" if wide or isinstance(operand.base, Symbol) else "u32")
    if isinstance(operand.base, Immediate):
        raise PtxError("unsupported", "an absolute address")
    return lambda: base().astype(np.int64) + operand.offset


def _places(
    m: Machine, space: str, at: Array, lanes: Array
) -> Iterator[tuple[Space, Array, Array]]:
    """(memory, offsets in it, which of `lanes`) of these addresses; the value of a generic one gives its memory."""
    if space in ("global", "const"):
        yield m.memory, m.memory.offsets(at), np.arange(len(lanes))
    elif space == "shared":
        # an address beyond the window is invalid and not in another block's window
        inside = (at >= 0) & (at < m.shared.window)
        yield (
            m.shared,
            np.where(inside, at + m.lanes.block[lanes] * m.shared.window, -16),
            np.arange(len(lanes)),
        )
    elif space == "local":
        inside = (at >= 0) & (at < m.local_size)
        at = np.where(inside, at + lanes * m.local_stride, -16)
        yield m.local, at, np.arange(len(lanes))
    else:
        local, shared = at >= LOCAL_WINDOW, (at >= SHARED_WINDOW) & (at < LOCAL_WINDOW)
        own = at >= 1 << 60
        for name, some, base in (
            ("local", local & ~own, LOCAL_WINDOW),
            ("shared", shared, SHARED_WINDOW),
            ("global", own | ~(local | shared), 0),
        ):
            if some.any():
                for memory, offsets, which in _places(m, name, at[some] - base, lanes[some]):
                    yield memory, offsets, some.nonzero()[0][which]


def gather(m: Machine, space: str, at: Array, width: int, lanes: Array) -> Array:
    """Load `width` bytes for each of these lanes: (lanes, width)."""
    result = np.empty((len(lanes), width), np.uint8)
    for memory, offsets, which in _places(m, space, at, lanes):
        some = lanes[which]
        rows = memory.check(offsets, width, True, some, m.lanes)
        result[which] = memory.load(rows, width)
        if memory is m.shared:
            m.shared.reads(rows, width, some, m.lanes)
            _count_shared(m, offsets, width, some)
        elif memory is m.memory:
            m.memory.was_read(rows, width)
            _count_global(m, "load", offsets, width, some)
    return result


def scatter(m: Machine, space: str, at: Array, data: Array, lanes: Array) -> None:
    """Store the bytes (lanes, width)."""
    width = data.shape[1]
    for memory, offsets, which in _places(m, space, at, lanes):
        some = lanes[which]
        rows = memory.check(offsets, width, False, some, m.lanes)
        memory.store(rows, data[which])
        if memory is m.shared:
            m.shared.writes(rows, data[which], some, m.lanes)
            _count_shared(m, offsets, width, some)
        elif memory is m.memory:
            _count_global(m, "store", offsets, width, some)


def _count_global(m: Machine, what: str, offsets: Array, width: int, lanes: Array) -> None:
    m.counts.asked[what] += width * len(lanes)
    m.counts.sectors[what] += sectors(offsets, lanes, m.lanes)


def _count_shared(m: Machine, offsets: Array, width: int, lanes: Array) -> None:
    needed, least = wavefronts(offsets, width, lanes, m.lanes)
    m.counts.shared_wavefronts += needed
    m.counts.shared_accesses += least


def ld(m: Machine, ins: Instruction) -> Step:
    space, type_ = _space(ins), ins.types[-1]
    to = ins.operands[0]
    targets = list(to.parts) if isinstance(to, Vector) else [to]
    size = SIZES[type_]
    # a load moves bits; signed types are extended by their sign
    bits = type_ if type_[0] in "us" else f"b{8 * size}"
    writes = [m.target(t, bits) for t in targets]
    dtype, width = arithmetic.NUMPY[bits], size * len(targets)
    if space == "param":
        read = _parameter(m, ins.operands[1], width)
    else:
        at = addresses(m, ins.operands[1])

        def read(lanes: Array) -> Array:
            return gather(m, space, m.wide(at)[lanes], width, lanes)

    def step(mask: Array) -> None:
        lanes = mask.nonzero()[0]
        data = np.ascontiguousarray(read(lanes)).view(dtype)
        for i, write in enumerate(writes):
            value = np.zeros(m.count, dtype)
            value[lanes] = data[:, i]
            write(value, mask)

    return step


def _parameter(m: Machine, operand: Operand, width: int) -> Callable[[Array], Array]:
    """A function that reads a parameter: a kernel's is the same for all lanes, a device function's is not."""
    assert isinstance(operand, Address)
    base = operand.base
    if isinstance(base, Symbol) and base.name not in {v.name for v in m.entry.parameters}:
        frame = m.frame(base.name)
        return lambda lanes: frame[lanes, operand.offset : operand.offset + width]
    at, block = addresses(m, operand), np.frombuffer(m.parameters, np.uint8)

    def read(lanes: Array) -> Array:
        start = m.wide(at)[lanes]
        if (start < 0).any() or (start + width > len(block)).any():
            raise PtxError(
                "out-of-bounds", f"parameter bytes {start.min()} to {start.max() + width}"
            )
        return block[start[:, None] + np.arange(width)]

    return read


def st(m: Machine, ins: Instruction) -> Step:
    space, type_ = _space(ins), ins.types[-1]
    given = ins.operands[1]
    size = SIZES[type_]
    parts = given.parts if isinstance(given, Vector) else (given,)
    reads = [m.source(p, f"b{8 * size}") for p in parts]

    def data(lanes: Array) -> Array:
        columns = [m.wide(r)[lanes] for r in reads]
        return np.stack(columns, 1).view(np.uint8)

    target = ins.operands[0]
    if space == "param":
        assert isinstance(target, Address)
        assert isinstance(target.base, Symbol)
        frame, first = m.frame(target.base.name), target.offset

        def store_parameter(mask: Array) -> None:
            lanes = mask.nonzero()[0]
            frame[lanes, first : first + size * len(parts)] = data(lanes)

        return store_parameter
    at = addresses(m, target)

    def step(mask: Array) -> None:
        lanes = mask.nonzero()[0]
        scatter(m, space, m.wide(at)[lanes], data(lanes), lanes)

    return step


class Copies:
    """The copies of cp.async that are on their way. Their data is in shared memory once a wait has ended."""

    def __init__(self, m: Machine) -> None:
        self.m = m
        self.groups = np.zeros(m.count, np.int64)
        self.pending: list[tuple[Array, Array, Array, Array]] = []  # lanes, groups, rows, bytes

    def start(self, target: Array, data: Array, lanes: Array) -> None:
        """Start a copy of these bytes (lanes, width) to shared addresses."""
        m, width = self.m, data.shape[1]
        ((shared, offsets, _),) = _places(m, "shared", target, lanes)
        rows = shared.check(offsets, width, False, lanes, m.lanes)
        m.shared.writes(rows, data, lanes, m.lanes)
        shared.state.reshape(-1, width)[rows] |= IN_FLIGHT
        _count_shared(m, offsets, width, lanes)
        self.pending.append((lanes, self.groups[lanes], rows, data))

    def commit(self, mask: Array) -> None:
        """cp.async.commit_group."""
        self.groups[mask] += 1

    def wait(self, mask: Array, left: int | None) -> None:
        """Finish copies until at most `left` groups of a lane are on their way; None: all, committed or not."""
        still = []
        for lanes, groups, rows, data in self.pending:
            done = mask[lanes]
            if left is not None:
                done = done & (groups < self.groups[lanes] - left)
            if done.any():
                self.m.shared.store(rows[done], data[done])
                self.m.shared.writer.reshape(-1, data.shape[1])[rows[done]] = lanes[done][:, None]
                self.m.shared.wrote.reshape(-1, data.shape[1])[rows[done]] = self.m.lanes.clock
            if not done.all():
                still.append((lanes[~done], groups[~done], rows[~done], data[~done]))
        self.pending = still


def cp(m: Machine, ins: Instruction) -> Step:
    if "commit_group" in ins.modifiers:
        return m.copies.commit
    if "wait_all" in ins.modifiers:
        return lambda mask: m.copies.wait(mask, None)
    if "wait_group" in ins.modifiers:
        (left,) = ins.operands
        assert isinstance(left, Immediate)
        return lambda mask: m.copies.wait(mask, int(left.value))
    if "shared" not in ins.modifiers or "bulk" in ins.modifiers:
        raise PtxError("unsupported", "this form of cp")
    to, source = addresses(m, ins.operands[0]), addresses(m, ins.operands[1])
    assert isinstance(ins.operands[2], Immediate)
    width = int(ins.operands[2].value)
    count = m.source(ins.operands[3], "u32") if len(ins.operands) > 3 else None

    def step(mask: Array) -> None:
        lanes = mask.nonzero()[0]
        at = m.wide(source)[lanes]
        sizes = np.full(len(lanes), width) if count is None else m.wide(count)[lanes]
        data = np.zeros((len(lanes), width), np.uint8)
        if (sizes > width).any() or (at[sizes > 0] % width).any():
            raise PtxError(
                "misaligned", f"a source of cp.async is no multiple of {width}, or longer"
            )
        for size in np.unique(sizes[sizes > 0]):
            some = sizes == size
            if size == width:
                data[some] = gather(m, "global", at[some], width, lanes[some])
                continue
            for byte in range(int(size)):
                data[some, byte] = gather(m, "global", at[some] + byte, 1, lanes[some])[:, 0]
        m.copies.start(m.wide(to)[lanes], data, lanes)

    return step


_ATOMIC: dict[str, Callable[..., Any]] = {
    "add": lambda old, b: old + b,
    "min": min,
    "max": max,
    "and": lambda old, b: old & b,
    "or": lambda old, b: old | b,
    "xor": lambda old, b: old ^ b,
    "exch": lambda old, b: b,
    "cas": lambda old, b, c: c if old == b else old,
    "inc": lambda old, b: type(old)(0) if old >= b else old + type(old)(1),
}


def atom(m: Machine, ins: Instruction) -> Step:
    """An atomic of one lane after the other, one of the orders in which a GPU may execute them."""
    mode, type_ = next(x for x in ins.modifiers if x in _ATOMIC), ins.types[-1]
    operands = list(ins.operands)
    write = m.target(operands.pop(0), type_) if ins.opcode == "atom" else None
    at, space = addresses(m, operands.pop(0)), _space(ins)
    values = [m.source(o, type_) for o in operands]
    dtype, size = arithmetic.NUMPY[type_], SIZES[type_]
    if type_ in ("f16", "bf16", "f16x2", "bf16x2"):
        raise PtxError("unsupported", "atomics of 16-bit floats")

    def step(mask: Array) -> None:
        lanes = mask.nonzero()[0]
        places, given = (
            m.wide(at)[lanes],
            [m.wide(v)[lanes] for v in values],
        )
        result = np.zeros(m.count, dtype)
        for i, lane in enumerate(lanes):
            one = lanes[i : i + 1]
            for memory, offsets, _ in _places(m, space, places[i : i + 1], one):
                row = memory.check(offsets, size, True, one, m.lanes)
                if memory is m.shared:
                    m.shared.updates(row, size, one, m.lanes)
                elif memory is m.memory:
                    m.memory.was_read(row, size)
                old = memory.load(row, size).view(dtype)[0, 0]
                new = np.array([_ATOMIC[mode](old, *(g[i] for g in given))], dtype)
                memory.store(row, new.view(np.uint8)[None])
                result[lane] = old
        if write:
            write(result, mask)

    return step


STEPS = {"ld": ld, "st": st, "cp": cp, "atom": atom, "red": atom}
