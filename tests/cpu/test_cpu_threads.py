"""Threads of the native ops: their number, one runtime, the GIL, concurrent calls, forked processes."""

import os
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from fastbert import functional
from fastbert.backend import chooser, cpu
from fastbert.backend.names import SLUGS
from fastbert.backend.reference.linear_int8 import quantize_weight
from fastbert.backend.reference.samples import Draw
from fastbert.testing import parity

if cpu.native is None:
    pytest.skip(str(cpu.unavailable), allow_module_level=True)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc and ELF")
# sizes at which every kernel divides its work among threads, with a remainder everywhere
T, C, F, H, D, V = 301, 132, 260, 4, 33, 515


def calls(dtype: torch.dtype) -> dict[str, dict]:
    """{slug: the arguments of one call}, with dropout where the op has it."""
    draw = Draw(dtype, seed=3)
    drop = {"p": 0.2, "seed": draw.seed(), "site": 2}
    x, norm = draw.normal(T, C), {"weight": draw.normal(C), "bias": draw.normal(C)}
    tables = {"word": draw.normal(V, C), "position": draw.normal(T, C), "type_": draw.normal(2, C)}
    ids = {"ids": draw.ids(V, T), "positions": torch.arange(T), "types": draw.ids(2, T)}
    decoder = {"weight": draw.normal(V, C, scale=0.1), "bias": draw.normal(V)}
    up, down = draw.normal(F, C, scale=0.1), draw.normal(C, F, scale=0.1)
    integers, scale = quantize_weight(up)
    ffn = {"w1": up, "b1": draw.normal(F), "w2": down, "b2": draw.normal(C)}
    qkv = {"qkv": draw.normal(T, 3, H, D), "cu_seqlens": draw.cu_seqlens(170, 1, 0, 100)}
    projections = {"weights": [draw.normal(C, C) for _ in range(3)], "biases": None, "num_heads": H}
    made = {
        "embed": {**ids, **tables, **norm, **drop},
        "linear": {"x": x, "weight": up, "bias": draw.normal(F)},
        "linear_int8": {"x": x, "weight": integers, "scale": scale, "bias": draw.normal(F)},
        "qkv_proj": {"x": x, **projections},
        "attention": {**qkv, "max_seqlen": 170, **drop},
        "layer_norm": {"x": x, **norm},
        "dropout_add_layer_norm": {"x": x, "residual": draw.normal(T, C), **norm, **drop},
        "rms_norm": {"x": x, "weight": norm["weight"]},
        "bias_gelu": {"x": draw.normal(T, F), "bias": draw.normal(F)},
        "feed_forward": {"x": x, **ffn},
        "gated_feed_forward": {"x": x, **ffn, "w1": [up, -up], "b1": None, "activation": "silu"},
        "cross_entropy": {"logits": draw.normal(T, V), "labels": draw.labels(V, T, 0.6)},
        "mlm_loss": {"hidden": x, **decoder, "labels": draw.labels(V, T, 0.6)},
        "lstm": {
            "gates": draw.normal(T, 8 * D),
            "weights": [draw.normal(4 * D, D, scale=D**-0.5) for _ in range(2)],
            "cu_seqlens": qkv["cu_seqlens"],
            "max_seqlen": 170,
            **{name: draw.normal(2, 4, D) for name in ("h0", "c0")},
        },
        "relation_loss": {
            "student": draw.normal(T, C),
            # its gradient is a zeros_like: a larger one makes torch's threads hang in a forked process
            "teacher": draw.normal(T, 16 * H),
            "cu_seqlens": qkv["cu_seqlens"],
            "max_seqlen": 170,
            "num_heads": H,
        },
    }
    assert made.keys() == set(SLUGS)
    return made


def run(slug: str, kwargs: dict) -> parity.Results:
    """Outputs and gradients on the native backend, which `_restore` forces."""
    return parity.call(getattr(functional, slug), kwargs, backward=True)


def same(a: parity.Results, b: parity.Results) -> list[str]:
    """The names of the results that differ in any bit."""
    return [key for key in a if not torch.equal(a[key], b[key])]


@pytest.fixture(autouse=True)
def _restore():
    """Force the native backend, for all threads; leave their number and the instruction set as they were."""
    before = torch.get_num_threads(), cpu.native.isa()
    with chooser.use("cpu"):
        yield
    torch.set_num_threads(before[0])
    cpu.native.use_isa(before[1])


