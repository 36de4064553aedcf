"""The house rules that a machine can check. `python tests/test_layout.py` prints the table of sizes."""

import ast
import functools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import imports
import pytest

from fastbert.backend.names import SLUGS, TABLE

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("fastbert", "kernels", "csrc", "tests", "benchmarks")
MAX_FILE, MAX_FUNCTION, MAX_KERNEL, MAX_TOP = 400, 60, 120, 8
MAX_README, MAX_MAP, MAX_COLUMNS = 110, 15, 120

# the exceptions to the rules, with their reasons; an exception that is no longer needed fails a test
LONG_FILES, LONG_FUNCTIONS = dict[str, str](), dict[str, str]()
# modules beside the slugs in a folder of ops
NOT_SLUGS = {
    "fastbert/backend/reference/samples.py": "sample inputs and costs, which every slug's reference offers",
    "fastbert/backend/reference/attention_form.py": "windows, rotary positions and biases, in every backend",
    "fastbert/ops/context.py": "seed, autocast and dispatch around a call, shared by the slugs",
    "fastbert/backend/reference/philox.py": "the definition of the dropout bits, shared by the slugs",
    **dict.fromkeys(("csrc/cpu/bindings.cpp", "csrc/cuda/bindings.cpp"), "the module's entry"),
    "csrc/cpu/peak.cpp": "what the arithmetic units can do, which percentages refer to",
    "csrc/cpu/checksum.cpp": "finds writes to packed weights that PyTorch does not count",
    **dict.fromkeys(("csrc/cpu/lamb.cpp", "csrc/cpu/muon.cpp"), "optimisers of fastbert/train"),
    "csrc/cpu/decode.cpp": "attention to kept keys and values, a step of encoder.cpp",
    "csrc/cpu/encoder.cpp": "whole layers for inference, made of the slugs' kernels",
    "csrc/cpu/runtime.cpp": "memory and threads, compiled once for all instruction sets",
}
# public functions beside a backend's own: other modules of the same backend call them
SHARED_HELPERS = {
    "fastbert/backend/cuda/bias_gelu.py": {"gradients"},
    "fastbert/backend/cuda/cross_entropy.py": {"row_losses"},
    "fastbert/backend/cuda/linear.py": {"row_sum"},
    "kernels/bias_gelu.py": {"gradients"},
    "kernels/cross_entropy.py": {"row_losses"},
    "fastbert/backend/reference/layer_norm.py": {"rebuilt", "widen"},
    "fastbert/backend/reference/linear_int8.py": {
        "most_columns",
        "quantize_rows",
        "quantize_weight",
    },
    "fastbert/backend/stock/attention.py": {"padded"},
    "fastbert/backend/stock/linear.py": {"cast", "joined"},
}
SYNCS = {"fastbert/ops/_check.py": "values are read only where checks_values says so"}
ENVIRONMENT = {
    "fastbert/backend/names.py": "FASTBERT_BACKEND, once, at import",
    "fastbert/backend/cpu/__init__.py": "FASTBERT_CPU_ISA and FASTBERT_KEEP_MEMORY, once, at import",
    "fastbert/cli/app.py": "FASTBERT_DEBUG, where an error is reported",
    "fastbert/files.py": "FASTBERT_CACHE, where fetched data and what fastbert.tune() found are kept",
}

BACKEND_API = {"unsupported", "forward", "backward"}
REFERENCE_API = BACKEND_API | {"eager", "sample_inputs", "cost"}
BACKEND_FOLDERS = {
    "kernels" if b.package == "fastbert.kernels" else b.package.replace(".", "/"): (
        REFERENCE_API if name == "reference" else BACKEND_API
    )
    for name, b in TABLE.items()
}
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef


def files(*suffixes: str, under: tuple[str, ...] = FOLDERS) -> list[str]:
    """Paths from the root, with setup.py, of the files that are ours."""
    found = [ROOT / "setup.py"] + [p for folder in under for p in (ROOT / folder).rglob("*")]
    return sorted(p.relative_to(ROOT).as_posix() for p in found if p.suffix in suffixes)


@functools.cache
def text(path: str) -> str:
    """The file's text."""
    return (ROOT / path).read_text(encoding="utf-8")


@functools.cache
def parsed(path: str) -> ast.Module:
    """The tree of a Python file, once for all tests."""
    return ast.parse(text(path))


def python(*under: str) -> Iterator[tuple[str, ast.Module]]:
    """Every Python file below these folders, parsed."""
    for path in files(".py", under=under or FOLDERS):
        if not under or path != "setup.py":
            yield path, parsed(path)


