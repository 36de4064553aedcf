"""An op and a backend added to a copy of the package by the steps of CONTRIBUTING.md, beside a tuned.json.

No other module changes for a new backend: none outside the backends names one.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_layout import python

from fastbert.backend import tuned
from fastbert.backend.names import TABLE

ROOT = Path(__file__).resolve().parents[1]
# files outside the backends that name one
NAMES_A_BACKEND = {
    "fastbert/machine.py": "triton is a package there, whose version it reports",
    "fastbert/testing/checkpoints.py": "real models are compared with the reference",
    "fastbert/testing/parity.py": "every backend is compared with the reference",
}

# the op: y = factor x
REFERENCE = '''
"""{slug}: y = {factor} x."""

from fastbert.backend.reference.samples import Cost, Draw, Sample, nbytes


def unsupported(x):
    """The reference runs every call."""
    return None


def forward(x):
    """y like x."""
    return {factor} * x


def backward(dy):
    """dx like dy."""
    return {factor} * dy


def eager(x):
    """What a user would run."""
    return {factor} * x


def sample_inputs(dtype, device="cpu", seed=0):
    """Calls of `functional.{slug}`."""
    yield Sample("N3", {{"x": Draw(dtype, device, seed).normal(3, 5)}}, "primes")


def cost(x):
    """Reads x and writes y, both ways."""
    return Cost(2 * nbytes(x), x.numel(), 2 * nbytes(x), x.numel())
'''
OP = '''
"""{slug}: y = {factor} x."""

import torch

from fastbert.backend.chooser import choose
from fastbert.backend.tuned import TunedBy
from fastbert.ops._register import once_differentiable, record, register, wants_grad


def _fake(t, *_):
    return torch.empty_like(t)


_fwd = register("{slug}", "forward", "(Tensor x) -> Tensor", _fake, tuned_by={forward})
_bwd = register("{slug}", "backward", "(Tensor dy) -> Tensor", _fake, tuned_by={backward})


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, backend):
        ctx.backend = backend
        return _fwd(x, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return _bwd(dy, ctx.backend), None


def {slug}(x):
    """{factor} x."""
    backend = choose("{slug}", x.device, x)
    return record(_Function, x, backend) if wants_grad(x) else _fwd(x, backend)
'''
# the backend: it has one of the ops, for rows of at most 16 elements
LAYER_NORM = '''
"""layer_norm by the stock backend's."""

from fastbert.backend.stock.layer_norm import backward as backward
from fastbert.backend.stock.layer_norm import forward as forward


def unsupported(x, weight, bias, eps):
    """Why this call can't run here, from metadata only; None if it can."""
    if x.shape[1] > 16:
        return f"a row has {x.shape[1]} elements and dummy holds 16: use the torch backend"
    return None