@DTYPES
@pytest.mark.parametrize("slug", SLUGS)
def test_outputs_and_gradients_are_the_same_bits_on_any_number_of_threads(slug, dtype):
    kwargs = calls(dtype)[slug]
    for isa in cpu.native.isas():
        cpu.native.use_isa(isa)
        torch.set_num_threads(1)
        expected = run(slug, kwargs)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert same(expected, run(slug, kwargs)) == [], f"{isa}, {threads} threads"


def needed(path: Path) -> list[str]:
    """The shared libraries that an ELF file names as needed (DT_NEEDED)."""
    data = path.read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01", "not a 64-bit little-endian ELF file"
    offset, size, count = struct.unpack_from("<Q", data, 40) + struct.unpack_from("<HH", data, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, offset + i * size) for i in range(count)]
    (dynamic,) = [s for s in sections if s[1] == 6]
    strings = sections[dynamic[6]][4]
    entries = struct.iter_unpack("<qQ", data[dynamic[4] : dynamic[4] + dynamic[5]])
    starts = [strings + value for tag, value in entries if tag == 1]
    return [data[start : data.index(b"\0", start)].decode() for start in starts]


@LINUX
def test_the_module_asks_for_no_openmp_runtime_of_its_own():
    libraries = needed(Path(cpu.native.__file__))
    assert "libc.so.6" in libraries
    assert [name for name in libraries if "omp" in name] == []


RUNTIMES = """
import ctypes, pathlib
ctypes.CDLL(FOLDER + "/libgomp-first.so.1")
ctypes.CDLL(FOLDER + "/a folder/libgomp.so.1")  # torch needs this name, so it is bound to this copy
# builds of torch without libtorch_global_deps do not make their runtime visible themselves
load, ctypes.CDLL = ctypes.CDLL, lambda path, mode=0: load(path)
import torch
ctypes.CDLL = load
ctypes.CDLL(FOLDER + "/libompitrace.so")
import fastbert
assert fastbert.backend.cpu.unavailable is None, fastbert.backend.cpu.unavailable
address = lambda path: ctypes.cast(ctypes.CDLL(path).omp_get_max_threads, ctypes.c_void_p).value
print(TORCHS in pathlib.Path("/proc/self/maps").read_text(), address(None) == address(torch._C.__file__))
"""


@LINUX
def test_the_runtime_that_torch_is_bound_to_is_shared(tmp_path):
    """Two other runtimes are loaded, one before and one after torch's, and the path of torch's has a space."""
    torchs = Path(torch.__file__).parent / "lib" / "libgomp.so.1"
    if not torchs.is_file():
        pytest.skip("this torch has no libgomp.so.1 in its folder")
    (tmp_path / "a folder").mkdir()
    data = torchs.read_bytes()
    (tmp_path / "a folder" / "libgomp.so.1").write_bytes(data)
    for number, name in enumerate(("libgomp-first.so.1", "libompitrace.so")):
        # another name inside, since the loader takes a library as loaded when one with the same name is
        (tmp_path / name).write_bytes(
            data.replace(b"libgomp.so.1\0", b"libgomp.so.%d\0" % (8 + number))
        )
    code = RUNTIMES.replace("FOLDER", repr(str(tmp_path))).replace("TORCHS", repr(str(torchs)))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.split() == ["False", "True"], run.stderr