def is_kernel(node: ast.AST) -> bool:
    """Whether a Python function is compiled by Triton."""
    return any("jit" in ast.unparse(d) for d in getattr(node, "decorator_list", []))


def python_functions(path: str, tree: ast.Module) -> Iterator[tuple[str, int, int]]:
    """(name, lines, limit) of each function, from its first decorator to its end."""
    for node in ast.walk(tree):
        if isinstance(node, FUNCTION):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            limit = MAX_KERNEL if is_kernel(node) else MAX_FUNCTION
            yield f"{path}:{node.name}", (node.end_lineno or first) - first + 1, limit


def native_functions(path: str) -> Iterator[tuple[str, int, int]]:
    """(name, lines, limit) of each C++ function, as clang-format indents them; attributes only look like calls."""
    signature = (
        r"^( *)(?:template <[^\n]*\n *)?(?:[A-Za-z_][^;{}#()]*?\b)?(\w+)\([^;{}]*\)[^;{}()]*"
    )
    body = r"\{(?:[^\n]*\}$|\n.*?^\1\})"
    attribute = r"\b(?:__launch_bounds__|__attribute__|alignas)\((?:[^()]|\([^()]*\))*\)"
    plain = re.sub(attribute, lambda found: "\n" * found[0].count("\n"), text(path))
    for match in re.finditer(signature + body, plain, re.MULTILINE | re.DOTALL):
        yield f"{path}:{match[2]}", match[0].count("\n") + 1, MAX_KERNEL


@functools.cache
def functions() -> list[tuple[str, int, int]]:
    """Every function of the project: (path:name, lines, limit)."""
    found = [row for path, tree in python() for row in python_functions(path, tree)]
    native = files(".cpp", ".h", ".cu", ".cuh", under=("csrc",))
    return found + [row for path in native for row in native_functions(path)]


def file_lengths() -> dict[str, int]:
    """Lines of every source file."""
    sources = files(".py", ".cpp", ".h", ".cu", ".cuh")
    return {path: len(text(path).splitlines()) for path in sources}


