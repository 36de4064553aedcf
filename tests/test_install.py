"""Installing as users do: sdist -> wheel -> import from an empty directory, with ordinary build isolation."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOT_SOURCE = shutil.ignore_patterns(
    ".*", "build", "dist", "runs", "*.egg-info", "__pycache__", "*.so", "docs"
)
# pip's messages where it finds no index with setuptools, pybind11 and ninja
NO_INDEX = ("No matching distribution found for", "Could not find a version that satisfies")

LOOK = """
import fastbert, fastbert.backend.cpu, fastbert.kernels, json, torch
x = torch.arange(12.0).reshape(3, 4)
args = (x, x, torch.ones(4), torch.zeros(4))
dropped = {"p": 0.3, "seed": torch.tensor([5])}
with fastbert.use("cpu"):
    y = fastbert.functional.dropout_add_layer_norm(*args, **dropped)
with fastbert.use("reference"):
    expected = fastbert.functional.dropout_add_layer_norm(*args, **dropped)
print(json.dumps({
    "package": fastbert.__file__,
    "kernels": fastbert.kernels.__file__,
    "native": fastbert.backend.cpu.native.__file__,
    "error": (y - expected).abs().max().item(),
}))
"""


def environment(**extra: str) -> dict[str, str]:
    """This process's environment without variables by which a checkout could be imported.

    CUDA's build would take minutes. The compiler's optimiser, and kernels for other processors, would take most of the
    CPU's build.
    """
    dropped = ("PYTHONPATH", "VIRTUAL_ENV", "FASTBERT_BACKEND", "PYTHONHOME")
    kept = {k: v for k, v in os.environ.items() if k not in dropped}
    quick = {"FASTBERT_CUDA": "0", "FASTBERT_CPU_FLAGS": "-O0", "FASTBERT_CPU_NATIVE": "1"}
    return kept | quick | extra


def run(*command: str | Path, cwd: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run to the end; returns exit code and output."""
    words = [str(word) for word in command]
    return subprocess.run(
        words, cwd=cwd, env=environment(**extra), capture_output=True, text=True, check=False
    )


def succeed(*command: str | Path, cwd: Path, **extra: str) -> str:
    """Run and return the output; without a package index a skip, in CI a failure."""
    result = run(*command, cwd=cwd, **extra)
    output = result.stdout + result.stderr
    offline = result.returncode and any(said in output for said in NO_INDEX)
    if offline and os.environ.get("CI") != "true":
        pytest.skip("build isolation needs a package index for setuptools, pybind11 and ninja")
    assert result.returncode == 0, output
    return output


def checkout(folder: Path) -> Path:
    """A copy of the sources, so that no build writes into the real checkout."""
    return Path(shutil.copytree(ROOT, folder / "check out", ignore=NOT_SOURCE))


