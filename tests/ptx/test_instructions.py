"""Instructions give the results that the PTX ISA defines."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ptx.snippets import run


def computed(operation, *operands, out="u32"):
    """One instruction's result for lanes of these 32-bit operands."""
    count = len(operands[0])
    x = np.stack([np.asarray(o).view(np.uint32) for o in operands], 1)
    loads = "".join(
        f"mul.wide.u32 %rd6, %r1, {4 * len(operands)}; add.s64 %rd6, %rd1, %rd6;"
        f"ld.global.u32 %r{10 + i}, [%rd6+{4 * i}];"
        for i in range(len(operands))
    )
    y, _ = run(f"{loads}\n{operation}\nst.global.u32 [%rd5], %r6;", count, x=x, y_size=4 * count)
    return y.view({"u32": np.uint32, "s32": np.int32, "f32": np.float32}[out])


A = np.array([0, 1, 0x80000000, 0xFFFFFFFF, 12345678, 0xDEADBEEF, 7, 31], np.uint32)
B = np.array([5, 0xFFFFFFFF, 3, 2, 87654321, 0x01020304, 40, 31], np.uint32)
INTEGER = {
    "mul.hi.u32 %r6, %r10, %r11;": lambda a, b: a * b >> 32,
    "mul.hi.s32 %r6, %r10, %r11;": lambda a, b: signed(a) * signed(b) >> 32,
    "mad.lo.s32 %r6, %r10, %r11, %r10;": lambda a, b: a * b + a,
    "shl.b32 %r6, %r10, %r11;": lambda a, b: a << b if b < 32 else 0,
    "shr.s32 %r6, %r10, %r11;": lambda a, b: signed(a) >> min(b, 31),
    "shr.u32 %r6, %r10, %r11;": lambda a, b: a >> b if b < 32 else 0,
    "div.s32 %r6, %r10, %r11;": lambda a, b: int(signed(a) / signed(b)),
    "rem.s32 %r6, %r10, %r11;": lambda a, b: signed(a) - int(signed(a) / signed(b)) * signed(b),
    "min.s32 %r6, %r10, %r11;": lambda a, b: min(signed(a), signed(b)),
    "bfe.u32 %r6, %r10, 4, 8;": lambda a, b: a >> 4 & 255,
    "bfe.s32 %r6, %r10, 28, 8;": lambda a, b: signed(a) >> 28,
    "bfi.b32 %r6, %r10, %r11, 8, 4;": lambda a, b: b & ~0xF00 | (a & 15) << 8,
    "prmt.b32 %r6, %r10, %r11, 0x1654;": lambda a, b: b & 0xFFFFFF | (a >> 8 & 255) << 24,
    "lop3.b32 %r6, %r10, %r11, %r10, 0x3c;": lambda a, b: a ^ b,
    "shf.l.wrap.b32 %r6, %r10, %r11, 8;": lambda a, b: b << 8 | a >> 24,
    "popc.b32 %r6, %r10;": lambda a, b: bin(a).count("1"),
    "clz.b32 %r6, %r10;": lambda a, b: 32 - a.bit_length(),
    "brev.b32 %r6, %r10;": lambda a, b: int(f"{a:032b}"[::-1], 2),
    "{ .reg .b64 %w; mul.wide.u32 %w, %r10, %r11; shr.u64 %w, %w, 7; cvt.u32.u64 %r6, %w; }": lambda a, b: (
        a * b >> 7
    ),
    "setp.lt.and.s32 %p1|%p2, %r10, %r11, !%p3; selp.u32 %r6, 1, 2, %p1;": lambda a, b: (
        1 if signed(a) < signed(b) else 2
    ),
}


def signed(a):
    return a - 2**32 if a >= 2**31 else a


@pytest.mark.parametrize("operation", INTEGER)
def test_integers(operation):
    expected = [INTEGER[operation](int(a), int(b)) % 2**32 for a, b in zip(A, B, strict=True)]
    assert computed(operation, A, B).tolist() == expected


