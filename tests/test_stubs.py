"""fastbert/_cpu.pyi and fastbert/_cuda.pyi have the functions of the native modules, as csrc/ declares them."""

import ast
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastbert.backend import _common, cpu, cuda

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


@BOTH
@pytest.mark.parametrize("kind", ["lacking", "arguments"])
def test_a_module_that_was_built_from_other_sources_is_refused(name, kind):
    """One sentence at import, whichever function has changed since it was built."""
    _, backend = NATIVE[name]
    if backend.native is None:
        pytest.skip(backend.unavailable)
    names = {n: getattr(backend.native, n) for n in dir(backend.native)}
    _common.check_current(SimpleNamespace(**names))
    changed = {n: v for n, v in names.items() if not n.startswith("__")}
    for n in changed:
        other = names.copy()
        if kind == "lacking":
            del other[n]
            sentence = f"it has no {n}: build it again, `pip install .`"
        elif callable(names[n]):
            taken = ", ".join(f"arg{i}: int" for i in range(99))
            other[n] = SimpleNamespace(__doc__=f"{n}({taken}) -> None")
            sentence = rf"its {n} takes 99 arguments, not \d+: build it again"
        else:
            continue
        with pytest.raises(
            ImportError, match=rf"^the native module \S+{name}\S+ was .*, {sentence}"
        ):
            _common.check_current(SimpleNamespace(**other))


def test_a_command_says_that_the_module_is_of_other_sources():
    code = (
        "import sys, types; old = types.ModuleType('fastbert._cpu'); old.__file__ = 'old.so'; "
        "sys.modules['fastbert._cpu'] = old; from fastbert.cli.app import main; main(['info'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    sentence = (
        r"error: the native module old\.so was built .* it has no LARGE: build it again, .*\n"
    )
    assert re.fullmatch(sentence, done.stderr)
