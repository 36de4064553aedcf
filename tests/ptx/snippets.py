"""A kernel around a few lines of PTX, for tests of the machine."""

from __future__ import annotations

import struct

import numpy as np

from ptx.machine import launch
from ptx.memory import LEGAL, WRITTEN, Buffer
from ptx.program import parse

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
    """y's bytes and their states, after the body has run on x (64 ints unless given) and an unwritten y of its size."""
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
