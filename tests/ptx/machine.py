"""A functional machine for PTX: every thread of some blocks is a lane of numpy arrays.

`launch` runs a kernel. Each instruction becomes a closure once per batch of blocks, and steps all lanes at that
instruction together. After a branch the group of lanes with the lowest program counter runs, so that groups meet again
where their branches do. `bar.sync` holds lanes until all of the block are there, a warp's `.sync` instruction until all
of its mask are. Not modelled: time, caches, memory order between blocks, flushing of denormals.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ptx import access, arithmetic, control, operands, together
from ptx.memory import LEGAL, WRITTEN, Buffer, Counts, Global, Lanes, PtxError, Shared, Space
from ptx.operands import Operands, Source, Step
from ptx.program import Function, Instruction, Operand, Program, Variable

Array = np.ndarray[Any, np.dtype[Any]]

# opcode -> function that makes its step; all other opcodes are arithmetic (arithmetic.rule) or hints
STEPS: dict[str, Callable[[Any, Instruction], Step]] = {
    **operands.STEPS,
    **access.STEPS,
    **together.STEPS,
    **control.STEPS,
}
HINTS = {"fence", "membar", "prefetch", "prefetchu", "nanosleep", "createpolicy", "applypriority"}
# lanes that are stepped together, and the number of branches after which a kernel counts as endless
BATCH, MOST = 4096, 300_000
GENERIC = 1 << 62  # the first address of a module's own variables


def launch(
    program: Program,
    kernel: str,
    grid: Sequence[int],
    block: Sequence[int],
    arguments: Sequence[bytes],
    buffers: list[Buffer],
    dynamic_shared: int = 0,
    counts: Counts | None = None,
) -> Counts:
    """Run a kernel on `buffers`, in place; `arguments` are the bytes of its parameters. Raises PtxError."""
    counts = counts if counts is not None else Counts()
    constants, symbols = _module_variables(program)
    memory = Global(buffers + constants)
    function = program.functions[kernel]
    if len(arguments) != len(function.parameters):
        raise ValueError(
            f"{kernel} takes {len(function.parameters)} arguments, not {len(arguments)}"
        )
    blocks = int(np.prod(grid))
    threads = -(-int(np.prod(block)) // 32) * 32
    step = max(1, BATCH // threads)
    try:
        for first in range(0, blocks, step):
            some = range(first, min(first + step, blocks))
            shape = (tuple(grid), tuple(block), some)
            machine = Machine(program, function, shape, dynamic_shared, memory, symbols, counts)
            machine.run(arguments)
    finally:
        memory.give_back(counts)
    return counts


def _module_variables(program: Program) -> tuple[list[Buffer], dict[str, int]]:
    """Buffers of initialised variables, at addresses that no process uses, and each variable's address."""
    found, symbols, at = [], {}, GENERIC
    for v in program.variables.values():
        if v.data is not None:
            data = np.frombuffer(v.data, np.uint8).copy()
            found.append(Buffer(at, data, np.full(len(data), LEGAL | WRITTEN, np.uint8), v.name))
            symbols[v.name], at = at, at + -(-len(data) // 256) * 256 + 256
    return found, symbols


class Machine(Operands):
    """Some blocks of one launch: `shape` is the grid, the block, and the numbers of these blocks."""

    def __init__(
        self,
        program: Program,
        function: Function,
        shape: tuple[tuple[int, ...], tuple[int, ...], range],
        dynamic_shared: int,
        memory: Global,
        symbols: dict[str, int],
        counts: Counts,
    ) -> None:
        self.program, self.entry, self.memory, self.counts = program, function, memory, counts
        grid, block, blocks = shape
        threads = int(np.prod(block))
        # a block's last warp is filled up with lanes that never run
        self.lanes = who = Lanes(len(blocks), -(-threads // 32) * 32)
        super().__init__(len(who.lane), _special(grid, block, blocks, who))
        self.all = who.lane % who.threads < threads
        self.live = self.all.copy()
        who.never(~self.all)
        self.functions = [function, *(f for f in program.functions.values() if not f.entry)]
        self.symbols = dict(symbols)
        shared = self._place("shared", [*program.variables.values()], dynamic_shared)
        self.shared = Shared(len(blocks), shared)
        self.local_size = self._place("local", [], 0)
        self.local_stride = -(-self.local_size // 16) * 16
        self.local = Space("local", self.count * self.local_stride, LEGAL)
        self.copies = access.Copies(self)
        # device functions: parameters (a row of bytes for each lane), first instructions, calling lanes and places
        self.frames: dict[str, Array] = {}
        self.starts: dict[str, int] = {}
        self.stack: list[tuple[Array, int]] = []
        self.returns: dict[int, list[tuple[Any, Variable]]] = {}
        # waiting lanes: at an instruction of a warp; the number of a block's barrier and the next instruction
        self.parked: dict[int, Array] = {}
        self.at_barrier = np.full(self.count, -1, np.int64)
        self.resume = np.zeros(self.count, np.int64)
        self.stuck, self.branches = (0, 0), 0

    def _place(self, space: str, variables: list[Variable], dynamic: int) -> int:
        """Give every variable of a space its offset in the window; the window's size."""
        at = 0
        own = [v for f in self.functions for v in f.variables.values()]
        for v in sorted([*variables, *own], key=lambda v: v.size == 0):
            if v.space == space:
                at = -(-at // v.align) * v.align
                self.symbols[v.name] = at
                at += v.size
        return at + dynamic

    def _compile(self) -> list[tuple[Step, Source | None, Instruction]]:
        code: list[tuple[Step, Source | None, Instruction]] = []
        at = 0
        for f in self.functions:
            self.starts[f.name] = at
            at += len(f.code) + 1
        for f in self.functions:
            self.compiling = f
            for ins in f.code:
                self.pc = len(code)
                guard = self.source(ins.guard, "pred") if ins.guard else None
                try:
                    code.append((self._step(ins), guard, ins))
                except (PtxError, LookupError, ValueError, StopIteration) as error:
                    raise PtxError("unsupported", f"{ins.line}: `{ins.text}`: {error}") from error
            end = Instruction("ret", (), (), None, None, "end", f"end of {f.name}")
            self.pc = len(code)
            code.append((self._step(end), None, end))
        return code

    def _step(self, ins: Instruction) -> Step:
        if ins.opcode in STEPS:
            return STEPS[ins.opcode](self, ins)
        if ins.opcode in HINTS:
            return lambda mask: None
        found = arithmetic.rule(ins)
        if found is None:
            raise PtxError("unsupported", "no such instruction here")
        types, result, function = found
        sources = [self.source(o, t) for o, t in zip(ins.operands[1:], types, strict=True)]
        write = self.target(ins.operands[0], result)

        def step(mask: Array) -> None:
            write(function(*[s() for s in sources]), mask)

        return step

    def frame(self, name: str) -> Array:
        """The bytes of a device function's parameter or result, (lanes, its size or more)."""
        if name not in self.frames:
            variables = [v for f in self.functions for v in (*f.variables.values(), *f.results)]
            size = next(v.size for v in variables if v.name == name)
            self.frames[name] = np.zeros((self.count, max(size, 64)), np.uint8)
        return self.frames[name]

    def together(self, members: Operand | None, run: Callable[[Array], None]) -> Step:
        """A step that runs for lanes once all lanes of their mask have reached it; until then they wait."""
        mask_of = self.source(members, "u32") if members is not None else None
        pc, bits = self.pc, np.uint32(1) << (self.lanes.in_warp.astype(np.uint32))

        def step(mask: Array) -> list[tuple[int, Array]] | None:
            if pc in self.parked:
                mask = mask | self.parked.pop(pc)
            if mask_of is not None and (mask & (bits & mask_of() == 0)).any():
                raise PtxError("divergence", "a lane is not in the mask that it passes")
            if mask is not self.all:
                here = np.bitwise_or.reduce((bits * mask).reshape(-1, 32), axis=1).repeat(32)
                alive = np.bitwise_or.reduce((bits * self.live).reshape(-1, 32), axis=1).repeat(32)
                needed = alive if mask_of is None else alive & mask_of()
                ready = mask & ((needed & ~here) == 0)
                if not ready.all() and (mask & ~ready).any():
                    self.parked[pc] = mask & ~ready
                    if not ready.any():
                        return []
                    mask = ready
            masks = np.unique(self.wide(mask_of)[mask]) if mask_of is not None else []
            if len(masks) > 1:
                # parts of a warp run one after the other
                for one in masks:
                    run(mask & (self.wide(mask_of) == one))  # type: ignore[arg-type]
            else:
                run(mask)
            return [(pc + 1, mask)]

        return step

    def run(self, arguments: Sequence[bytes]) -> None:
        """Step all lanes until they have ended."""
        self.parameters, at = b"", 0
        for v, given in zip(self.entry.parameters, arguments, strict=True):
            at = -(-len(self.parameters) // v.align) * v.align
            self.parameters = (
                self.parameters.ljust(at, b"\0") + given.ljust(v.size, b"\0")[: v.size]
            )
            self.symbols[v.name] = at
        with np.errstate(all="ignore"):
            code = self._compile()
            groups: dict[int, Array] = {0: self.all}
            while groups or self._release_waiting(groups):
                pc = min(groups)
                self._go(code, pc, groups.pop(pc), groups)
        self._check_all_ended(code)

    def _release_waiting(self, groups: dict[int, Array]) -> bool:
        """Step lanes again that wait for others of their warp, which may have ended; False if nothing changed."""
        waiting = sum(int(mask.sum()) for mask in self.parked.values()), int(self.live.sum())
        if not self.parked or waiting == self.stuck:
            return False
        self.stuck = waiting
        groups.update(self.parked)
        self.parked = {}
        return True

    def _go(
        self,
        code: list[tuple[Step, Source | None, Instruction]],
        pc: int,
        mask: Array,
        groups: dict[int, Array],
    ) -> None:
        """Run one group of lanes until it divides, ends, waits or meets another group."""
        meets = min(groups, default=len(code) + 1)
        warps, counted = self._warps(mask), self.counts.instructions
        while pc < meets:
            step, guard, ins = code[pc]
            taken, rest = mask, None
            try:
                if guard is not None:
                    chosen = guard()
                    taken = mask & chosen
                    if not taken.any():
                        pc += 1
                        continue
                    if taken.sum() == mask.sum():
                        taken = mask
                    else:
                        rest = mask & ~chosen
                counted[ins.kind] += warps if taken is mask else self._warps(taken)
                moves = step(taken)
            except PtxError as error:
                said = f"{error}; {ins.line}: `{ins.text}`"
                raise PtxError(error.kind, said, (self.entry.name, pc)) from error
            if moves is None:
                pc += 1
                continue
            self.branches += 1
            if self.branches > MOST:
                raise PtxError("endless", f"{self.entry.name} did not end in {MOST} branches")
            if rest is not None:
                moves = [*moves, (pc + 1, rest)]
            if len(moves) == 1 and not groups and moves[0][1] is mask:
                pc = moves[0][0]
                continue
            for to, some in moves:
                groups[to] = groups[to] | some if to in groups else some
            return
        groups[pc] = groups[pc] | mask if pc in groups else mask

    def _warps(self, mask: Array) -> int:
        return int(mask.reshape(-1, 32).any(1).sum())

    def _check_all_ended(self, code: list[tuple[Step, Source | None, Instruction]]) -> None:
        waits = self.at_barrier >= 0
        if not waits.any() and not self.parked:
            assert not self.live.any(), "lanes are neither waiting nor ended"
            return
        told = []
        for pc in sorted({*(self.resume[waits] - 1), *self.parked}):
            some = self.parked.get(pc, waits & (self.resume == pc + 1))
            ins = code[pc][2]
            told.append(f"{int(some.sum())} threads wait at {ins.line} `{ins.text}`")
        gone = int((self.all & ~self.live).sum())
        raise PtxError("divergence", f"{'; '.join(told)}; {gone} have ended")


def _special(
    grid: tuple[int, ...], block: tuple[int, ...], blocks: range, who: Lanes
) -> dict[str, Array]:
    """The special registers, for every lane."""
    thread = who.lane % who.threads
    number = np.array(blocks)[who.block]
    found: dict[str, Array] = {"%laneid": who.in_warp, "%warpid": thread // 32}
    for name, index, extent in (("tid", thread, block), ("ctaid", number, grid)):
        extent = (*extent, 1, 1, 1)[:3]
        for axis, size in zip("xyz", extent, strict=True):
            found[f"%{name}.{axis}"] = index % size
            found[f"%n{name}.{axis}"] = np.full_like(index, size)
            index = index // size
    for name, bits in {
        "eq": 1 << who.in_warp,
        "lt": (1 << who.in_warp) - 1,
        "le": (2 << who.in_warp) - 1,
        "gt": 0xFFFFFFFF & ~((2 << who.in_warp) - 1),
        "ge": 0xFFFFFFFF & ~((1 << who.in_warp) - 1),
    }.items():
        found[f"%lanemask_{name}"] = bits
    return found
