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
KERNEL = re.compile(
    r"fastbert::(?P<isa>\w+)::micro_kernel<(?P<rows>\d+), (?P<pairs>\w+), fastbert::\w+::Panel<\d+> ?>"
)
# per turn: two pointers, the count, the jump back with its comparison, and up to three moves between registers
OVERHEAD = 8


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
def inner_loops() -> dict[tuple[str, int, bool], list[list[str]]]:
    """Instruction set, rows, pairs -> the loop with most multiply-adds, once for every copy of the kernel."""
    if not shutil.which("objdump"):
        pytest.skip("there is no objdump: install binutils")
    if (
        "gcc" not in cpu.native.build_info()["compiler"]
        or "-O3" not in cpu.native.build_info()["flags"]
    ):
        pytest.skip("the kernels were not built by GCC with -O3")
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", str(Path(cpu.native.__file__))]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[tuple[str, int, bool], list[list[str]]] = {}
    for function in listing.split("\n\n"):
        if (kernel := KERNEL.search(function.split("\n", 1)[0])) and kernel["isa"] in TILES:
            inner = max(loops(function), key=lambda loop: len(products(loop)))
            found.setdefault(
                (kernel["isa"], int(kernel["rows"]), kernel["pairs"] == "true"), []
            ).append(inner)
    return found


def products(loop: list[str]) -> list[str]:
    return [text for text in loop if text.startswith(("vfmadd", "vdpbf16ps"))]


@pytest.mark.parametrize("isa", TILES)
def test_inner_loop(isa: str, inner_loops):
    """Per step of k: two loads of B, a broadcast per row, two multiply-adds per row; nothing in memory but A and B."""
    rows, turn = TILES[isa]
    if not any(key[0] == isa for key in inner_loops):
        pytest.skip(
            f"this build has no {isa}: it was made with FASTBERT_CPU_NATIVE=1 or for another processor"
        )
    for height in range(1, rows + 1):
        for pairs in (False, True) if isa == "avx512_bf16" else (False,):
            copies = inner_loops[isa, height, pairs]
            for loop in copies:
                name = f"{isa}, {height} rows, pairs {pairs}:\n" + "\n".join(loop)
                assert len(products(loop)) == 2 * height * turn, name
                assert len(loop) <= turn * (3 * height + 2) + OVERHEAD, name
                assert not any(re.search(r"%[re][sb]p\b|prefetch|call", text) for text in loop), (
                    name
                )
