"""Instructions in which a warp's lanes work together: shuffles, votes, reductions, ldmatrix and mma.sync.

PTX ISA 8.8, sections 9.7.9 and 9.7.14. An instruction runs once every lane of its mask has reached it, so each function
takes whole warps. Fragments follow one rule for all element sizes: lane = 4 group + t, and a register holds `per`
neighbouring elements, so register r of A is row group + 8 (r % 2), columns per t + 4 per (r / 2) on; of B it is column
group, rows per t + 4 per r on; element i of C is row group + 8 (i / 2), column 2 t + i % 2.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from ptx.arithmetic import NUMPY, round_bf16
from ptx.memory import PtxError

Array = np.ndarray[Any, np.dtype[Any]]

LANE = np.arange(32)
GROUP, T = LANE // 4, LANE % 4


def shuffle(mode: str, value: Array, by: Array, clamp: Array, active: Array) -> tuple[Array, Array]:
    """shfl.sync of (warps, 32): (each lane's result, whether its source was in range)."""
    by, limit, segment = by & 31, clamp & 31, (clamp >> 8) & 31
    lane = np.broadcast_to(LANE, value.shape)
    last, first = (lane & segment) | (limit & ~segment & 31), lane & segment
    source = {
        "up": lane - by,
        "down": lane + by,
        "bfly": lane ^ by,
        "idx": first | (by & ~segment & 31),
    }[mode]
    inside = source >= last if mode == "up" else source <= last
    source = np.where(inside, source, lane)
    absent = active & ~np.take_along_axis(active, source, 1)
    if absent.any():
        w, i = (int(k[0]) for k in absent.nonzero())
        raise PtxError("shuffle", f"lane {i} reads lane {source[w, i]}, which takes no part")
    return np.take_along_axis(value, source, 1), inside


def vote(mode: str, value: Array, active: Array) -> Array:
    """vote.sync of predicates (warps, 32): a predicate, or for ballot 32 bits, the same for every lane."""
    if mode == "ballot":
        bits = ((value & active).astype(np.uint64) << LANE.astype(np.uint64)).sum(1)
        return np.broadcast_to(bits.astype(np.uint32)[:, None], value.shape)
    some, every = (value & active).any(1), (value | ~active).all(1)
    result = {"any": some, "all": every, "uni": every | ~some}[mode]
    return np.broadcast_to(result[:, None], value.shape)


_REDUCTIONS: dict[str, tuple[np.ufunc, Any]] = {
    "add": (np.add, lambda info: 0),
    "min": (np.minimum, lambda info: info.max),
    "max": (np.maximum, lambda info: info.min),
    "and": (np.bitwise_and, lambda info: -1 if info.min else info.max),
    "or": (np.bitwise_or, lambda info: 0),
    "xor": (np.bitwise_xor, lambda info: 0),
}


def reduction(mode: str, value: Array, active: Array) -> Array:
    """redux.sync of integers (warps, 32), wrapping."""
    ufunc, neutral = _REDUCTIONS[mode]
    filled = np.where(active, value, value.dtype.type(neutral(np.iinfo(value.dtype))))
    return np.broadcast_to(ufunc.reduce(filled, axis=1, dtype=value.dtype)[:, None], value.shape)


def matching(value: Array, active: Array) -> Array:
    """match.any.sync: the mask of lanes with the same value."""
    same = (value[:, :, None] == value[:, None, :]) & active[:, None, :]
    return (same.astype(np.uint64) << LANE.astype(np.uint64)).sum(2).astype(np.uint32)


def ldmatrix(rows: Array, transposed: bool) -> list[Array]:
    """Registers (warps, 32) of 8x8 matrices whose rows of 16 bytes lanes 8 i to 8 i + 7 address: (warps, 8 n, 16)."""
    halves = rows.view(np.uint16).reshape(len(rows), -1, 8, 8)
    if transposed:
        halves = halves.swapaxes(2, 3)
    pairs = np.ascontiguousarray(halves).view(np.uint32)
    return [pairs[:, m, GROUP, T] for m in range(pairs.shape[1])]


def shape_of(modifiers: tuple[str, ...]) -> tuple[int, int, int]:
    """(m, n, k) of mma.sync."""
    found = next(filter(None, (re.fullmatch(r"m(\d+)n(\d+)k(\d+)", m) for m in modifiers)))
    return int(found[1]), int(found[2]), int(found[3])


def _elements(registers: list[Array], type_: str) -> Array:
    """(warps, registers, 32, per): the numbers that 32-bit registers hold."""
    bits = np.stack(registers, 1)
    if type_ == "tf32":
        # the hardware ignores the bits that tf32 does not have
        return (bits & np.uint32(0xFFFFE000)).view(np.float32)[..., None]
    if type_ == "bf16":
        low, high = bits << np.uint32(16), bits & np.uint32(0xFFFF0000)
        return np.stack([low, high], -1).view(np.float32)
    kind = np.float16 if type_ == "f16" else NUMPY[type_]
    wide = np.float32 if type_ == "f16" else np.int32
    return bits[..., None].view(kind).astype(wide)


def mma(modifiers: tuple[str, ...], a: list[Array], b: list[Array], c: list[Array]) -> list[Array]:
    """D = A B + C for whole warps: registers in and out as bits, (warps, 32) each."""
    m, n, k = shape_of(modifiers)
    out, a_type, b_type, in_type = [t for t in modifiers if t in NUMPY][:4]
    if (m, n) != (16, 8) or "row" not in modifiers or "col" not in modifiers:
        raise PtxError("unsupported", f"mma.sync {'.'.join(modifiers)}")
    left, right = _elements(a, a_type), _elements(b, b_type)
    warps, per = len(left), left.shape[-1]
    wide = left.dtype
    A, B = np.zeros((warps, m, k), wide), np.zeros((warps, k, n), wide)
    for r in range(left.shape[1]):
        for e in range(per):
            A[:, GROUP + 8 * (r % 2), per * T + e + 4 * per * (r // 2)] = left[:, r, :, e]
    for r in range(right.shape[1]):
        for e in range(per):
            B[:, per * T + e + 4 * per * r, GROUP] = right[:, r, :, e]
    if in_type == "f16":
        C = np.stack([half.astype(np.float32) for r in c for half in _halves(r)], 1)
    else:
        C = np.stack([r.view(NUMPY[in_type]) for r in c], 1)
    D = A @ B
    rows, columns = (
        GROUP[None] + 8 * (np.arange(4)[:, None] // 2),
        2 * T[None] + np.arange(4)[:, None] % 2,
    )
    values = D[:, rows, columns] + C
    if out == "f16":
        bits = values.astype(np.float16).view(np.uint16).astype(np.uint32)
        return [bits[:, 2 * i] | bits[:, 2 * i + 1] << np.uint32(16) for i in range(2)]
    return [np.ascontiguousarray(values[:, i]).view(np.uint32) for i in range(4)]


def _halves(bits: Array) -> list[Array]:
    pair = np.ascontiguousarray(bits)[..., None].view(np.float16)
    return [pair[..., 0], pair[..., 1]]


def packed(pair: Array, type_: str) -> Array:
    """Two fp32 (2, lanes) as the bits of f16x2 or bf16x2."""
    halves = pair.astype(np.float16).view(np.uint16) if type_ == "f16x2" else round_bf16(pair)
    return halves[0].astype(np.uint32) | halves[1].astype(np.uint32) << np.uint32(16)


def unpacked(bits: Array, type_: str) -> Array:
    """The bits of f16x2 or bf16x2 as two fp32 (2, lanes)."""
    if type_ == "f16x2":
        return np.stack([h.astype(np.float32) for h in _halves(bits)])
    return np.stack([bits << np.uint32(16), bits & np.uint32(0xFFFF0000)]).view(np.float32)
