"""The arithmetic of instructions of one lane, as functions of numpy arrays (PTX ISA 8.8, section 9.7.1 to 9.7.9).

Values of f16 and bf16 are fp32 arrays here, packed pairs (2, lanes); the machine rounds what it writes. Denormals are
kept where .ftz would flush them, and an .approx function is the exact one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ptx.memory import PtxError
from ptx.program import SIZES, Instruction

Array = np.ndarray[Any, np.dtype[Any]]
Op = Callable[..., Array]
# types of operands, of the result, and the function
Rule = tuple[list[str], str, Op]

NUMPY: dict[str, Any] = {f"b{n}": np.dtype(f"u{n // 8}") for n in (8, 16, 32, 64)}
NUMPY |= {f"u{n}": np.dtype(f"u{n // 8}") for n in (8, 16, 32, 64)}
NUMPY |= {f"s{n}": np.dtype(f"i{n // 8}") for n in (8, 16, 32, 64)}
NUMPY |= {t: np.dtype(np.float32) for t in ("f16", "bf16", "f16x2", "bf16x2", "f32", "tf32")}
NUMPY |= {"f64": np.dtype(np.float64), "pred": np.dtype(bool)}
DIRECTED = {"rm", "rp", "rz"}


def floating(type_: str) -> bool:
    """Whether a type is a floating-point type."""
    return "f" in type_


def round_bf16(x: Array) -> Array:
    """fp32 to the bits of bf16, to nearest even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def to_tf32(x: Array) -> Array:
    """fp32 to the nearest number with 10 bits of mantissa, ties away from zero (.rna)."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits + 0x1000) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isnan(x), np.float32(np.nan), rounded)


def _directed(exact: Array, type_: str, modifiers: tuple[str, ...]) -> Array:
    """The fp64 result as `type_`, rounded to nearest, or down (.rm), up (.rp), to zero (.rz)."""
    if type_ == "f64":
        return exact
    near = exact.astype(np.float32)
    for mode, wrong in (
        ("rm", near > exact),
        ("rp", near < exact),
        ("rz", np.abs(near) > np.abs(exact)),
    ):
        if mode in modifiers:
            towards = {"rm": -np.inf, "rp": np.inf, "rz": 0.0}[mode]
            near = np.where(wrong, np.nextafter(near, np.float32(towards)), near)
    return near


def _saturated(ins: Instruction, op: Op) -> Op:
    if "sat" in ins.modifiers:
        return lambda *a: np.nan_to_num(np.clip(op(*a), 0.0, 1.0), nan=0.0)
    if "relu" in ins.modifiers:
        return lambda *a: np.fmax(op(*a), np.float32(0.0))
    return op


def _in_double(ins: Instruction, type_: str, op: Op) -> Op:
    """The op in fp64, then rounded as its modifiers say. An fp32 fma is thus rounded twice, which rarely matters."""
    return lambda *a: _directed(op(*(x.astype(np.float64) for x in a)), type_, ins.modifiers)


def _divide(a: Array, b: Array) -> Array:
    """The quotient, truncated towards zero; all bits are one where b is 0."""
    if a.dtype.kind == "u":
        return np.where(b == 0, ~np.zeros_like(a), a // np.where(b == 0, 1, b))
    # the least signed number's magnitude does not fit its type
    size = np.dtype(f"u{a.dtype.itemsize}")
    quotient = (np.abs(a).view(size) // np.abs(np.where(b == 0, 1, b)).view(size)).view(a.dtype)
    return np.where(b == 0, -1, np.where((a < 0) != (b < 0), -quotient, quotient)).astype(a.dtype)


def _remainder(a: Array, b: Array) -> Array:
    return np.where(b == 0, a, a - _divide(a, b) * b).astype(a.dtype)


def _high(a: Array, b: Array) -> Array:
    """The upper half of a product."""
    bits = 8 * a.dtype.itemsize
    if bits < 64:
        wide = np.dtype(f"{a.dtype.kind}8")
        return ((a.astype(wide) * b.astype(wide)) >> wide.type(bits)).astype(a.dtype)
    x, y = a.view(np.uint64), b.view(np.uint64)
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    x0, x1, y0, y1 = x & low, x >> half, y & low, y >> half
    middle = x1 * y0 + ((x0 * y0) >> half)
    other = x0 * y1 + (middle & low)
    high = x1 * y1 + (middle >> half) + (other >> half)
    if a.dtype.kind == "i":
        high = (
            high - np.where(a < 0, y, 0).astype(np.uint64) - np.where(b < 0, x, 0).astype(np.uint64)
        )
    return high.view(a.dtype)


def _wide(a: Array, b: Array) -> Array:
    wide = np.dtype(f"{a.dtype.kind}{2 * a.dtype.itemsize}")
    return a.astype(wide) * b.astype(wide)


def _shift(left: bool) -> Op:
    def shift(a: Array, by: Array) -> Array:
        bits = 8 * a.dtype.itemsize
        most = np.minimum(by, bits - 1).astype(a.dtype)
        shifted = a << most if left else a >> most
        return shifted if a.dtype.kind == "i" and not left else np.where(by >= bits, 0, shifted)

    return shift


def _extract(a: Array, at: Array, count: Array) -> Array:
    """bfe: `count` bits from `at` on, extended for signed types by the last bit of the field that exists."""
    bits = 8 * a.dtype.itemsize
    wide = a.astype(np.int64).astype(object) if bits == 64 else a.astype(np.int64)
    n = np.minimum(count & 0xFF, bits).astype(np.int64)
    start = np.minimum(at & 0xFF, bits).astype(np.int64)
    unsigned = (wide & ((1 << bits) - 1)) >> start
    one = np.ones_like(wide)
    field = unsigned & ((one << n) - 1)
    if a.dtype.kind == "i":
        there = np.minimum(n, bits - start)
        # a field beyond the end holds the sign only
        field = np.where((n > 0) & (there == 0), -((wide >> (bits - 1)) & 1), field)
        sign = (unsigned >> np.maximum(there - 1, 0)) & 1
        field = np.where((there > 0) & (sign == 1), field - (one << there), field)
    return field.astype(np.int64).astype(a.dtype) if bits < 64 else field.astype(a.dtype)


def _insert(a: Array, b: Array, at: Array, count: Array) -> Array:
    """bfi: b with `count` bits from `at` on taken from a."""
    wide, into = a.astype(np.uint64), b.astype(np.uint64)
    n, start = (np.minimum(v & 0xFF, 63).astype(np.uint64) for v in (count, at))
    one = np.uint64(1)
    bits = np.where(count & 0xFF > 63, ~np.uint64(0), (one << n) - one)
    mask = np.where(at & 0xFF > 63, np.uint64(0), bits << start)
    return ((into & ~mask) | ((wide << start) & mask)).astype(a.dtype)


def _permute(a: Array, b: Array, select: Array) -> Array:
    """prmt: each nibble of `select` picks one of 8 bytes, or its sign."""
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    result = np.zeros(np.broadcast(a, b, select).shape, np.uint32)
    for i in range(4):
        nibble = (select >> np.uint32(4 * i)) & np.uint32(0xF)
        byte = (
            (both >> ((nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(0xFF)
        ).astype(np.uint32)
        sign = np.where(byte & 0x80, 0xFF, 0).astype(np.uint32)
        result |= np.where(nibble & 8, sign, byte) << np.uint32(8 * i)
    return result


def _logic3(a: Array, b: Array, c: Array, table: Array) -> Array:
    result = np.zeros_like(a | b | c)
    for i in range(8):
        term = (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        result |= np.where((table >> np.uint32(i)) & 1, term, 0).astype(result.dtype)
    return result


def _funnel(left: bool, wrap: bool) -> Op:
    def shift(a: Array, b: Array, c: Array) -> Array:
        n = (c & 31 if wrap else np.minimum(c, 32)).astype(np.uint64)
        both = (b.astype(np.uint64) << np.uint64(32)) | a
        moved = (both << n) >> np.uint64(32) if left else both >> n
        return moved.astype(np.uint32)

    return shift


def _reversed(a: Array) -> Array:
    bits = np.unpackbits(a.view(np.uint8).reshape(len(a), -1), axis=1, bitorder="little")
    return np.packbits(bits[:, ::-1], axis=1, bitorder="little").view(a.dtype).ravel()


def _leading_zeros(a: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    return sum((a >> a.dtype.type(i) == 0).astype(np.uint32) for i in range(bits))  # type: ignore[return-value]


_FLOAT: dict[str, Op] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "fma": lambda a, b, c: a * b + c,
    "mad": lambda a, b, c: a * b + c,
    "neg": np.negative,
    "abs": np.abs,
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
    "sqrt": np.sqrt,
    "rsqrt": lambda a: 1.0 / np.sqrt(a),
    "rcp": lambda a: 1.0 / a,
}
# instructions whose fp32 results need more precision in between
_DOUBLE = {"fma", "mad", "div", "rcp", "sqrt", "rsqrt"}
_SELECT: dict[str, Op] = {
    "min": np.fmin,
    "max": np.fmax,
    "copysign": lambda a, b: np.copysign(b, a),
}
_INTEGER: dict[str, Op] = {
    "add": np.add,
    "sub": np.subtract,
    "div": _divide,
    "rem": _remainder,
    "min": np.minimum,
    "max": np.maximum,
    "neg": np.negative,
    "abs": np.abs,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "cnot": lambda a: (a == 0).astype(a.dtype),
    "brev": _reversed,
    "prmt": _permute,
    "lop3": _logic3,
    "sad": lambda a, b, c: np.where(a > b, a - b, b - a) + c,
}
_COMPARE: dict[str, Op] = {
    "eq": np.equal,
    "ne": lambda a, b: ~(np.isnan(a) | np.isnan(b)) & (a != b) if a.dtype.kind == "f" else a != b,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}
_COMPARE |= {"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}


def compare(name: str) -> Op:
    """A comparison of setp; a name that ends in u holds for NaN too."""
    if name in _COMPARE:
        return _COMPARE[name]
    ordered = _COMPARE[name[:-1]]
    return lambda a, b: np.isnan(a) | np.isnan(b) | ordered(a, b)


def convert(ins: Instruction) -> Rule:
    """cvt of one value, or of two floats to a pair; the first operand becomes the upper half."""
    to, source = ins.types[0], ins.types[-1]
    if (
        SIZES[to] == 2 and floating(to) and DIRECTED & set(ins.modifiers)
    ) or "relu" in ins.modifiers:
        raise PtxError("unsupported", "this rounding")
    if to in ("f16x2", "bf16x2"):
        return [source, source], to, _saturated(ins, lambda a, b: np.stack([b, a]))
    target = NUMPY[to]
    if floating(source) and floating(to):
        whole = {"rni": np.rint, "rmi": np.floor, "rpi": np.ceil, "rzi": np.trunc}
        for mode, op in whole.items():
            if mode in ins.modifiers:
                return [source], to, _saturated(ins, op)
        if to == "tf32":
            return [source], "f32", to_tf32
        if to == "f32" and source == "f64":
            return [source], to, lambda a: _directed(a, "f32", ins.modifiers)
        return [source], to, _saturated(ins, lambda a: a.astype(target))
    if floating(to):
        return [source], to, lambda a: _directed(a.astype(np.float64), to, ins.modifiers)
    if floating(source):
        whole = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
        op = next(f for mode, f in whole.items() if mode in ins.modifiers)
        info = np.iinfo(target)

        def to_integer(a: Array) -> Array:
            wide = np.nan_to_num(op(a.astype(np.float64)), nan=0.0)
            exact = np.clip(wide, float(info.min), float(info.max))
            inside = exact < float(info.max)
            return np.where(inside, np.where(inside, exact, 0).astype(target), info.max).astype(
                target
            )

        return [source], to, to_integer
    if "sat" in ins.modifiers:
        info = np.iinfo(target)
        return (
            [source],
            to,
            lambda a: np.clip(a.astype(np.int64), info.min, info.max).astype(target),
        )
    return [source], to, lambda a: a.astype(target)


_REFUSED = {"f4e", "b4e", "rc8", "ecl", "ecr", "rc16", "xorsign", "satfinite", "cc"}


def rule(ins: Instruction) -> Rule | None:
    """(types of operands, type of the result, function) of an instruction, None for one that is not in this file."""
    op, count = ins.opcode, len(ins.operands) - 1
    if _REFUSED & set(ins.modifiers) or (op == "lop3" and ins.second):
        return None
    if op == "cvt":
        return convert(ins)
    if not ins.types:
        return None
    t = ins.types[-1]
    if "sat" in ins.modifiers and not floating(t):
        return None
    if op == "selp":
        return [t, t, "pred"], t, lambda a, b, c: np.where(c, a, b)
    if op == "slct":
        to = ins.types[0]
        return [to, to, t], to, lambda a, b, c: np.where(c >= 0, a, b)
    if floating(t):
        if op in _SELECT:
            both = {"min": np.minimum, "max": np.maximum}
            chosen = both.get(op, _SELECT[op]) if "NaN" in ins.modifiers else _SELECT[op]
            return [t] * count, t, chosen
        if op not in _FLOAT:
            return None
        double = op in _DOUBLE or DIRECTED & set(ins.modifiers)
        done = _in_double(ins, "f64" if t == "f64" else "f32", _FLOAT[op]) if double else _FLOAT[op]
        return [t] * count, t, _saturated(ins, done)
    if op in ("mul", "mad") and "wide" in ins.modifiers:
        wide = f"{t[0]}{2 * int(t[1:])}"
        types = [t, t, wide][:count]
        return types, wide, _wide if op == "mul" else lambda a, b, c: _wide(a, b) + c
    if op in ("mul", "mad"):
        product = _high if "hi" in ins.modifiers else np.multiply
        return [t] * count, t, product if op == "mul" else lambda a, b, c: product(a, b) + c
    return _integer(ins, op, t, count)


def _integer(ins: Instruction, op: str, t: str, count: int) -> Rule | None:
    if op in ("shl", "shr"):
        return [t, "u32"], t, _shift(op == "shl")
    if op == "shf":
        return ["u32"] * 3, "u32", _funnel("l" in ins.modifiers, "wrap" in ins.modifiers)
    if op == "bfe":
        return [t, "u32", "u32"], t, _extract
    if op == "bfi":
        return [t, t, "u32", "u32"], t, _insert
    if op == "popc":
        return [t], "u32", lambda a: np.bitwise_count(a).astype(np.uint32)
    if op == "clz":
        return [t], "u32", _leading_zeros
    if op == "not" and t == "pred":
        return [t], t, np.logical_not
    if op in _INTEGER and SIZES[t] in (1, 2, 4, 8):
        return [t] * count, t, _INTEGER[op]
    return None
