"""One binary for several instruction sets: which are there, how one is forced, and that they share no symbol."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from processor import NEEDED, instruction_sets

from fastbert.backend import cpu

if cpu.native is None:
    pytest.skip(str(cpu.unavailable), allow_module_level=True)

OBJECTS = sorted(
    p
    for p in Path(__file__).parents[2].glob("build/native-*/fastbert._cpu/*.*.o")
    if sys.implementation.cache_tag in str(p)
)


def test_the_best_instruction_set_runs_by_default():
    usable = [name for name in cpu.native.isas() if name != "emulated"]
    assert usable[0] == "baseline"
    if "FASTBERT_CPU_ISA" not in os.environ:
        assert cpu.native.isa() == usable[-1]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the sets are those of x86-64")
def test_what_the_processor_has_is_used():
    found = [name for name in cpu.native.isas() if name in NEEDED]
    assert found == instruction_sets()


def test_an_unknown_instruction_set_is_refused_by_name():
    with pytest.raises(ValueError, match=r"no instruction set 'sse9'.*baseline"):
        cpu.native.use_isa("sse9")


def test_the_environment_forces_one():
    code = "from fastbert import cpu; print(cpu.native.isa())"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"FASTBERT_CPU_ISA": "baseline"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "baseline"


@pytest.mark.skipif(not OBJECTS, reason="the module was not built in this checkout")
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm of binutils")
def test_no_symbol_is_shared_between_instruction_sets():
    """The linker keeps one copy of an inline function. The AVX-512 copy would crash on an older machine."""
    for path in OBJECTS:
        isa = path.name.split(".")[1]
        table = subprocess.run(
            ["nm", "-C", "--defined-only", path], capture_output=True, text=True, check=True
        )
        for line in table.stdout.splitlines():
            _, kind, name = line.split(maxsplit=2)
            if kind.isupper() and "personality" not in name:
                assert f"fastbert::{isa}::" in name, f"{path.name} defines {kind} {name}"
