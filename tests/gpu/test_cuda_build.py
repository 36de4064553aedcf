"""The CUDA module as nvcc built it, read without a GPU: it imports, nothing spills, accesses are of 16 bytes."""

import json
import re

import pytest
import torch
from ptx.cuda_host import cuobjdump, plain

from fastbert.backend import chooser, cuda
from fastbert.cli.app import main

if cuda.native is None:
    pytest.skip(str(cuda.unavailable), allow_module_level=True)

# registers of a multiprocessor, the most of a thread, and the shared memory of a block without an opt-in: 48 KB
REGISTERS, THREAD_REGISTERS, SHARED = 65_536, 255, 49_152
# kernel -> the most registers of a thread in any instantiation. With blocks of 384 threads each thread can have 168
LIMITS = {
    "layer_norm_fwd_kernel": 80,
    "layer_norm_bwd_kernel": 168,
    "dropout_add_layer_norm_fwd_kernel": 96,
    "dropout_add_layer_norm_bwd_kernel": 168,
    "rms_norm_fwd_kernel": 80,
    "rms_norm_bwd_kernel": 168,
    "bias_gelu_fwd_kernel": 64,
    "bias_gelu_bwd_kernel": 128,
    "cross_entropy_kernel": 96,
    "embed_fwd_kernel": 96,
    "embed_bwd_kernel": 168,
    "embed_bwd_segments_kernel": 64,
    "embed_bwd_crossing_kernel": 64,
    "linear_bwd_db_kernel": 64,
    "qkv_proj_fwd_kernel": 255,
    "sum_partials_kernel": 64,
}
# kernels without 16-byte accesses: one that reads partial sums fills whole lines with 4 bytes a thread
NARROW = {"sum_partials_kernel"}


def resources() -> list[tuple[str, str, dict[str, int]]]:
    """(architecture, mangled name, {resource: amount}) of each kernel. PTX, which `make install` builds, has none."""
    found, arch = [], ""
    pattern = r"arch = (\w+)|Function (\S+):\s+((?:\S+:\d+\s?)+)"
    for match in re.finditer(pattern, cuobjdump("-res-usage")):
        arch = match[1] or arch
        if match[2]:
            numbers = re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", match[3])
            found.append((arch, match[2], {key: int(n) for key, n in numbers}))
    return found


# attention of fp32 heads above 64 needs a few registers more than there are; the bytes that a thread may spill
WIDE_FP32_ATTENTION, SPILLED = r"attention_\w*kernelIfLi128", 128


def own(name: str) -> bool:
    """Whether a kernel is not one of attention, which has limits of its own."""
    return not name.startswith("attention")


@pytest.mark.gpu_static
def test_registers_spills_and_shared_memory_are_bounded():
    assert {plain(name) for _, name, _ in resources() if own(plain(name))} == LIMITS.keys()
    problems = []
    for arch, mangled, numbers in resources():
        name = plain(mangled)
        limit = LIMITS.get(name, THREAD_REGISTERS)
        allowed = SPILLED if re.search(WIDE_FP32_ATTENTION, mangled) else 0
        if numbers["STACK"] + numbers["LOCAL"] > allowed:
            problems.append(f"{name} {arch}: spills, or an array in local memory: {numbers}")
        if numbers["REG"] > limit:
            problems.append(f"{name} {arch}: {numbers['REG']} registers, of {limit}")
        if numbers["SHARED"] > SHARED:
            problems.append(f"{name} {arch}: {numbers['SHARED']} bytes of shared memory")
    assert not problems, "\n".join(problems)


@pytest.mark.gpu_static
def test_the_template_budget():
    """Instantiations of a kernel on one architecture: three element types times four shapes, or two forms."""
    arch = resources()[0][0]
    names = [plain(name) for found, name, _ in resources() if found == arch]
    many = {name: names.count(name) for name in names if own(name) and name not in NARROW}
    assert max(many.values()) <= 12, many


@pytest.mark.gpu_static
def test_accesses_are_of_16_bytes():
    arch = resources()[0][0]
    narrow = set()
    for function in cuobjdump("-sass", "-arch", arch).split("Function : ")[1:]:
        name = plain(function.split(maxsplit=1)[0])
        if own(name) and not re.search(r"(?:LDG|STG)\.E\.128\b", function):
            narrow.add(name)
    assert narrow == NARROW


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_imports_and_says_so(capsys):
    assert cuda.native.devices().startswith("no GPU: ")
    with pytest.raises(SystemExit) as stop:
        main(["info", "--json"])
    assert not stop.value.code
    facts = json.loads(capsys.readouterr().out)
    assert facts["cuda module"]["devices"].startswith("no GPU: ")
    x = torch.ones(2, 8)
    with chooser.use("cuda"), pytest.raises(chooser.Unsupported, match="torch finds none"):
        chooser.choose("layer_norm", x.device, x, None, None, 1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_launch_that_fails_names_op_shape_and_device():
    with pytest.raises(RuntimeError, match=r"linear_bwd_db on \(1000, 768\) .* on cuda:0: \w+"):
        cuda.native.linear_bwd_db(1, 16, 768, 16, 16, 8, 1000, 768, 0, 0)


def test_partitions_do_not_outgrow_the_device():
    """Numbers of blocks with partial sums: at least one, and no more than the rows or the GPU have room for."""
    for dtype in (0, 1, 2):
        for C in (1, 100, 256, 257, 768, 1024, 1025, 8192):
            assert cuda.native.row_blocks(1, C, dtype, 108) == 1
            assert cuda.native.row_blocks(10**6, C, dtype, 108) in (108, 2 * 108, 5 * 108)
        assert cuda.native.column_blocks(1, 3072, dtype, 108) == 1
        assert cuda.native.column_blocks(10**6, 10**6, dtype, 108) == 1
        assert 1 < cuda.native.column_blocks(10**6, 3072, dtype, 108) <= 4 * 108


def test_an_unknown_element_type_is_refused():
    with pytest.raises(ValueError, match="no element type has the number 7"):
        cuda.native.column_blocks(1, 1, 7, 108)
