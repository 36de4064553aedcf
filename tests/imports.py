"""The import graph of fastbert/ and kernels/. `python tests/imports.py` prints circles, upward imports and layers.

Every import statement counts: at the top of a file, inside a function, under TYPE_CHECKING.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# The layers, lowest first: a module imports modules of its own layer and of lower ones.
# An entry is a module, or a package with all that is in it; the longest entry that fits a module counts.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("fastbert._lazy", "fastbert.files", "fastbert.machine"),
    (
        *("fastbert.models.config", "fastbert.models.config_json", "fastbert.models.field_types"),
        "fastbert.models.names",
    ),
    ("fastbert.backend", "fastbert.kernels"),
    ("fastbert.ops", "fastbert.functional"),
    ("fastbert.nn",),
    # the copies of its layers' weights that an encoder runs on
    ("fastbert.runners.copies", "fastbert.runners.forms", "fastbert.runners.frozen"),
    ("fastbert.models", "fastbert.bert"),
    ("fastbert.runners",),
    # imports no model; below integrations, whose converters read tokenizers
    ("fastbert.data",),
    ("fastbert.integrations",),
    ("fastbert.train",),
    ("fastbert.pretrain", "fastbert.finetune"),
    ("fastbert.compress", "fastbert.distil"),
    ("fastbert.tuning", "fastbert.infer"),
    # distillation of sentence encoders reads their folders as infer does
    ("fastbert.distil",),
    ("fastbert.interpret",),
    # the package's own names
    ("fastbert",),
    ("fastbert.cli", "fastbert.__main__"),
    ("fastbert.testing",),
)

# (importer, imported): why this import runs upwards
UPWARD: dict[tuple[str, str], str] = {}


def modules() -> dict[str, Path]:
    """{dotted name: file} of every module; kernels/ is installed as fastbert.kernels."""
    found = {}
    for folder, package in (("fastbert", "fastbert"), ("kernels", "fastbert.kernels")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join((package, *parts))] = path
    return found


def imports(known: dict[str, Path], name: str) -> Iterator[tuple[str, int]]:
    """(imported module of ours, line) for each import statement in a module."""
    for node in ast.walk(ast.parse(known[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: imports are absolute"
            # `from package import x` imports the module x where there is one, else the package
            names = [
                full if (full := f"{node.module}.{alias.name}") in known else str(node.module)
                for alias in node.names
            ]
        else:
            continue
        yield from ((each, node.lineno) for each in dict.fromkeys(names) if each in known)


def graph() -> dict[str, dict[str, int]]:
    """{module: {module that it imports: line}}."""
    known = modules()
    return {name: dict(imports(known, name)) for name in known}


def circles(edges: dict[str, dict[str, int]]) -> list[list[str]]:
    """The groups of modules that import each other, directly or through others (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in edges[name]:
            if other not in index:
                visit(other)
            if other in stack:
                low[name] = min(low[name], low[other])
        if low[name] == index[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1 or name in edges[name]:
                found.append(sorted(group))

    for name in edges:
        if name not in index:
            visit(name)
    return found


def layer(name: str) -> int:
    """The number of a module's layer, from 0."""
    fits = [
        (len(entry), number)
        for number, entries in enumerate(LAYERS)
        for entry in entries
        if name == entry or (entry != "fastbert" and name.startswith(entry + "."))
    ]
    if not fits:
        raise ValueError(f"{name} is in no layer: add it to LAYERS in tests/imports.py")
    return max(fits)[1]


def upward(edges: dict[str, dict[str, int]]) -> list[tuple[str, int, str]]:
    """(importer, line, imported) of each import from a higher layer."""
    return [
        (name, line, other)
        for name, others in edges.items()
        for other, line in others.items()
        if layer(other) > layer(name)
    ]


def lent() -> list[tuple[str, str]]:
    """(package, module of a higher layer whose names it lends) for each package with a lazy `__getattr__`."""
    return [
        (name, node.value)
        for name, path in modules().items()
        if path.name == "__init__.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and node.value in modules()
        and layer(node.value) > layer(name)
    ]


def main() -> int:
    """Print the graph's circles and upward imports; returns 1 where a rule is broken."""
    edges = graph()
    rings, rising = circles(edges), upward(edges)
    count = sum(map(len, edges.values()))
    print(f"{len(edges)} modules, {count} imports, {len(rings)} circles, {len(rising)} upward")
    for ring in rings:
        print(f"circle of {len(ring)}: {' '.join(ring)}")
    for name, line, other in rising:
        print(f"upward: {name}:{line} imports {other} ({UPWARD.get((name, other), 'NO REASON')})")
    for package, module in lent():
        print(f"lent by name, imported when it is used: {module} by {package}")
    return 1 if rings or {(a, b) for a, _, b in rising} - UPWARD.keys() else 0


if __name__ == "__main__":
    sys.exit(main())