def table() -> str:
    """The longest files and functions, and the medians."""
    lengths = sorted(file_lengths().items(), key=lambda item: -item[1])
    sized = sorted(functions(), key=lambda row: -row[1])
    medians = [rows[len(rows) // 2][1] for rows in (lengths, sized)]
    lines = [f"{len(lengths)} files, {len(sized)} functions, median lines {medians}"]
    lines += [f"{count:5} / {MAX_FILE}  {path}" for path, count in lengths[:10]]
    lines += [f"{count:5} / {limit}  {name}" for name, count, limit in sized[:15]]
    return "\n".join(lines)


def test_files_are_short():
    print(table())
    long = {path: n for path, n in file_lengths().items() if n > MAX_FILE}
    assert long.keys() == LONG_FILES.keys(), f"over {MAX_FILE} lines: {long}\n{table()}"


def test_functions_are_short():
    long = {name: n for name, n, limit in functions() if n > limit}
    assert long.keys() == LONG_FUNCTIONS.keys(), f"too long: {long}\n{table()}"


def test_the_measure_sees_native_functions():
    names = {name.split(":")[1]: lines for name, lines, _ in functions() if name.startswith("csrc")}
    assert 10 < names["dropout_add_layer_norm_fwd_row"] < 60
    assert 20 < names["bias_gelu_fwd_kernel"] < 60
    assert not [name for name in names if re.match("_?__|alignas", name)]


@pytest.mark.parametrize("slug", SLUGS)
def test_one_slug_is_spelled_the_same_everywhere(slug):
    folders = ("ops", "backend/reference", "backend/stock")
    expected = [f"fastbert/{folder}/{slug}.py" for folder in folders]
    expected.append(f"tests/ops/test_{slug}.py")
    missing = [path for path in expected if not (ROOT / path).is_file()]
    assert not missing, f"{slug} has no {', '.join(missing)}"


def test_no_module_beside_the_slugs():
    folders = ["fastbert/ops", *BACKEND_FOLDERS, "csrc/cpu", "csrc/cuda"]
    strangers = [
        path
        for path in files(".py", ".cpp", ".cu")
        if str(Path(path).parent) in folders
        and not Path(path).name.startswith("_")
        and Path(path).stem not in SLUGS
    ]
    assert sorted(strangers) == sorted(NOT_SLUGS)


@pytest.mark.parametrize("folder", BACKEND_FOLDERS)
def test_backend_modules_have_the_same_functions(folder):
    for path, tree in python(folder):
        if Path(path).stem not in SLUGS:
            continue
        public = {n.name for n in tree.body if isinstance(n, FUNCTION) and n.name[0] != "_"}
        assert public - SHARED_HELPERS.get(path, set()) == BACKEND_FOLDERS[folder], path
        classes = [n.name for n in tree.body if isinstance(n, ast.ClassDef) and n.name[0] != "_"]
        assert not classes, f"{path} has public classes {classes}"


def test_shared_helpers_are_shared():
    for path, names in SHARED_HELPERS.items():
        stem = Path(path).stem
        sources = [p for p in files(".py", under=("fastbert", "kernels")) if p != path]
        others = "\n".join(map(text, sources))
        for name in names:
            used = rf"from \S*\.{stem} import [^\n]*\b{name}\b|\b{stem}\.{name}\b"
            assert re.search(used, others), f"{path}:{name} is used nowhere else: make it private"


def test_no_import_circle():
    rings = imports.circles(imports.graph())
    assert not rings, "\n".join(" ".join(ring) for ring in rings)


def test_imports_run_downwards():
    rising = {(name, other): line for name, line, other in imports.upward(imports.graph())}
    assert rising.keys() == imports.UPWARD.keys(), rising


def test_a_circle_and_an_upward_import_are_seen():
    ring = {"fastbert.nn.a": {"fastbert.nn.b": 1}, "fastbert.nn.b": {"fastbert.nn.a": 2}}
    assert imports.circles(ring) == [["fastbert.nn.a", "fastbert.nn.b"]]
    rising = {"fastbert.nn.a": {"fastbert.runners.b": 3}, "fastbert.runners.b": {}}
    assert imports.upward(rising) == [("fastbert.nn.a", 3, "fastbert.runners.b")]


def test_no_product_code_imports_testing():
    found = [
        f"{name}:{line}"
        for name, others in imports.graph().items()
        for other, line in others.items()
        if other.startswith("fastbert.testing") and not name.startswith("fastbert.testing")
    ]
    assert not found, found


def test_the_top_level_is_short():
    assert len(list((ROOT / "fastbert").glob("*.py"))) <= MAX_TOP


def test_nothing_imports_a_top_level_kernels():
    for path, tree in python():
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            assert not any(n.split(".")[0] == "kernels" for n in names), f"{path}:{node.lineno}"


def test_hot_paths_do_not_sync():
    found = {
        path
        for path, tree in python(
            "fastbert/ops", "fastbert/backend/stock", "fastbert/backend/cuda", "kernels"
        )
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("item", "tolist")
    }
    assert found == SYNCS.keys()


def test_nothing_hides_from_torch_compile():
    for path, tree in python("fastbert", "kernels"):
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr == "disable":
                owner = ast.unparse(node.value)
                assert not owner.endswith(("compiler", "_dynamo")), f"{path}:{node.lineno}"


def test_the_environment_is_read_only_where_listed():
    found = {
        path
        for path, tree in python("fastbert", "kernels")
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv")
    }
    assert found == ENVIRONMENT.keys()


def test_the_forced_backend_is_read_at_import_only():
    tree = parsed("fastbert/backend/names.py")
    for function in (node for node in ast.walk(tree) if isinstance(node, FUNCTION)):
        assert "environ" not in ast.unparse(function), function.name


def test_what_is_private_to_torch_is_read_in_one_place():
    private = r"torch\.(?!ops\.)(\w+\.)*_(?!_)"
    found = {
        path
        for path, tree in python("fastbert", "kernels")
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and re.match(private, ast.unparse(node))
    }
    assert found == {"fastbert/backend/torch_private.py"}


def test_native_code_has_no_torch_in_it():
    for path in files(".cpp", ".h", ".cu", ".cuh", under=("csrc",)):
        includes = re.findall(r'#\s*include\s*[<"]([^>"]+)', text(path))
        assert not [i for i in includes if re.match(r"(torch|ATen|c10|caffe2)\b", i)], path
        if path != "csrc/cpu/vec.h":
            assert not [i for i in includes if re.search(r"intrin\.h|arm_neon|arm_sve", i)], path


def test_every_package_has_an_init():
    sources = files(".py", under=("fastbert", "kernels"))
    folders = {(ROOT / path).parent for path in sources} - {ROOT}
    assert not [str(folder) for folder in folders if not (folder / "__init__.py").is_file()]


def test_public_functions_and_classes_have_docstrings():
    bare = [
        f"{path}:{getattr(node, 'name', 'module')}"
        for path, tree in python("fastbert", "kernels")
        for node in [tree, *tree.body]
        if isinstance(node, FUNCTION | ast.ClassDef | ast.Module)
        and not getattr(node, "name", "").startswith("_")
        and not ast.get_docstring(node)
    ]
    assert not bare, bare


def test_readme_links_and_table():
    readme = text("README.md")
    links = re.findall(r"\]\((?!http)([^)#]+)\)", readme)
    assert len(links) > 3
    assert not [link for link in links if not (ROOT / link).exists()]
    results = json.loads(text("benchmarks/results/bert.json"))
    command = [sys.executable, "-m", "benchmarks.report.readme", "--check"]
    # every row has a result of ours, and the README's table is up to date
    assert results["rows"]
    assert all("fastbert" in row["results"] for row in results["rows"])
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0, command


def test_readme_is_short_and_its_map_is_true():
    readme = text("README.md")
    assert len(readme.splitlines()) <= MAX_README
    rows = [line for line in readme.split("## Map")[1].splitlines() if line.startswith("| `")]
    assert 0 < len(rows) <= MAX_MAP
    # rows of the measured tables are written by scripts
    prose = [line for line in readme.splitlines() if not line.startswith("|")]
    assert not [line for line in (*prose, *rows) if len(line) > MAX_COLUMNS]
    named = set(re.findall(r"(?<![\w/.:~-])((?:\w[\w.-]*/)+)(?=[\s`),])", readme))
    assert {"fastbert/", "kernels/", "csrc/"} <= {folder.split("/")[0] + "/" for folder in named}
    missing = [folder for folder in named if not (ROOT / folder).is_dir()]
    assert not missing, f"README names folders that are not there: {missing}"
    parts = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fastbert").glob("[a-z]*.py")}
    parts |= {f"fastbert/{folder.parent.name}/" for folder in ROOT.glob("fastbert/*/__init__.py")}
    left_out = [part for part in sorted(parts) if f"`{part}`" not in "\n".join(rows)]
    assert not left_out, f"README's map lacks {left_out}"
    # fastbert on PyPI is another project
    assert not re.search(r"pip install (-U |--upgrade )?[\"']?fastbert(?!-kernels)\b", readme)


def test_contributing_names_what_is_there():
    page = text("CONTRIBUTING.md")
    assert not [s for s in page.splitlines() if len(s) > MAX_COLUMNS and s[0] != "|"]
    links = re.findall(r"\]\((?!http)([^)#]+)\)", page)
    paths = re.findall(r"`((?:[\w.-]+/)+[\w.-]*)`", page)
    missing = [path for path in (*links, *paths) if not (ROOT / path).exists()]
    assert len(paths) > 40
    assert not missing, f"CONTRIBUTING names files that are not there: {missing}"
    targets = set(re.findall(r"`make ([\w-]+)`", page))
    assert targets <= set(re.findall(r"^([\w-]+):", text("Makefile"), re.MULTILINE))


def environment_variables() -> dict[str, set[str]]:
    """{name: files} of every variable that Python code reads from os.environ, by get or by key."""
    found: dict[str, set[str]] = {}
    for path, tree in python():
        for node in ast.walk(tree):
            read, key = None, None
            if isinstance(node, ast.Call) and node.args:
                read, key = ast.unparse(node.func), node.args[0]
            elif isinstance(node, ast.Subscript):
                read, key = f"{ast.unparse(node.value)}[]", node.slice
            ways = ("os.environ.get", "os.environ.setdefault", "os.getenv", "os.environ[]")
            if read in ways and isinstance(key, ast.Constant):
                found.setdefault(key.value, set()).add(path)
    return found


def test_contributing_lists_every_environment_variable():
    table = text("CONTRIBUTING.md").split("## Environment variables")[1].split("\n## ")[0]
    rows = [line.split("|")[1:3] for line in table.splitlines() if line.startswith("| ")][1:]
    listed = {name: place for names, place in rows for name in re.findall(r"\w+", names)}
    read = environment_variables()
    assert {"FASTBERT_BACKEND", "FASTBERT_CUDA", "CI"} <= read.keys()
    for name, paths in read.items():
        assert name in listed, f"CONTRIBUTING does not list {name}"
        left_out = [path for path in paths if Path(path).name not in listed[name]]
        assert not left_out, f"CONTRIBUTING does not say that {left_out} read {name}"
    stale = [name for name in listed if name.startswith("FASTBERT_") and name not in read]
    assert not stale, f"nothing reads {stale}"


if __name__ == "__main__":
    print(table())
