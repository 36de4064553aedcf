"""The machine finds planted bugs, and none in the mended code; lanes diverge and meet, and counts are right."""

from __future__ import annotations

import numpy as np
import pytest

from ptx.memory import WRITTEN, Counts, PtxError
from ptx.program import PtxSyntaxError, parse
from ptx.snippets import run

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
# lanes from 16 on write, then lanes below 16 read, with a barrier of their warp in between
SOME = """
    setp.lt.u32 %p1, %r1, 16;
    @!%p1 st.shared.u32 [%r5], %r1;
    mov.u32 %r9, {mask};
    setp.lt.u32 %p2, %r1, 16;
    setp.eq.u32 %p3, %r9, -1;
    or.pred %p2, %p2, %p3;
    @%p2 bar.warp.sync %r9;
    @%p1 ld.shared.u32 %r8, [%r5+64];
"""
ATOMIC = """
    setp.eq.u32 %p2, %r1, 0;
    @%p2 st.shared.u32 [%r3], %r2;
    bar.sync 0;
    red.shared.add.u32 [%r3], 1;
    {barrier}
    ld.shared.u32 %r6, [%r3];
"""
# name of the bug: (kind of the error, wrong code, right code)
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
    "a barrier that the writer did not pass": (
        "race",
        SOME.format(mask="0xffff"),
        SOME.format(mask="-1"),
    ),
    "a reader of another warp among those of this": (
        "race",
        "setp.eq.u32 %p2, %r1, 40; @%p2 st.shared.u32 [%r3], %r1; bar.sync 0;"
        "ld.shared.u32 %r8, [%r3]; bar.warp.sync -1; @%p2 st.shared.u32 [%r3], %r1;",
        "setp.eq.u32 %p2, %r1, 40; @%p2 st.shared.u32 [%r3], %r1; bar.sync 0;"
        "ld.shared.u32 %r8, [%r3]; bar.sync 0; @%p2 st.shared.u32 [%r3], %r1;",
    ),
    "a read of what others update": (
        "race",
        ATOMIC.format(barrier=""),
        ATOMIC.format(barrier="bar.sync 0;"),
    ),
    "a store over a copy on its way": (
        "missing-wait",
        COPY.format(wait="@%p1 st.shared.u32 [%r10], %r1; cp.async.wait_all;"),
        COPY.format(wait="cp.async.wait_all; @%p1 st.shared.u32 [%r10], %r1;"),
    ),
    "a lane beyond its local memory": (
        "out-of-bounds",
        ".local .align 4 .b8 own[20]; mov.u64 %rd6, own; st.local.u32 [%rd6+20], %r1;",
        ".local .align 4 .b8 own[20]; mov.u64 %rd6, own; st.local.u32 [%rd6+16], %r1;",
    ),
    "a lane that is not in its mask": (
        "divergence",
        "shfl.sync.bfly.b32 %r6, %r1, 4, 31, 255;",
        "shfl.sync.bfly.b32 %r6, %r1, 4, 31, -1;",
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
        "setp.lt.u32 %p1, %r1, 8; @%p1 shfl.sync.bfly.b32 %r6, %r1, 4, 31, -1; bar.sync 0;",
        "shfl.sync.bfly.b32 %r6, %r1, 4, 31, -1; bar.sync 0;",
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


def test_lanes_that_a_predicate_leaves_out_go_on():
    """They skip instructions of a warp too. Lanes with different masks at one instruction are separate groups."""
    y, _ = run("""
    mov.u32 %r6, 7;
    setp.lt.u32 %p1, %r1, 8;
    @%p1 shfl.sync.bfly.b32 %r6, %r1, 4, 31, 255;
    and.b32 %r7, %r1, 16;
    setp.eq.u32 %p2, %r7, 0;
    selp.u32 %r7, 0xffff, 0xffff0000, %p2;
    redux.sync.add.u32 %r8, 1, %r7;
    mad.lo.u32 %r6, %r8, 100, %r6;
    st.global.u32 [%rd5], %r6;""")
    lane = np.arange(64)
    assert (y.view(np.uint32) == np.where(lane < 8, lane ^ 4, 7) + 1600).all()


def test_two_lanes_may_copy_the_same():
    run(
        COPY.format(wait="cp.async.wait_all;")
        .replace("mul.lo.u32 %r9, %r1, 16", "and.b32 %r9, %r1, 0")
        .replace("mul.wide.u32 %rd6, %r1, 16", "mov.u64 %rd6, 0")
        .replace("[%r5]", "[%r3]")
    )


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
    """A loop that lane n leaves after n rounds, with a call of a device function; then one shuffle of all lanes."""
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
    """Local memory of each lane, a constant table and shared memory, by their own and by generic addresses."""
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


def test_atomics_count_every_lane():
    y, _ = run(
        "setp.eq.u32 %p1, %r1, 0; @%p1 st.global.u32 [%rd2], %r2; bar.sync 0;"
        "atom.global.add.u32 %r6, [%rd2], 3; red.global.max.u32 [%rd2], 1;",
        y_size=4,
    )
    assert y.view(np.uint32)[0] == 192


def test_sectors_and_banks_are_counted():
    """Neighbours share sectors and use all banks. Far loads use a sector each; 8 words of a bank take 8 passes."""
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