X = np.array([0.0, -1.5, 2.5, 3.0e38, -0.75, 1e-3, 65519.0, np.nan], np.float32)
Y = np.array([1.0, 2.0, -0.5, 10.0, 0.25, 3.0, 1.0, 1.0], np.float32)
FLOAT = {
    "fma.rn.f32 %f3, %f1, %f2, %f1;": lambda x, y: (x.astype(float) * y + x).astype(np.float32),
    "max.f32 %f3, %f1, %f2;": np.fmax,
    "div.rn.f32 %f3, %f1, %f2;": np.divide,
    "ex2.approx.f32 %f3, %f2;": lambda x, y: np.exp2(y),
    "copysign.f32 %f3, %f1, %f2;": lambda x, y: np.copysign(y, x),
    "cvt.rna.tf32.f32 %r7, %f1; mov.b32 %f3, %r7;": lambda x, y: (
        (x.view(np.uint32) + 0x1000) & 0xFFFFE000
    ).view(np.float32),
    "cvt.rn.f16.f32 %h1, %f1; cvt.f32.f16 %f3, %h1;": lambda x, y: x.astype(np.float16).astype(
        np.float32
    ),
    "cvt.rn.f16x2.f32 %r7, %f1, %f2; mov.b32 {%h1, %h2}, %r7; cvt.f32.f16 %f3, %h1;": lambda x, y: (
        y
    ),
    "cvt.rni.s32.f32 %r7, %f1; cvt.rn.f32.s32 %f3, %r7;": lambda x, y: np.where(
        np.isnan(x), 0, np.clip(np.rint(x.astype(float)), -(2**31), 2**31 - 1)
    ).astype(np.float32),
    "cvt.sat.f32.f32 %f3, %f1;": lambda x, y: np.nan_to_num(np.clip(x, 0, 1)),
}


@pytest.mark.parametrize("operation", FLOAT)
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_floats(operation):
    body = f"mov.b32 %f1, %r10; mov.b32 %f2, %r11; {operation} mov.b32 %r6, %f3;"
    found = computed(body, X, Y, out="f32")
    np.testing.assert_array_equal(found, FLOAT[operation](X, Y))


def test_rounding_down_is_below_the_exact_sum():
    body = "mov.b32 %f1, %r10; mov.b32 %f2, %r11; fma.{}.f32 %f3, %f1, %f2, 0f4B400001; mov.b32 %r6, %f3;"
    x, y = np.array([0.3, 7.7], np.float32), np.array([3.0, 1.0], np.float32)
    down, up = (computed(body.format(mode), x, y, out="f32") for mode in ("rm", "rp"))
    exact = x.astype(float) * y + 12582913.0
    assert (down <= exact).all()
    assert (up >= exact).all()
    assert (up - down == 1).all()


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("add.u32", lambda v: v.sum()),
        ("max.u32", lambda v: v.max()),
        ("min.s32", lambda v: v.min()),
        ("xor.b32", lambda v: np.bitwise_xor.reduce(v)),
    ],
)
def test_a_warp_reduces(mode, expected):
    values = np.arange(3, 99, 3, dtype=np.uint32)
    assert (computed(f"redux.sync.{mode} %r6, %r10, -1;", values) == expected(values)).all()


def test_votes():
    lanes = np.arange(32, dtype=np.uint32)
    ballot = "setp.lt.u32 %p1, %r10, 5; vote.sync.ballot.b32 %r6, %p1, -1;"
    assert (computed(ballot, lanes) == 31).all()
    some = "setp.lt.u32 %p1, %r10, 5; vote.sync.{}.pred %p2, %p1, -1; selp.u32 %r6, 1, 0, %p2;"
    assert (computed(some.format("any"), lanes) == 1).all()
    assert (computed(some.format("all"), lanes) == 0).all()


@pytest.mark.parametrize("type_", ["f16x2", "bf16x2"])
def test_packed_halves(type_):
    """fma of pairs: each half is rounded once."""
    half = type_[:-2]
    body = (
        f"mov.b32 %f1, %r10; mov.b32 %f2, %r11; cvt.rn.{type_}.f32 %r7, %f1, %f2; fma.rn.{type_} %r8, %r7, %r7, %r7;"
        f"mov.b32 {{%h1, %h2}}, %r8; cvt.f32.{half} %f3, %h2; mov.b32 %r6, %f3;"
    )
    x = np.array([1.5, -3.0, 0.1, 7.0], np.float32)
    found = computed(body, x, x[::-1].copy(), out="f32")
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[half]
    # the upper half is the first operand
    given = torch.from_numpy(x).to(dtype).double()
    assert found.tolist() == (given * given + given).to(dtype).float().tolist()
