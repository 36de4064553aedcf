"""fastbert._cuda without CUDA: its object files linked with cudart.cpp, and the PTX inside them."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fastbert.backend import cuda
from ptx.memory import PtxError
from ptx.program import Program, parse

BUILT = cuda.native
ROOT = Path(__file__).resolve().parents[2]
Run = Callable[[str, list[int], list[int], int, list[int]], None]
_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_void_p),
)


def missing() -> str | None:
    """Why the module can't run here, or None."""
    if BUILT is None:
        return str(cuda.unavailable)
    if not _objects():
        return "the CUDA module's object files are not in build/: install fastbert from this checkout, `make install`"
    if shutil.which("c++") is None:
        return "there is no C++ compiler: install g++"
    return None


def _objects() -> list[Path]:
    tag = Path(str(BUILT.__file__)).name if BUILT else ""
    folders = [p.parent for p in (ROOT / "build").glob(f"native-*/fastbert._cuda/{tag}")]
    return sorted(folders[0].glob("*.o")) if folders else []


@cache
def _module() -> tuple[ModuleType, ctypes.CDLL]:
    """The module, linked once per process, and the same library for ctypes."""
    if (reason := missing()) is not None:
        pytest.skip(reason)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "_cuda.so"
        stub = Path(__file__).with_name("cudart.cpp")
        command = [*shlex.split(os.environ.get("CXX", "c++")), "-std=c++17", "-shared", "-fPIC"]
        subprocess.run([*command, *map(str, _objects()), str(stub), "-o", str(file)], check=True)
        # the last part of the name must be that of PYBIND11_MODULE
        spec = importlib.util.spec_from_file_location("ptx._cuda", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module, ctypes.CDLL(str(file))


class Native:
    """The module whose launches call `run(kernel, grid, block, shared bytes, addresses of arguments)`."""

    def __init__(self, run: Run) -> None:
        self.module, library = _module()
        self.error: BaseException | None = None

        def launched(name: bytes, dims: Any, shared: int, arguments: Any) -> int:
            kernel = name.decode()
            try:
                count = len(program(kernel).functions[kernel].parameters)
                run(kernel, dims[0:3], dims[3:6], shared, [arguments[i] for i in range(count)])
            except BaseException as error:
                self.error = error
                return 1
            return 0

        self.callback = _CALLBACK(launched)
        self.listen = lambda: library.ptx_machine(self.callback)

    def __getattr__(self, name: str) -> Any:
        """The module's function; it raises the error of the machine."""
        function = getattr(self.module, name)

        def call(*args: Any) -> Any:
            self.listen()
            try:
                return function(*args)
            except RuntimeError:
                error, self.error = self.error, None
                if error is not None:
                    raise error from None
                raise

        return call


def modules() -> Iterator[ModuleType]:
    """fastbert.backend.cuda and its adapters."""
    yield cuda
    for found in pkgutil.iter_modules(cuda.__path__):
        yield import_module(f"fastbert.backend.cuda.{found.name}")


@cache
def cuobjdump(*arguments: str) -> str:
    """The output of cuobjdump, from the toolkit or from Triton's package, for the built module."""
    tool = shutil.which("cuobjdump")
    spec = None if tool else importlib.util.find_spec("triton")
    if spec is not None and spec.origin:
        folder = Path(spec.origin).parent / "backends" / "nvidia" / "bin"
        tool = shutil.which("cuobjdump", path=str(folder))
    if tool is None:
        pytest.skip("there is no cuobjdump: install the CUDA toolkit, or triton")
    assert BUILT is not None
    command = [tool, *arguments, str(BUILT.__file__)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@cache
def texts() -> dict[str, str]:
    """{kernel: PTX of a module with this kernel only}, from the PTX inside the built module."""
    dump = cuobjdump("-ptx")
    found = {}
    for module in re.findall(r"^\.version.*?(?=^Fatbin|\Z)", dump, re.MULTILINE | re.DOTALL):
        head, *entries = re.split(
            r"^(?=(?:\.visible |\.weak )?\.entry )", module, flags=re.MULTILINE
        )
        files = "\n".join(re.findall(r"^\s*\.file.*$", module, re.MULTILINE))
        for entry in entries:
            name = re.search(r"\.entry\s+([\w$]+)", entry)
            # text after an entry's end belongs to every kernel
            body, _, rest = entry.partition("\n}\n")
            head += rest
            if name:
                found[name[1]] = f"{head}\n{files}\n{body}\n}}\n"
    return found


@cache
def program(kernel: str) -> Program:
    """One kernel of the built module."""
    if kernel not in texts():
        raise PtxError("unsupported", f"{kernel} is not in the module's PTX: build it with ptx")
    return parse(texts()[kernel])


def line(kernel: str, index: int) -> str:
    """The source line of an instruction of the built module, from a compilation with lines; "" if unknown."""
    named = _SOURCE.search(kernel)
    source = ROOT / "csrc" / "cuda" / f"{named[1]}.cu" if named else None
    if source is None or not source.is_file() or shutil.which("nvcc") is None:
        return ""
    command = [
        "nvcc",
        "-ptx",
        "-lineinfo",
        "-arch=compute_80",
        "-O3",
        "-std=c++17",
        str(source),
        "-o",
        "-",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return ""
    functions = parse(done.stdout).functions
    # the names of unnamed namespaces hold a hash
    found = [f for name, f in functions.items() if _HASH.sub("", name) == _HASH.sub("", kernel)]
    # the machine adds an instruction at the end of a function, which has no line
    return found[0].code[index].line if found and index < len(found[0].code) else ""


_SOURCE = re.compile(r"GLOBAL__N__[0-9a-f]{8}_\d+_(\w+?)_cu_")
_HASH = re.compile(r"(?<=GLOBAL__N__)[0-9a-f]{8}|(?<=_cu_)[0-9a-f]{8}")


def plain(mangled: str) -> str:
    """The kernel's own name: it follows its length and precedes template arguments or the end of a scope."""
    return re.search(r"(?<=\d)[a-z_]+_kernel(?=[IE])", mangled)[0]  # type: ignore[index]