def child(code: str, timeout: int = 120) -> str:
    """The output of code in a fresh interpreter, with this file as `here`; fails when it hangs or dies."""
    prelude = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    prelude += "import torch, test_cpu_threads as here\n"
    done = subprocess.run(
        [sys.executable, "-c", prelude + code], capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


COUNTED = """
import os, time
def settled():
    # threads take a moment to end
    before, now = -1, len(os.listdir("/proc/self/task"))
    while now != before:
        time.sleep(0.2)
        before, now = now, len(os.listdir("/proc/self/task"))
    return now
made, counts = here.calls(torch.float32), []
for threads in (1, 3, 2, 1, 3):
    torch.set_num_threads(threads)
    for slug, kwargs in made.items():
        here.run(slug, kwargs)
    torch.randn(600, 600).exp_() @ torch.randn(600, 600)
    counts.append(settled())
print(*counts)
"""


@LINUX
def test_only_as_many_threads_as_torch_may_use_are_started():
    counts = list(map(int, child(COUNTED).split()))
    alone = counts[0]
    # when a team shrinks libgomp ends the threads left over and other runtimes keep them; MKL uses no more threads than
    # there are cores; torch's kernels use the same threads
    assert alone < max(counts) <= alone + 2


SINGLE = """
import os
torch.set_num_threads(1)
before = len(os.listdir("/proc/self/task"))
cpu = here.cpu.native
x, y = torch.randn(64, 768), torch.empty(64, 768)
cpu.bias_gelu_fwd(0, x.data_ptr(), 0, y.data_ptr(), 64, 768, 0, 1)
print(len(os.listdir("/proc/self/task")) - before)
cpu.bias_gelu_fwd(0, x.data_ptr(), 0, y.data_ptr(), 64, 768, 0, 2)
print(len(os.listdir("/proc/self/task")) - before)
"""


@LINUX
def test_a_kernel_starts_the_threads_that_it_was_given():
    assert child(SINGLE).split() == ["0", "1"]


def test_the_interpreter_runs_on_during_a_native_call():
    cpu.native.use_isa("baseline")
    torch.set_num_threads(1)
    n, ticks, stop = 1200, [], threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    x, y = torch.randn(n, n), torch.empty(n, n)
    p = x.data_ptr()
    thread = threading.Thread(target=tick)
    thread.start()
    try:
        start = time.perf_counter()
        # one call of 1.7e9 multiply-adds
        cpu.native.linear_fwd(0, 0, p, p, p, p, n, 0, 0, y.data_ptr(), n, n, n, 1)
        end = time.perf_counter()
    finally:
        stop.set()
        thread.join()
    inside = [t for t in ticks if start + 0.01 < t < end - 0.01]
    assert end - start > 0.03
    assert len(inside) >= 3, f"{len(inside)} ticks in {end - start:.3f} s"


@DTYPES
def test_two_python_threads_at_once_get_the_results_of_one(dtype):
    made = calls(dtype)
    torch.set_num_threads(2)
    expected = {slug: run(slug, kwargs) for slug, kwargs in made.items()}
    wrong: list[str] = []

    def work(order: list[str]) -> None:
        # in OpenMP builds of torch each Python thread has its own number of threads
        torch.set_num_threads(2)
        for slug in order * 3:
            wrong.extend(f"{slug} {key}" for key in same(expected[slug], run(slug, made[slug])))
        wrong.append("done")

    orders = [list(SLUGS), list(SLUGS)[::-1]]
    threads = [threading.Thread(target=work, args=(order,)) for order in orders]
    for t in threads:
        t.start()
    for t in threads:
        t.join(timeout=120)
    assert wrong == ["done", "done"]


# the backward of mlm_loss calls index_add_, that of linear_int8 widens the weight: with two threads torch's own kernels
# hang in a forked process
STOCK_PARALLEL = {"mlm_loss", "linear_int8"}


class Rows(torch.utils.data.Dataset):
    """Item i is op i's name and the names of the worker's results that differ from the parent's."""

    def __init__(self, made: dict, expected: dict, threads: int) -> None:
        self.made, self.expected, self.threads = made, expected, threads

    def __len__(self) -> int:
        return len(SLUGS)

    def __getitem__(self, i: int) -> list[str]:
        slug = SLUGS[i]
        if self.threads > 1 and slug in STOCK_PARALLEL:
            return [slug]
        torch.set_num_threads(self.threads)
        found = run(slug, self.made[slug])
        torch.set_num_threads(1)
        return [slug, *same(self.expected[slug], found)]


WORKERS = """
made = here.calls(torch.float32)
torch.set_num_threads(2)
expected = {slug: here.run(slug, kwargs) for slug, kwargs in made.items()}
for threads in (1, 2):
    rows = here.Rows(made, expected, threads)
    loader = torch.utils.data.DataLoader(
        rows, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    for _ in range(2):
        assert list(loader) == [[slug] for slug in here.SLUGS], threads
assert all(here.same(expected[s], here.run(s, made[s])) == [] for s in made), "the parent afterwards"
print("fine")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_workers_compute_the_same_and_do_not_hang():
    """A forked child lacks the parent's threads: a parallel region there would wait for them forever."""
    assert child(WORKERS, timeout=240).strip() == "fine"