'''


def edit(path: Path, old: str, new: str) -> None:
    """Replace `old`, which occurs once in the file."""
    content = path.read_text()
    assert content.count(old) == 1, (path, old)
    path.write_text(content.replace(old, new))


@pytest.fixture(scope="module")
def extended(tmp_path_factory) -> Path:
    """A folder with the package, two more ops (only `triple` is tuned), one more backend, and a tuned.json."""
    folder = tmp_path_factory.mktemp("extended")
    package = folder / "fastbert"
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "fastbert", package, ignore=ignored)
    for module in (ROOT / "fastbert").glob("_cpu*.so"):
        (package / module.name).symlink_to(module)
    for slug, factor, by in (("double", 2, None), ("triple", 3, "TunedBy('{0}', '{0}', '{0}')")):
        names = {"slug": slug, "factor": factor}
        names |= {"forward": by and by.format("x"), "backward": by and by.format("dy")}
        for backend in ("reference", "stock"):
            (package / "backend" / backend / f"{slug}.py").write_text(REFERENCE.format(**names))
        (package / "ops" / f"{slug}.py").write_text(OP.format(**names))
        with (package / "functional.py").open("a") as file:
            file.write(f"\nfrom fastbert.ops.{slug} import {slug} as {slug}\n")
        edit(package / "backend" / "names.py", "SLUGS = (\n", f'SLUGS = (\n    "{slug}",\n')
    (package / "backend" / "dummy").mkdir()
    (package / "backend" / "dummy" / "__init__.py").write_text('"""A backend for a test."""\n')
    (package / "backend" / "dummy" / "layer_norm.py").write_text(LAYER_NORM)
    entry = '    "dummy": Backend("fastbert.backend.dummy", "cpu"),\n'
    edit(package / "backend" / "names.py", "TABLE = {\n", "TABLE = {\n" + entry)
    common = {"dtype": "float32", "few_rows": True, "sizes": [24]}
    entries = [
        {"op": "layer_norm", "backend": "torch", **common},
        {"op": "layer_norm", "backend": "dummy", **common, "sizes": [8]},
        # names of another version of fastbert
        {"op": "gone", "backend": "torch", **common},
        {"op": "linear", "backend": "gone", **common},
    ]
    (folder / "tuned.json").write_text(
        json.dumps({tuned.device_name(torch.device("cpu")): {"entries": entries}})
    )
    return folder


def run(folder: Path, code: str) -> str:
    """The output of this code in a process that imports the extended package."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "FASTBERT_CACHE": str(folder)}
    environment.pop("FASTBERT_BACKEND", None)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_op_runs_is_explained_and_tuned_or_left_alone(extended):
    printed = run(
        extended,
        """
import json, torch, fastbert
from fastbert import functional
from fastbert.backend import tuned
from fastbert.testing import parity

assert fastbert.__file__.startswith(__import__("os").getcwd()), fastbert.__file__
x = torch.randn(3, 5, requires_grad=True)
functional.double(x).sum().backward()
assert x.grad.eq(2).all()
compiled = torch.compile(functional.double, fullgraph=True, backend="aot_eager")
assert compiled(x.detach()).equal(2 * x.detach())
for slug in ("double", "triple"):
    assert fastbert.explain(slug, x)["cpu"] == f"the cpu backend has no {slug} kernel yet"
    parity.check(slug, "torch", "N3", torch.float32, backward=True)
try:
    fastbert.tune(lambda: functional.double(x).sum().backward(), rounds=1)
except ValueError as error:
    assert "called none of fastbert's ops that are tuned" in str(error)
step = lambda: (functional.double(x) + functional.triple(x)).sum().backward()
assert fastbert.tune(step, rounds=1).keys() == {"triple"}
assert functional.double(x).equal(2 * x)
stored = json.loads(tuned.path().read_text())[tuned.device_name(x.device)]["entries"]
assert {e["op"] for e in stored} == {"gone", "layer_norm", "triple"}, stored
""",
    )
    assert "-> torch" in printed


def test_a_backend_is_chosen_explained_forced_and_refused_with_its_own_sentence(extended):
    printed = run(
        extended,
        """
import torch, fastbert
from fastbert import functional
from fastbert.backend import chooser, dummy
from fastbert.train.session import backends

narrow, wide = torch.randn(2, 8), torch.randn(2, 24)
cpu = narrow.device
assert chooser.order("cpu")[0] == "dummy"
assert chooser.choose("layer_norm", cpu, narrow, None, None, 1e-5) == "dummy"
assert chooser.choose("layer_norm", cpu, wide, None, None, 1e-5) == "torch"
assert chooser.matrix()["linear"]["dummy"] == "the dummy backend has no linear kernel yet"
assert backends("cpu")["layer_norm"] == "dummy"
assert fastbert.explain("layer_norm", narrow)["dummy"] is None
with fastbert.use("dummy"):
    functional.layer_norm(narrow)
    assert chooser.permits(dummy)
    assert not chooser.captures()
    for call in (lambda: functional.layer_norm(wide), lambda: functional.linear(wide, wide)):
        try:
            call()
        except chooser.Unsupported as error:
            print(error)
        else:
            raise AssertionError("it fell back")
""",
    )
    assert "-> dummy" in printed
    assert (
        "cannot run layer_norm: a row has 24 elements and dummy holds 16: use the torch backend"
        in printed
    )
    assert "cannot run linear: the dummy backend has no linear kernel yet" in printed


def backends_named(tree: ast.Module) -> Iterator[str]:
    """The backends' names among a module's strings; "cpu" and "cuda" count only where they are no device types."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.expr):
            continue
        strings = [c.value for c in ast.walk(node) if isinstance(c, ast.Constant)]
        names = [value for value in strings if isinstance(value, str) and value in TABLE]
        yield from (name for name in names if name in ("triton", "reference"))
        source = ast.unparse(node) if names else ""
        if re.search(r"\b(chosen|forced|backend|use|choose)\b", source):
            yield from [] if re.search(r"\.type [!=]=|device( |\))", source) else names


def test_no_backend_is_named_outside_the_backends():
    named = {
        path: sorted(names)
        for path, tree in python("fastbert")
        if not path.startswith("fastbert/backend/") and (names := {*backends_named(tree)})
    }
    assert named.keys() == NAMES_A_BACKEND.keys(), named
