"""How instructions read and write registers, and the steps of mov, cvta and setp.

A register is an array of unsigned bits, one element a lane. `Operands.source` makes a function that reads it as numbers
of an instruction's type, `target` one that writes them where a mask is set.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx import arithmetic, warp
from ptx.memory import LOCAL_WINDOW, SHARED_WINDOW, PtxError
from ptx.program import (
    SIZES,
    Function,
    Immediate,
    Instruction,
    Operand,
    Register,
    Symbol,
    Vector,
)

if TYPE_CHECKING:
    from ptx.machine import Machine

Array = np.ndarray[Any, np.dtype[Any]]
Source = Callable[[], Array]
Write = Callable[[Array, Array], None]
# runs an instruction for the lanes of a mask; returns groups (program counter, lanes), None if all lanes go on
Step = Callable[[Array], "list[tuple[int, Array]] | None"]


class Operands:
    """Registers of `count` lanes by function and name; names belong to the function `compiling`."""

    compiling: Function

    def __init__(self, count: int, special: dict[str, Array]) -> None:
        self.count, self.special = count, special
        self.all = np.ones(count, bool)
        self.registers: dict[str, Array] = {}
        self.symbols: dict[str, int] = {}

    def register(self, name: str) -> Array:
        """The lanes' values of a register of the function that is being compiled, as unsigned bits."""
        key = f"{self.compiling.name} {name}"
        if key not in self.registers:
            if name not in self.compiling.registers:
                raise PtxError("unsupported", f"register {name}")
            type_ = self.compiling.registers[name]
            dtype = np.dtype(bool) if type_ == "pred" else np.dtype(f"u{SIZES[type_]}")
            self.registers[key] = np.zeros(self.count, dtype)
        return self.registers[key]

    def source(self, operand: Operand, type_: str) -> Source:
        """A function that reads an operand as numbers of `type_`."""
        dtype = arithmetic.NUMPY[type_]
        if isinstance(operand, Immediate):
            return _constant(operand.value, type_)
        if isinstance(operand, Symbol):
            value = np.array([self.symbols[operand.name]], dtype)
            return lambda: value
        if isinstance(operand, Vector):
            return self._packed(operand, type_)
        if not isinstance(operand, Register):
            raise PtxError("unsupported", f"operand {operand}")
        if operand.name in self.special:
            value = self.special[operand.name].astype(dtype)
            return lambda: value
        bits = self.register(operand.name)
        if type_ == "pred":
            return (lambda: ~bits) if operand.negated else (lambda: bits)
        if type_ in ("f16x2", "bf16x2"):
            return lambda: warp.unpacked(bits, type_)
        size = SIZES[type_]
        if bits.dtype.itemsize != size:
            bits = bits.view(f"u{size}")[:: bits.dtype.itemsize // size]
        if type_ == "f16":
            half = bits.view(np.float16)
            return lambda: half.astype(np.float32)
        if type_ == "bf16":
            return lambda: (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
        view = bits.view(dtype)
        return lambda: view

    def _packed(self, operand: Vector, type_: str) -> Source:
        """{a, b, ...}: its parts side by side, the first lowest."""
        size = SIZES[type_] // len(operand.parts)
        parts = [self.source(p, f"b{8 * size}") for p in operand.parts]
        dtype = arithmetic.NUMPY[type_]

        def read() -> Array:
            columns = [self.wide(p) for p in parts]
            return np.stack(columns, 1).view(dtype)[:, 0]

        return read

    def wide(self, read: Source) -> Array:
        """A source's values, one for each lane, also of a literal."""
        values = read()
        return values if len(values) == self.count else np.broadcast_to(values, (self.count,))

    def target(self, operand: Operand, type_: str) -> Write:
        """A function that writes numbers of `type_` where its mask is set."""
        if isinstance(operand, Register) and operand.name == "_":
            return lambda value, mask: None
        if not isinstance(operand, Register):
            raise PtxError("unsupported", f"destination {operand}")
        bits = self.register(operand.name)
        encode = _encoder(type_, bits.dtype)
        everyone = self.all

        def write(value: Array, mask: Array) -> None:
            np.copyto(bits, encode(value), where=True if mask is everyone else mask)

        return write


def _constant(value: int | float, type_: str) -> Source:
    """A literal; a float as an integer operand stands for its bits."""
    dtype = arithmetic.NUMPY[type_]
    if type_ == "pred":
        array = np.array([bool(value)])
    elif isinstance(value, float):
        kind = np.float64 if SIZES[type_] == 8 else np.float32
        array = np.array([value], kind).view(dtype)
    elif arithmetic.floating(type_):
        array = np.array([value], dtype)
    else:
        array = np.array([value % 256 ** SIZES[type_]], f"u{SIZES[type_]}").view(dtype)
    return lambda: array


def _encoder(type_: str, register: np.dtype[Any]) -> Callable[[Array], Array]:
    """Numbers of `type_` as a register's bits; narrower integers are extended by their sign."""
    if type_ == "pred":
        return lambda v: v
    if type_ == "f16":
        return lambda v: v.astype(np.float16).view(np.uint16).astype(register)
    if type_ == "bf16":
        return lambda v: arithmetic.round_bf16(v).astype(register)
    if type_ in ("f16x2", "bf16x2"):
        return lambda v: warp.packed(v, type_)
    dtype = arithmetic.NUMPY[type_]
    if dtype.itemsize == register.itemsize:
        return lambda v: np.asarray(v, dtype).view(register)
    return lambda v: np.asarray(v, dtype).astype(register)


def mov(m: Machine, ins: Instruction) -> Step:
    """A copy, or a move between a register and its parts."""
    (to, value), type_ = ins.operands, ins.types[-1]
    if not isinstance(to, Vector):
        read, write = m.source(value, type_), m.target(to, type_)
        return lambda mask: write(read(), mask)
    # a register into its parts, the first lowest
    size = SIZES[type_] // len(to.parts)
    part = f"b{8 * size}"
    read = m.source(value, type_)
    writes = [m.target(p, part) for p in to.parts]

    def step(mask: Array) -> None:
        whole = np.ascontiguousarray(m.wide(read))
        parts = whole[:, None].view(arithmetic.NUMPY[part])
        for i, write in enumerate(writes):
            write(parts[:, i], mask)

    return step


def cvta(m: Machine, ins: Instruction) -> Step:
    """Converts between generic addresses and those of a window."""
    type_ = ins.types[-1]
    read, write = m.source(ins.operands[1], type_), m.target(ins.operands[0], type_)
    window = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW}
    shift = next((v for k, v in window.items() if k in ins.modifiers), 0)
    shift = np.array(-shift if "to" in ins.modifiers else shift).astype(np.int64).view(np.uint64)
    return lambda mask: write(read().view(np.uint64) + shift, mask)


def setp(m: Machine, ins: Instruction) -> Step:
    """A comparison, joined with a predicate where there is one; q gets the opposite."""
    type_, names = ins.types[-1], [m for m in ins.modifiers if m != "ftz" and m not in SIZES]
    if type_.endswith("x2"):
        raise PtxError("unsupported", "a comparison of pairs")
    a, b = (m.source(o, type_) for o in ins.operands[1:3])
    test = arithmetic.compare(names[0])
    write = m.target(ins.operands[0], "pred")
    other = m.target(ins.second, "pred") if ins.second else None
    join = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
    third = m.source(ins.operands[3], "pred") if len(names) > 1 else None

    def step(mask: Array) -> None:
        p = test(a(), b())
        q = ~p
        if third is not None:
            p, q = (join[names[1]](v, third()) for v in (p, q))
        write(p, mask)
        if other:
            other(q, mask)

    return step


STEPS = {"mov": mov, "cvta": cvta, "setp": setp}
