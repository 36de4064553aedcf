"""Builds the native modules with ninja; everything else about the package is in pyproject.toml.

One table, MODULES, names the extension modules and the compiler of each. The native code knows
nothing of torch, so torch is not needed here.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import PlatformError

ROOT = Path(__file__).resolve().parent
# kept between builds, per interpreter and platform, so that only what changed is compiled again;
# FASTBERT_BUILD is another folder for a build with other flags
BUILD = ROOT / os.environ.get("FASTBERT_BUILD", "build")
BUILD /= f"native-{sys.implementation.cache_tag}-{sysconfig.get_platform()}"


@dataclass(frozen=True)
class Toolchain:
    """How one language's sources become objects and then a module."""

    compiler: str
    compile_flags: list[str]
    link_flags: list[str]
    # instruction set -> flags: every source outside `once` is compiled for each of them
    variants: dict[str, list[str]]
    once: tuple[str, ...]
    # for the sources in `once` alone: a new instruction set compiles no kernel of another one again
    once_flags: list[str]
    # instruction sets of which only the micro kernels are optimised, whose machine code a test reads
    quick: frozenset[str] = frozenset()


# of one x86-64 binary; csrc/cpu/bindings.cpp picks at run time. Others get the baseline alone
ISAS = {
    "avx2": ["-mavx2", "-mfma", "-mbmi2"],
    "avx512": [
        "-mavx2 -mfma -mbmi2 -mavx512f -mavx512bw -mavx512dq -mavx512vl",
        "-mprefer-vector-width=512 -Wno-maybe-uninitialized -Wno-uninitialized",
    ],
    "avx512_bf16": [
        "-mavx2 -mfma -mbmi2 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16 -mavx512vnni",
        "-mprefer-vector-width=512 -Wno-maybe-uninitialized -Wno-uninitialized",
    ],
}

# Apple's clang has no OpenMP. clang's on Linux calls LLVM's runtime, and torch's wheels bring GCC's
OPENMP = """
#include <omp.h>
#if defined(__clang__) && defined(__linux__)
#error "this module could not be imported"
#endif
int threads() { return omp_get_max_threads(); }
"""


