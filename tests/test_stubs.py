"""fastbert/_cpu.pyi and fastbert/_cuda.pyi have the functions of the native modules, as csrc/ declares them."""

import ast
import re
from pathlib import Path

import pytest

from fastbert.backend import cpu, cuda

ROOT = Path(__file__).resolve().parents[1]
NATIVE = {"_cpu": ("csrc/cpu/bindings.cpp", cpu), "_cuda": ("csrc/cuda/bindings.cpp", cuda)}
BOTH = pytest.mark.parametrize("name", NATIVE)
# C++ types whose Python type is not int
TYPES = {"float": "float", "double": "float", "bool": "bool", "void": "None"}
Signature = tuple[list[tuple[str, str]], str]


def stub(name: str) -> dict[str, Signature]:
    """{function: ([(argument, type)], type of the result)} of a stub."""
    tree = ast.parse((ROOT / "fastbert" / f"{name}.pyi").read_text())
    return {
        node.name: (
            [(a.arg, ast.unparse(a.annotation)) for a in node.args.posonlyargs],
            ast.unparse(node.returns),
        )
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
    }


def declared(folder: Path) -> dict[str, Signature]:
    """The signatures of the functions that a folder's headers declare, in the same form."""
    found = {}
    for header in folder.glob("*.h"):
        text = re.sub(r"//[^\n]*", "", header.read_text())
        for match in re.finditer(r"^(void|int|int64_t|double) (\w+)\(([^)]*)\);", text, re.M):
            parts = [part.split() for part in match[3].split(",") if part.strip()]
            arguments = [(part[-1], TYPES.get(" ".join(part[:-1]), "int")) for part in parts]
            found[match[2]] = arguments, TYPES.get(match[1], "int")
    return found


@BOTH
def test_a_stub_has_the_arguments_that_the_headers_declare(name):
    path, _ = NATIVE[name]
    registered = re.findall(r"^  FASTBERT_DEFINE\((\w+)\);", (ROOT / path).read_text(), re.M)
    known, ours = declared((ROOT / path).parent), stub(name)
    assert len(registered) > 15
    assert {f: ours.get(f) for f in registered} == {f: known[f] for f in registered}


@BOTH
def test_a_stub_has_the_names_of_the_built_module(name):
    _, backend = NATIVE[name]
    if backend.native is None:
        pytest.skip(backend.unavailable)
    tree = ast.parse((ROOT / "fastbert" / f"{name}.pyi").read_text())
    constants = {n.target.id for n in tree.body if isinstance(n, ast.AnnAssign)}
    built = {n for n in dir(backend.native) if not n.startswith("__")}
    assert built == stub(name).keys() | constants
    for function, (arguments, _) in stub(name).items():
        taken = re.findall(r"\barg\d+:", getattr(backend.native, function).__doc__)
        assert len(taken) == len(arguments), function