def fresh_python(folder: Path) -> Path:
    """A new virtual environment's interpreter, which can also import this environment's packages, such as torch."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=folder)
    # a folder in a .pth comes after the environment's own packages, and .pth files inside it have no effect
    Path(site.stdout.strip(), "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def pip_install(python: Path, *what: str | Path, cwd: Path, **extra: str) -> str:
    """`pip install` into that environment without dependencies, which it has already."""
    pip = (sys.executable, "-m", "pip", "--python", python)
    return succeed(*pip, "install", "-v", "--no-deps", *what, cwd=cwd, **extra)


def look(python: Path, folder: Path) -> dict[str, str]:
    """The output of LOOK in an empty directory."""
    empty = folder / "empty"
    empty.mkdir(exist_ok=True)
    return json.loads(succeed(python, "-c", LOOK, cwd=empty).splitlines()[-1])


def baseline_compiler(folder: Path) -> Path:
    """A C++ compiler that refuses AVX: setup.py then compiles every source once, for the baseline."""
    script, compiler = folder / "baseline-c++", os.environ.get("CXX", "c++")
    script.write_text(f'#!/bin/sh\ncase "$*" in *-mavx*) exit 1 ;; esac\nexec {compiler} "$@"\n')
    script.chmod(0o755)
    return script


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The sdist, beside the sources that it was made of."""
    folder = tmp_path_factory.mktemp("built")
    succeed(sys.executable, "-m", "build", "--sdist", "-o", folder, checkout(folder), cwd=folder)
    return next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist) -> Path:
    """The wheel that was built from the sdist."""
    build = (sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", sdist.parent, sdist)
    succeed(*build, cwd=sdist.parent, CXX=str(baseline_compiler(sdist.parent)))
    return next(sdist.parent.glob("*.whl"))


def test_the_sdist_carries_what_a_build_needs(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    source = sdist.parent / "check out"
    native = {p.relative_to(source).as_posix() for p in (source / "csrc").rglob("*.*")}
    assert native <= names
    assert {"setup.py", "pyproject.toml", "LICENSE", "kernels/__init__.py"} <= names
    assert not [name for name in names if name.endswith(".so")]


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    typed = {f"fastbert/{name}" for name in ("py.typed", "_cpu.pyi", "_cuda.pyi")}
    assert {"fastbert/kernels/__init__.py", *typed} <= set(names)
    assert [n for n in names if n.startswith("fastbert/_cpu.") and n.endswith((".so", ".pyd"))]
    assert {n.split("/")[0].split("-")[0] for n in names} == {"fastbert", "fastbert_kernels"}
    source = wheel.parent / "check out"
    python = {p.relative_to(source).as_posix() for p in (source / "fastbert").rglob("*.py")}
    assert python <= set(names)


@pytest.mark.slow
def test_the_wheel_asks_for_no_torch_at_build_time_and_a_range_at_run_time(wheel):
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(next(n for n in archive.namelist() if n.endswith("/METADATA")))
    assert b"Requires-Dist: torch>=2.6\n" in metadata
    requires = (ROOT / "pyproject.toml").read_text().split("[project]")[0]
    assert "torch" not in requires


@pytest.mark.slow
def test_sdist_to_wheel_to_import_from_an_empty_directory(wheel, tmp_path):
    python = fresh_python(tmp_path / "env")
    pip_install(python, "--no-index", wheel, cwd=tmp_path)
    seen = look(python, tmp_path)
    for name in ("package", "kernels", "native"):
        assert seen[name].startswith(str(tmp_path / "env")), seen
    assert seen["error"] < 1e-5
    script = run(python.parent / "fastbert", "--help", cwd=tmp_path)
    assert script.returncode == 0, script.stderr
    assert "pretrain" in script.stdout


@pytest.mark.slow
def test_editable_install_and_what_is_compiled_again(tmp_path):
    source = checkout(tmp_path)
    python = fresh_python(tmp_path / "env")
    first = pip_install(python, "-e", source, cwd=tmp_path)
    assert "compile" in first
    seen = look(python, tmp_path)
    for name in ("package", "kernels", "native"):
        assert seen[name].startswith(str(source)), seen
    assert "no work to do" in pip_install(python, "-e", source, cwd=tmp_path)
    # by the depfiles, a changed header rebuilds the sources that include it and no others
    (source / "csrc/cpu/norm.h").write_text(
        (source / "csrc/cpu/norm.h").read_text() + "\n// changed\n"
    )
    again = pip_install(python, "-e", source, cwd=tmp_path)
    assert "dropout_add_layer_norm.cpp" in again
    assert "compile" in again
    assert "bindings.cpp" not in again


@pytest.mark.slow
def test_what_an_older_checkout_left_in_build_is_not_installed(tmp_path):
    source = checkout(tmp_path)
    stale = source / "fastbert" / "stale.py"
    stale.write_text("")
    python = fresh_python(tmp_path / "env")
    pip_install(python, source, cwd=tmp_path)
    assert run(python, "-c", "import fastbert.stale", cwd=tmp_path).returncode == 0
    stale.unlink()
    pip_install(python, "--force-reinstall", source, cwd=tmp_path)
    assert "No module named 'fastbert.stale'" in (
        run(python, "-c", "import fastbert.stale", cwd=tmp_path).stderr
    )
    assert seen_native(python, tmp_path) == "None"


@pytest.mark.slow
def test_without_a_compiler_one_sentence_and_a_way_out(tmp_path):
    source = checkout(tmp_path)
    python = fresh_python(tmp_path / "env")
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", source)
    refused = run(*pip, cwd=tmp_path, CXX="no-such-compiler")
    assert refused.returncode != 0
    output = refused.stdout + refused.stderr
    assert "needs a C++17 compiler and no-such-compiler was not found" in output
    assert "FASTBERT_CPU=0" in output
    pip_install(python, source, cwd=tmp_path, CXX="no-such-compiler", FASTBERT_CPU="0")
    assert "no module named" in seen_native(python, tmp_path).lower()
    assert "pip install ." in seen_native(python, tmp_path)


def seen_native(python: Path, cwd: Path) -> str:
    """fastbert.backend.cpu.unavailable in that environment."""
    return succeed(
        python, "-c", "import fastbert.backend.cpu as c; print(c.unavailable)", cwd=cwd
    ).strip()
