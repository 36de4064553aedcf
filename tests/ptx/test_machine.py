"""The machine finds planted bugs, and nothing in their mended twins; instructions do what the PTX ISA says."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch

from ptx.machine import launch
from ptx.memory import LEGAL, WRITTEN, Buffer, Counts, PtxError
from ptx.program import PtxSyntaxError, parse

HEAD = """
.version 8.8
.target sm_80
.address_size 64
.shared .align 16 .b8 tile[1024];
.const .align 4 .b32 table[3] = {{10, 20, 30}};
.func (.param .b32 result) triple(.param .b32 given)
{{
    .reg .b32 %r<3>;
    .loc 1 90 0
    ld.param.b32 %r1, [given];
    mul.lo.s32 %r2, %r1, 3;
    st.param.b32 [result], %r2;
    ret;
}}
.visible .entry kernel(.param .u64 kernel_x, .param .u64 kernel_y)
{{
    .reg .pred %p<9>;
    .reg .b16 %h<9>;
    .reg .f32 %f<9>;
    .reg .b32 %r<33>;
    .reg .b64 %rd<17>;
    .file 1 "planted.cu"
    .loc 1 7 0
    ld.param.u64 %rd1, [kernel_x];
    ld.param.u64 %rd2, [kernel_y];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x;
    mul.wide.u32 %rd3, %r1, 4;
    add.s64 %rd4, %rd1, %rd3; // &x[t]
    add.s64 %rd5, %rd2, %rd3; // &y[t]
    mov.u32 %r3, tile;
    shl.b32 %r4, %r1, 2;
    add.u32 %r5, %r3, %r4;    // &tile[t]
    .loc 1 42 0
{body}
    ret;
}}
"""


def run(body, threads=64, blocks=1, x=None, y_size=None, counts=None):
    """The body between x (64 ints unless given) and y (the same size, unwritten): y's bytes and their states."""
    x = np.arange(64, dtype=np.uint32) if x is None else x
    data = np.ascontiguousarray(x).ravel().view(np.uint8).copy()
    y = np.zeros(y_size or len(data), np.uint8)
    buffers = [
        Buffer(0x7F0000001000, data, np.full(len(data), LEGAL | WRITTEN, np.uint8), "x"),
        Buffer(0x7F0000002000, y, np.full(len(y), LEGAL, np.uint8), "y"),
    ]
    given = [struct.pack("<Q", b.address) for b in buffers]
    program = parse(HEAD.format(body=body))
    launch(program, "kernel", (blocks,), (threads,), given, buffers, counts=counts)
    return y, buffers[1].state