def cpu_toolchain(version: str) -> Toolchain:
    """The C++ compiler ($CXX, or the first that is found) and its flags."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    compiler = next((name for name in names if shutil.which(shlex.split(name)[0])), None)
    if compiler is None:
        raise PlatformError(
            f"fastbert's native module needs a C++17 compiler and {' / '.join(names)} was not found: "
            "install one (Debian: apt install g++), or set FASTBERT_CPU=0 to install without it"
        )
    optimise = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
    # vectors wider than the baseline's registers only cross functions of one instruction set
    optimise += [
        "-Wno-psabi",
        "-Wno-aggressive-loop-optimizations",
        "-fno-math-errno",
        "-ffp-contract=fast",
    ]
    # clang does not know all of gcc's warnings; without OpenMP nothing reads the pragmas, nor what they alone use
    optimise += ["-Wno-unknown-warning-option"]
    serial = ["-Wno-unknown-pragmas", "-Wno-unused-variable"]
    openmp = ["-fopenmp"] if _accepts(compiler, ["-fopenmp"]) else serial
    flags = optimise + openmp + shlex.split(os.environ.get("FASTBERT_CPU_FLAGS", ""))
    described = shlex.join([compiler, *flags])
    variants = cpu_variants(compiler)
    flags += [
        f'-DFASTBERT_VERSION="{version}"',
        f'-DFASTBERT_BUILD_FLAGS="{described}"',
        f"-isystem{sysconfig.get_path('include')}",
        f"-isystem{_pybind11_include()}",
    ]
    undefined = ["-undefined", "dynamic_lookup"] if platform.system() == "Darwin" else []
    # -fopenmp is left out: fastbert/backend/cpu/__init__.py binds the module to the runtime that torch has loaded
    extra = shlex.split(os.environ.get("FASTBERT_CPU_FLAGS", ""))
    link = ["-shared", *extra, *undefined]
    sets = [f"-DFASTBERT_HAS_{name}" for name in variants if name != "baseline"]
    quick = (
        quick_variants(variants) if os.environ.get("FASTBERT_CPU_EMULATE") == "1" else frozenset()
    )
    return Toolchain(compiler, flags, link, variants, ("bindings", "runtime"), sets, quick)


# of sets that only tests run: -O2 would take twice as long to compile. GCC fuses multiply-adds, as in the other sets,
# with the second flag; clang does so without, and warns of it
QUICK = ["-O1", "-fexpensive-optimizations", "-Wno-ignored-optimization-argument"]


def quick_variants(variants: dict[str, list[str]]) -> frozenset[str]:
    """The instruction sets that a build for tests optimises little: this machine's best set alone gets the time.

    No test runs the sets that this machine lacks, and tests run the others on small inputs.
    """
    best = [name for name, flags in variants.items() if name != "emulated" and _runs(flags)][-1]
    return frozenset(variants) - {best, "emulated"}


def cpu_variants(compiler: str) -> dict[str, list[str]]:
    """The instruction sets that the compiler knows, each with its flags.

    FASTBERT_CPU_NATIVE=1 leaves out those that this machine lacks, FASTBERT_CPU_EMULATE=1 adds one for tests.
    """
    wanted: dict[str, list[str]] = {}
    if platform.machine() in ("x86_64", "AMD64"):
        wanted = {name: shlex.split(" ".join(flags)) for name, flags in ISAS.items()}
    found = {name: flags for name, flags in wanted.items() if _accepts(compiler, flags)}
    if os.environ.get("FASTBERT_CPU_NATIVE") == "1":
        found = {name: flags for name, flags in found.items() if _runs(flags)}
    if os.environ.get("FASTBERT_CPU_EMULATE") == "1":
        # AVX-512 BF16's code on vectors of 16 that the compiler splits
        found["emulated"] = [*found.get("avx2", []), "-DFASTBERT_EMULATE", *QUICK]
    return {"baseline": [], **found}


# every later GPU runs code written for sm_80, so that one front-end pass serves all targets; "ptx" is for GPUs
# newer than any here. FASTBERT_CUDA_ARCHS is such a list; "90a" and the like get a pass of their own
CUDA_ARCHS = "80,90,100,ptx"


def cuda_compiler() -> str | None:
    """nvcc: from PATH, $CUDA_HOME, or the wheel nvidia-cuda-nvcc; None if there is none."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    wheels = [folder for path in sys.path for folder in Path(path or ".").glob("nvidia/*/bin")]
    folders = [*os.environ.get("PATH", "").split(os.pathsep), f"{home}/bin", *map(str, wheels)]
    return shutil.which("nvcc", path=os.pathsep.join(folders))


def cuda_targets(compiler: str) -> list[str]:
    """nvcc's -gencode flags for FASTBERT_CUDA_ARCHS; what this nvcc does not know is left out, with a sentence."""
    listed = subprocess.run([compiler, "--list-gpu-code"], capture_output=True, text=True)
    known = set(re.findall(r"sm_(\w+)", listed.stdout))
    wanted = re.split(r"[\s,;]+", os.environ.get("FASTBERT_CUDA_ARCHS") or CUDA_ARCHS)
    wanted = [arch.removeprefix("sm_") for arch in wanted if arch]
    old = [arch for arch in wanted if arch.rstrip("af").isdigit() and int(arch.rstrip("af")) < 80]
    if old:
        raise PlatformError(
            f"FASTBERT_CUDA_ARCHS names {', '.join(old)}: the kernels need compute capability 8.0 or later"
        )
    missing = [arch for arch in wanted if arch != "ptx" and arch not in known]
    if missing:
        print(f"fastbert: {compiler} does not know {', '.join(missing)}: left out")
    found = [arch for arch in wanted if arch not in missing]
    shared = ["compute_80" if arch == "ptx" else f"sm_{arch}" for arch in found if arch[-1] != "a"]
    flags = [f"-gencode=arch=compute_80,code=[{','.join(shared)}]"] if shared else []
    flags += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in found if a[-1] == "a"]
    if not flags:
        raise PlatformError(
            f"{compiler} knows none of the architectures {', '.join(wanted)}: "
            f"set FASTBERT_CUDA_ARCHS to some of {', '.join(sorted(known))}, or FASTBERT_CUDA=0"
        )
    return flags


def cuda_toolchain(version: str) -> Toolchain:
    """nvcc and its flags; FASTBERT_CUDA_FLAGS adds to them, such as -Xptxas=-v for what kernels take."""
    compiler = cuda_compiler()
    if compiler is None:
        raise PlatformError(
            "fastbert's CUDA module needs nvcc, which is neither on PATH nor in $CUDA_HOME/bin: install the CUDA "
            "toolkit, or pip install nvidia-cuda-nvcc nvidia-cuda-cccl and build without isolation, or leave "
            "FASTBERT_CUDA unset to install without it"
        )
    targets = cuda_targets(compiler)
    flags = ["-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall", *targets]
    flags += shlex.split(os.environ.get("FASTBERT_CUDA_FLAGS", ""))
    flags += [
        f'-DFASTBERT_VERSION="{version}"',
        f'-DFASTBERT_TARGETS="{" ".join(targets)}"',
        f"-isystem={sysconfig.get_path('include')}",
        f"-isystem={_pybind11_include()}",
    ]
    # the wheels of PyPI have lib where nvcc looks into lib64; the runtime is linked in, so that no driver is needed
    libraries = Path(compiler).resolve().parent.parent / "lib"
    link = ["-shared", "-cudart=static", *targets, f"-L{libraries}"]
    return Toolchain(compiler, flags, link, {"": []}, (), [])


# module -> (folder of its sources, their suffixes, its toolchain). nvcc hands a .cpp to the host's compiler
MODULES = {
    "fastbert._cpu": ("csrc/cpu", (".cpp",), cpu_toolchain),
    "fastbert._cuda": ("csrc/cuda", (".cu", ".cpp"), cuda_toolchain),
}


def _accepts(compiler: str, flags: list[str]) -> bool:
    """Whether the compiler takes these flags."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text(OPENMP if "-fopenmp" in flags else "int nothing;\n")
        command = [*shlex.split(compiler), *flags, "-c", str(source), "-o", f"{source}.o"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _runs(flags: list[str]) -> bool:
    """Whether Linux lists every feature of these -m flags for this machine; True on other systems."""
    listed = Path("/proc/cpuinfo")
    present = set(listed.read_text().replace("_", "").split()) if listed.is_file() else None
    wanted = {flag[2:] for flag in flags if flag.startswith("-m") and "=" not in flag}
    return present is None or wanted <= present


def _pybind11_include() -> Path:
    """A link of constant name to pybind11's headers.

    Build isolation installs them into a new temporary folder each time; through the link the compile
    command stays the same and ninja has nothing to do.
    """
    import pybind11

    link = BUILD / f"pybind11-{pybind11.__version__}"
    BUILD.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(pybind11.get_include(), target_is_directory=True)
    return link


def _escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _shell(words: list[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def ninja_file(target: Path, objects: Path, sources: list[Path], tools: Toolchain) -> str:
    """The text of build.ninja for one module: a depfile per source gives the headers."""
    compiler = _shell(shlex.split(tools.compiler))
    lines = [
        "ninja_required_version = 1.5",
        "rule compile",
        f"  command = {compiler} {_shell(tools.compile_flags)} $own -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $in",
        "rule link",
        f"  command = {compiler} $in {_shell(tools.link_flags)} -o $out",
        "  description = link $out",
    ]
    built = []
    for source in sources:
        once = source.stem in tools.once
        variants = {"": tools.once_flags} if once else tools.variants
        for name, flags in variants.items():
            built.append(objects / f"{source.stem}{'.' if name else ''}{name}.o")
            lines.append(f"build {_escape(built[-1])}: compile {_escape(source)}")
            named = [f"-DFASTBERT_ISA={name}"] if name else []
            if name in tools.quick and source.stem != "_micro":
                named += QUICK
            lines.append(f"  own = {_shell([*named, *flags])}")
    lines.append(f"build {_escape(target)}: link {' '.join(map(_escape, built))}")
    return "\n".join(lines) + "\n"


class BuildNative(build_ext):
    """Compiles each Extension with ninja in a build folder that outlives the command."""

    def build_extension(self, ext: Extension) -> None:
        """Write build.ninja, run it, and copy the module to where setuptools wants it."""
        tools = MODULES[ext.name][2](self.distribution.get_version())
        folder = BUILD / ext.name
        folder.mkdir(parents=True, exist_ok=True)
        destination = Path(self.get_ext_fullpath(ext.name))
        target = folder / destination.name
        sources = [ROOT / source for source in ext.sources]
        (folder / "build.ninja").write_text(ninja_file(target, folder, sources, tools))
        try:
            subprocess.run([sys.executable, "-m", "ninja", "-C", str(folder)], check=True)
        except subprocess.CalledProcessError as error:
            rest = "; fastbert is installed without it" if ext.optional else ""
            raise PlatformError(
                f"{ext.name} did not compile: the compiler's message is above{rest}"
            ) from error
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(target, destination)


class BuildPython(build_py):
    """Starts from an empty build/lib: what an older checkout left there must not get into the wheel."""

    def run(self) -> None:
        """Empty build/lib, then copy the Python files."""
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


def wanted(name: str) -> bool:
    """Whether to build a module: FASTBERT_CPU=0 and FASTBERT_CUDA=0 leave theirs out, as does a lack of nvcc."""
    if name == "fastbert._cpu":
        return os.environ.get("FASTBERT_CPU") != "0"
    asked = os.environ.get("FASTBERT_CUDA", "auto")
    if asked not in ("auto", "0", "1"):
        raise PlatformError(f"FASTBERT_CUDA is {asked!r}: choose one of auto, 0, 1")
    if asked == "auto" and cuda_compiler() is None:
        print("fastbert: no nvcc was found, so that fastbert._cuda is not built")
        return False
    return asked != "0"


def extensions() -> list[Extension]:
    """The modules that have sources here and are wanted; without FASTBERT_CUDA=1 its failure fails no install."""
    found = {
        name: sorted(
            str(path.relative_to(ROOT))
            for path in (ROOT / folder).iterdir()
            if path.suffix in suffixes
        )
        for name, (folder, suffixes, _) in MODULES.items()
        if wanted(name)
    }
    forced = os.environ.get("FASTBERT_CUDA") == "1"
    return [
        Extension(name, sources, optional=name == "fastbert._cuda" and not forced)
        for name, sources in found.items()
        if sources
    ]


if __name__ == "__main__":
    setup(
        packages=[*find_packages(include=["fastbert", "fastbert.*"]), "fastbert.kernels"],
        package_dir={"fastbert.kernels": "kernels"},
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildNative, "build_py": BuildPython},
    )
