"""The native code for other machines: PyPI's ziglang, which is clang with every target's libraries, builds it.

The tools and what they build stay in build/cross (600 MB). ziglang's clang has no OpenMP, as Apple's.
"""

import dataclasses
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastbert

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
CROSS = ROOT / "build" / "cross"
TOOLS = ("ziglang", "ninja", "pybind11", "setuptools")
KERNELS = [p for p in sorted((ROOT / "csrc/cpu").glob("*.cpp")) if p.stem != "bindings"]


@pytest.fixture(scope="module")
def tools() -> Path:
    """The folder with ziglang and what setup.py imports; without a package index a skip, in CI a failure."""
    folder, pins = CROSS / "tools", ROOT / "constraints.txt"
    stamp = folder / pins.name
    if not stamp.is_file() or stamp.read_text() != pins.read_text():
        pip = (sys.executable, "-m", "pip", "install", "-q", "--upgrade", "--target", folder)
        done = subprocess.run([*pip, "-c", pins, *TOOLS], capture_output=True, text=True)
        if done.returncode != 0 and os.environ.get("CI") != "true":
            pytest.skip(f"no ziglang from a package index: {done.stderr.strip().splitlines()[-1]}")
        assert done.returncode == 0, done.stderr
        shutil.copyfile(pins, stamp)
    return folder


@pytest.fixture
def build_for(tools, monkeypatch):
    """`build_for(target)` makes ziglang the compiler and returns the folder for its results."""

    def choose(target: str) -> Path:
        compiler = [sys.executable, "-m", "ziglang", "c++", "-target", target]
        monkeypatch.setenv("CXX", shlex.join(compiler))
        monkeypatch.setenv("PYTHONPATH", str(tools))
        monkeypatch.syspath_prepend(tools)
        monkeypatch.setenv("ZIG_GLOBAL_CACHE_DIR", str(CROSS / "cache"))
        monkeypatch.setenv("FASTBERT_BUILD", str(CROSS / target))
        monkeypatch.setenv("FASTBERT_CPU_EMULATE", "1")
        monkeypatch.setenv("FASTBERT_CPU_FLAGS", "-Werror")
        return CROSS / target

    return choose


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """Run to the end and return the output; a failure shows all of it."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def native_check() -> Path:
    """tests/native_check.cpp with the kernels, by the environment's CXX and the rules (and objects) of setup.py."""
    spec = importlib.util.spec_from_file_location("fastbert_setup", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    chain = setup.cpu_toolchain(fastbert.__version__)
    chain = dataclasses.replace(chain, link_flags=[], once=(*chain.once, "native_check"))
    folder = setup.BUILD / "fastbert._cpu"
    folder.mkdir(parents=True, exist_ok=True)
    sources = [*KERNELS, ROOT / "tests/native_check.cpp"]
    rules = setup.ninja_file(folder / "native_check", folder, sources, chain)
    (folder / "check.ninja").write_text(rules)
    run(sys.executable, "-m", "ninja", "-C", folder, "-f", "check.ninja")
    return folder / "native_check"


@pytest.mark.parametrize("target", ["aarch64-linux-gnu", "aarch64-macos"])
def test_the_kernels_build_without_a_warning(build_for, target):
    build_for(target)
    native_check()


@pytest.mark.parametrize("target", ["x86_64-linux-gnu", "aarch64-linux-musl"])
def test_the_kernels_are_those_of_plain_loops(build_for, target):
    """Linked with musl a program is static: an emulator needs no other system's libraries."""
    build_for(target)
    program, processor = native_check(), target.split("-")[0]
    here = sys.platform == "linux" and platform.machine() == processor
    emulator = shutil.which(f"qemu-{processor}")
    if not here and emulator is None:
        pytest.skip(f"it was built; to run it qemu-{processor} is needed (Debian: qemu-user)")
    print(run(program) if here else run(emulator, program))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the instruction sets are x86-64's")
def test_the_module_by_clang_passes_the_op_tests(build_for):
    """Every instruction set is built, and those that this machine has are tested."""
    folder = build_for("x86_64-linux-gnu")
    lib = folder / "lib"
    words = ("-q", "build", "--build-base", folder / "base", "--build-lib", lib)
    run(sys.executable, "setup.py", *words)
    show = "from fastbert import cpu; print(cpu.native.build_info()['compiler'])"
    assert run(sys.executable, "-c", show, cwd=lib).startswith("clang")
    ops = [ROOT / f"tests/ops/test_{slug}.py" for slug in ("attention", "layer_norm", "linear")]
    print(run(sys.executable, "-m", "pytest", "-q", "-k", "cpu", *ops, cwd=lib))