NEIGHBOUR = """
    ld.global.u32 %r6, [%rd4];
    st.shared.u32 [%r5], %r6;
    {barrier}
    xor.b32 %r7, %r4, {partner};
    add.u32 %r7, %r3, %r7;
    ld.shared.u32 %r8, [%r7];
    st.global.u32 [%rd5], %r8;
"""
COPY = """
    mul.lo.u32 %r9, %r1, 16;
    add.u32 %r10, %r3, %r9;
    mul.wide.u32 %rd6, %r1, 16;
    add.s64 %rd6, %rd1, %rd6;
    setp.lt.u32 %p1, %r1, 16;
    @%p1 cp.async.cg.shared.global [%r10], [%rd6], 16;
    cp.async.commit_group;
    {wait}
    bar.sync 0;
    ld.shared.u32 %r8, [%r5];
    st.global.u32 [%rd5], %r8;
"""
# what is planted, its kind, what is wrong, what is right
PLANTED = {
    "missing barrier": (
        "race",
        NEIGHBOUR.format(barrier="", partner=128),
        NEIGHBOUR.format(barrier="bar.sync 0;", partner=128),
    ),
    "warp barrier for a block": (
        "race",
        NEIGHBOUR.format(barrier="bar.warp.sync -1;", partner=128),
        NEIGHBOUR.format(barrier="bar.sync 0;", partner=128),
    ),
    "missing warp barrier": (
        "race",
        NEIGHBOUR.format(barrier="", partner=4),
        NEIGHBOUR.format(barrier="bar.warp.sync -1;", partner=4),
    ),
    "overwritten before all have read": (
        "race",
        NEIGHBOUR.format(barrier="bar.sync 0;", partner=128) + "st.shared.u32 [%r5], %r1;",
        NEIGHBOUR.format(barrier="bar.sync 0;", partner=128)
        + "bar.sync 0; st.shared.u32 [%r5], %r1;",
    ),
    "two values for one place": (
        "race",
        "st.shared.u32 [%r3], %r1;",
        "st.shared.u32 [%r3], %r2;",
    ),
    "missing wait": (
        "missing-wait",
        COPY.format(wait=""),
        COPY.format(wait="cp.async.wait_group 0;"),
    ),
    "wait for all groups but this": (
        "missing-wait",
        COPY.format(wait="cp.async.wait_group 1;"),
        COPY.format(wait="cp.async.wait_all;"),
    ),
    "beyond a buffer": (
        "out-of-bounds",
        "ld.global.u32 %r6, [%rd4+4];",
        "setp.lt.u32 %p1, %r1, 63; @%p1 ld.global.u32 %r6, [%rd4+4];",
    ),
    "beyond shared memory": (
        "out-of-bounds",
        "st.shared.u32 [%r5+772], %r1;",
        "st.shared.u32 [%r5+768], %r1;",
    ),
    "a null pointer": (
        "out-of-bounds",
        "mov.u64 %rd6, 0; ld.global.u32 %r6, [%rd6];",
        "mov.u64 %rd6, 0; setp.ne.u64 %p1, %rd6, 0; @%p1 ld.global.u32 %r6, [%rd6];",
    ),
    "nobody wrote it": (
        "uninitialised",
        "ld.global.u32 %r6, [%rd5];",
        "st.global.u32 [%rd5], %r1; ld.global.u32 %r6, [%rd5];",
    ),
    "shared memory that nobody wrote": (
        "uninitialised",
        "ld.shared.u32 %r6, [%r5];",
        "st.shared.u32 [%r5], %r1; ld.shared.u32 %r6, [%r5];",
    ),
    "a vector at half its size": (
        "misaligned",
        "setp.lt.u32 %p1, %r1, 1; @%p1 ld.global.v2.u32 {%r6, %r7}, [%rd4+4];",
        "setp.lt.u32 %p1, %r1, 1; @%p1 ld.global.v2.u32 {%r6, %r7}, [%rd4+8];",
    ),
    "a barrier for some": (
        "divergence",
        "setp.lt.u32 %p1, %r1, 7; @%p1 bar.sync 0;",
        "setp.lt.u32 %p1, %r1, 99; @%p1 bar.sync 0;",
    ),
    "an end before a barrier": (
        "divergence",
        "setp.lt.u32 %p1, %r1, 32; @%p1 ret; bar.sync 0;",
        "setp.gt.u32 %p1, %r1, 99; @%p1 ret; bar.sync 0;",
    ),
    "barriers of two branches": (
        "divergence",
        "setp.lt.u32 %p1, %r1, 32; @%p1 bra A; bar.sync 0; bra B; A: bar.sync 0; B:",
        "setp.lt.u32 %p1, %r1, 99; @%p1 bra A; bar.sync 0; bra B; A: bar.sync 0; B:",
    ),
    "a shuffle from who is not there": (
        "shuffle",
        "setp.lt.u32 %p1, %r1, 8; @%p1 shfl.sync.down.b32 %r6, %r1, 4, 31, 255;",
        "setp.lt.u32 %p1, %r1, 8; @%p1 shfl.sync.bfly.b32 %r6, %r1, 4, 31, 255;",
    ),
    "a shuffle that some never reach": (
        "divergence",
        "setp.lt.u32 %p1, %r1, 8; @%p1 shfl.sync.bfly.b32 %r6, %r1, 4, 31, -1;",
        "shfl.sync.bfly.b32 %r6, %r1, 4, 31, -1;",
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_bugs_are_found(name):
    kind, wrong, right = PLANTED[name]
    with pytest.raises(PtxError) as error:
        run(wrong)
    assert error.value.kind == kind
    assert "planted.cu:42" in str(error.value)
    run(right)


def test_a_loop_without_end(monkeypatch):
    monkeypatch.setattr("ptx.machine.MOST", 100)
    with pytest.raises(PtxError, match="endless"):
        run("setp.lt.u32 %p1, %r1, 8; L: @%p1 bra L;")


def test_unknown_instructions_and_text_are_refused():
    with pytest.raises(PtxError, match=r"unsupported.*planted.cu:42: `tex"):
        run("tex.1d %r6, [%rd4];")
    with pytest.raises(PtxSyntaxError, match="not understood"):
        parse(".entry kernel() { } nonsense")


def test_what_was_not_written_stays_unwritten():
    _, state = run("setp.lt.u32 %p1, %r1, 60; @%p1 st.global.u32 [%rd5], %r1;")
    assert (state & WRITTEN != 0).sum() == 240


def test_lanes_part_and_meet():
    """A loop of as many rounds as the lane's number, behind which all shuffle together; a device function in it."""
    y, _ = run("""
    mov.u32 %r6, 0;
    mov.u32 %r7, 0;
L:  setp.ge.u32 %p1, %r7, %r1;
    @%p1 bra M;
    { .param .b32 given0; .param .b32 result0;
      st.param.b32 [given0], %r7;
      call.uni (result0), triple, (given0);
      ld.param.b32 %r8, [result0]; }
    add.u32 %r6, %r6, %r8;
    add.u32 %r7, %r7, 1;
    bra L;
M:  shfl.sync.idx.b32 %r9, %r6, 5, 31, -1;
    sub.u32 %r6, %r6, %r9;
    st.global.u32 [%rd5], %r6;""")
    lane = np.arange(64)
    sums = 3 * lane * (lane - 1) // 2
    expected = sums - sums.reshape(2, 32)[:, 5].repeat(32)
    assert (y.view(np.int32) == expected).all()


def test_lanes_that_ended_hold_up_no_warp():
    y, _ = run("""
    setp.lt.u32 %p1, %r1, 48;
    @%p1 bra L;
    setp.gt.u32 %p2, %r1, 50;
    @%p2 ret;
L:  bar.warp.sync -1;
    st.global.u32 [%rd5], %r1;""")
    assert (y.view(np.uint32)[:51] == np.arange(51)).all()


def test_every_space_and_generic_addresses():
    """Each lane's own local memory, a constant table and shared memory, by their windows and by generic addresses."""
    y, _ = run("""
    .local .align 8 .b8 mine[16];
    mov.u64 %rd6, mine;
    cvta.local.u64 %rd7, %rd6;
    st.v2.u32 [%rd7+8], {%r1, %r1};
    ld.local.u32 %r6, [%rd6+12];
    mov.u64 %rd8, table;
    ld.const.u32 %r7, [%rd8+4];
    cvt.u64.u32 %rd9, %r5;
    cvta.shared.u64 %rd9, %rd9;
    add.u32 %r6, %r6, %r7;
    st.u32 [%rd9], %r6;
    ld.shared.u32 %r8, [%r5];
    cvta.to.global.u64 %rd5, %rd5;
    st.u32 [%rd5], %r8;""")
    assert (y.view(np.uint32) == np.arange(64) + 20).all()
    with pytest.raises(PtxError, match="uninitialised: local"):
        run(".local .align 8 .b8 mine[16]; mov.u64 %rd6, mine; ld.local.u32 %r6, [%rd6];")


@pytest.mark.parametrize("type_", ["f16x2", "bf16x2"])
def test_packed_halves(type_):
    """fma of pairs: one rounding, each half for itself."""
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


def test_atomics_count_every_lane():
    y, _ = run(
        "setp.eq.u32 %p1, %r1, 0; @%p1 st.global.u32 [%rd2], %r2; bar.sync 0;"
        "atom.global.add.u32 %r6, [%rd2], 3; red.global.max.u32 [%rd2], 1;",
        y_size=4,
    )
    assert y.view(np.uint32)[0] == 192


def test_sectors_and_banks_are_counted():
    """Neighbours share sectors and use all banks; a stride of 32 words makes every lane wait for the others."""
    close, far = Counts(), Counts()
    run("ld.global.u32 %r6, [%rd4]; st.shared.u32 [%r5], %r6;", 32, counts=close)
    assert (close.asked["load"], close.sectors["load"]) == (128, 4)
    assert (close.shared_accesses, close.shared_wavefronts) == (1, 1)
    body = "mul.wide.u32 %rd6, %r1, 32; add.s64 %rd6, %rd1, %rd6; ld.global.u32 %r6, [%rd6];"
    run(
        body
        + "and.b32 %r7, %r1, 7; shl.b32 %r7, %r7, 7; add.u32 %r7, %r7, %r3; st.shared.u32 [%r7], %r2;",
        32,
        x=np.zeros(256, np.uint32),
        counts=far,
    )
    assert (far.asked["load"], far.sectors["load"]) == (128, 32)
    assert (far.shared_accesses, far.shared_wavefronts) == (1, 8)
    assert close.distinct["x"] == (128, 0)
