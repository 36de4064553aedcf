"""The native code for other machines: PyPI's ziglang, which is clang with every target's libraries, builds it.

The tools and their output stay in build/cross (600 MB). ziglang's clang has no OpenMP, like Apple's.
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
from processor import instruction_sets

import fastbert

pytestmark = pytest.mark.slow
X86 = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="needs Linux on x86-64"
)

ROOT = Path(__file__).resolve().parents[2]
CROSS = ROOT / "build" / "cross"
TOOLS = ("ziglang", "ninja", "pybind11", "setuptools")
KERNELS = [p for p in sorted((ROOT / "csrc/cpu").glob("*.cpp")) if p.stem != "bindings"]


@pytest.fixture(scope="module")
def tools() -> Path:
    """The folder with ziglang and the packages of setup.py; without a package index a skip, in CI a failure."""
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
def build_with(tools, monkeypatch):
    """`build_with(compiler)` sets the compiler and returns its folder. It is a target of ziglang, or a command."""

    def choose(compiler: str) -> Path:
        folder = CROSS / compiler
        if "-" in compiler:
            compiler = f"{shlex.quote(sys.executable)} -m ziglang c++ -target {compiler}"
            monkeypatch.setenv("FASTBERT_CPU_FLAGS", "-Werror")
        elif shutil.which(compiler) is None:
            pytest.skip(f"there is no {compiler} here")
        monkeypatch.setenv("CXX", compiler)
        monkeypatch.setenv("PYTHONPATH", str(tools))
        monkeypatch.syspath_prepend(tools)
        monkeypatch.setenv("ZIG_GLOBAL_CACHE_DIR", str(CROSS / "cache"))
        monkeypatch.setenv("FASTBERT_BUILD", str(folder))
        monkeypatch.setenv("FASTBERT_CPU_EMULATE", "1")
        return folder

    return choose


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """Run to the end and return the output; a failure shows all of it."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def native_check() -> Path:
    """tests/cpu/native_check.cpp with the kernels, by the environment's CXX and the rules (and objects) of setup.py."""
    spec = importlib.util.spec_from_file_location("fastbert_setup", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    chain = setup.cpu_toolchain(fastbert.__version__)
    chain = dataclasses.replace(chain, link_flags=[], once=(*chain.once, "native_check"))
    folder = setup.BUILD / "fastbert._cpu"
    folder.mkdir(parents=True, exist_ok=True)
    sources = [*KERNELS, ROOT / "tests/cpu/native_check.cpp"]
    rules = setup.ninja_file(folder / "native_check", folder, sources, chain)
    (folder / "check.ninja").write_text(rules)
    run(sys.executable, "-m", "ninja", "-C", folder, "-f", "check.ninja")
    return folder / "native_check"


@pytest.mark.parametrize("target", ["aarch64-linux-gnu", "aarch64-macos"])
def test_the_kernels_build_without_a_warning(build_with, target):
    build_with(target)
    native_check()


@pytest.mark.skipif(shutil.which("qemu-aarch64") is None, reason="needs qemu-user of Debian")
def test_the_kernels_compute_the_same_on_aarch64(build_with):
    """A program linked with musl is static: the emulator needs no libraries of the other system."""
    build_with("aarch64-linux-musl")
    print(run("qemu-aarch64", native_check()))


@X86
def test_the_kernels_compute_the_same_on_x86_64(build_with):
    """The sets are passed by name: in ziglang's runtime __builtin_cpu_supports is always false."""
    build_with("x86_64-linux-gnu")
    sets = ["baseline", *instruction_sets(), "emulated"]
    found = run(native_check(), *sets)
    print(found)
    assert all(f"{name} philox" in found for name in sets)


@X86
@pytest.mark.parametrize("compiler", ["x86_64-linux-gnu", "clang++"])
def test_the_module_by_clang_passes_the_op_tests(build_with, compiler):
    """A module by ziglang has the baseline and the emulated set only: see the test above."""
    folder = build_with(compiler)
    lib = folder / "lib"
    words = ("-q", "build", "--build-base", folder / "base", "--build-lib", lib)
    run(sys.executable, "setup.py", *words)
    show = "from fastbert import cpu; print(cpu.native.build_info()['compiler'])"
    assert run(sys.executable, "-c", show, cwd=lib).startswith("clang")
    stems = ["ops/test_attention", "ops/test_layer_norm", "ops/test_linear"]
    if compiler == "clang++":
        stems.append("cpu/test_cpu_isa")
    tests = [ROOT / f"tests/{stem}.py" for stem in stems]
    print(run(sys.executable, "-m", "pytest", "-q", "-k", "cpu", *tests, cwd=lib))
