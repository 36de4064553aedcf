"""The inner loop of the products, read from the built module: what is in it, and what is not.

A disassembly proves the instruction sets that this machine cannot run, too.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fastbert.backend import cpu

# instruction set -> rows of its tile, steps of k per turn of the loop
TILES = {"avx2": (6, 8), "avx512": (14, 2), "avx512_bf16": (14, 2)}
# the number of the kind in csrc/cpu/product.h -> the instruction of a product
FLOATS, HALVES, WORDS, BYTES = 0, 1, 2, 3
PRODUCTS = {FLOATS: "vfmadd", HALVES: "vdpbf16ps", WORDS: "vpmaddwd", BYTES: "vpdpbusd"}
KERNEL = re.compile(
    r"fastbert::(?P<isa>\w+)::micro_kernel<(?P<rows>\d+), \(fastbert::\w+::Kind\)(?P<kind>\d), "
    r"fastbert::\w+::Panel<\d+>, (?P<ahead>true|false)>"
)
# per turn: two pointers, the count, the jump back with its comparison, and up to three moves between registers
OVERHEAD = 8


def product(isa: str, kind: int) -> str:
    """The instruction of this kind of product. The last set has VNNI, which adds the sums too."""
    return "vpdpwssd" if (isa, kind) == ("avx512_bf16", WORDS) else PRODUCTS[kind]


def loops(function: str) -> list[list[str]]:
    """The instructions of every loop: from the target of a jump backwards to the jump."""
    code = [(int(m[1], 16), m[2]) for m in re.finditer(r"^ *([0-9a-f]+):\t(.*)$", function, re.M)]
    found = []
    for address, text in code:
        jump = re.match(r"j\w+ +([0-9a-f]+)", text)
        if jump and int(jump[1], 16) < address:
            found.append([t for at, t in code if int(jump[1], 16) <= at <= address])
    return found


@pytest.fixture(scope="module")
def listing() -> str:
    """The disassembly of the built module."""
    if not shutil.which("objdump"):
        pytest.skip("there is no objdump: install binutils")
    info = cpu.native.build_info()
    if "gcc" not in info["compiler"] or "-O3" not in info["flags"]:
        pytest.skip("the kernels were not built by GCC with -O3")
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", str(Path(cpu.native.__file__))]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def inner_loops(listing) -> dict[tuple[str, int, int, bool], list[list[str]]]:
    """Instruction set, rows, kind, whether it fetches B -> the loop with most products, once for every copy."""
    found: dict[tuple[str, int, int, bool], list[list[str]]] = {}
    for function in listing.split("\n\n"):
        kernel = KERNEL.search(function.split("\n", 1)[0])
        if kernel and kernel["isa"] in TILES:
            isa, kind = kernel["isa"], int(kernel["kind"])
            name = product(isa, kind)
            inner = max(loops(function), key=lambda loop: sum(t.startswith(name) for t in loop))
            key = (isa, int(kernel["rows"]), kind, kernel["ahead"] == "true")
            found.setdefault(key, []).append(inner)
    return found


@pytest.mark.parametrize("ahead", [False, True], ids=["", "ahead"])
@pytest.mark.parametrize("isa", TILES)
def test_inner_loop(isa: str, ahead: bool, listing, inner_loops):
    """Per step of k: two loads of B and, per row, a broadcast and two products; no other memory.

    The kernel that fetches the next panel of B has one or two prefetches a turn, the other one has none.
    """
    if f"fastbert::{isa}::linear_fwd" not in listing:
        pytest.skip(
            f"this build has no {isa}: it was made with FASTBERT_CPU_NATIVE=1 or for another processor"
        )
    rows, turn = TILES[isa]
    for height in range(1, rows + 1):
        for kind in (FLOATS, HALVES, WORDS, BYTES) if isa == "avx512_bf16" else (FLOATS, WORDS):
            name = product(isa, kind)
            # without VNNI every product of words needs an addition
            per_row = 5 if name == "vpmaddwd" else 3
            for loop in inner_loops[isa, height, kind, ahead]:
                title = f"{isa}, {height} rows, {name}:\n" + "\n".join(loop)
                assert sum(t.startswith(name) for t in loop) == 2 * height * turn, title
                fetches = sum("prefetch" in t for t in loop)
                assert 1 <= fetches <= 2 if ahead else fetches == 0, title
                # lower panels are rare: GCC moves their sums from register to register
                if height > rows // 2:
                    assert len(loop) <= turn * (per_row * height + 2) + OVERHEAD + 3 * ahead, title
                assert not any(re.search(r"%[re][sb]p\b|call", t) for t in loop), title
