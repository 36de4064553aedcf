"""Every Triton kernel compiled for GPUs that are not here: no spills, bounded shared memory, tensor cores, wide accesses.

The default run takes one configuration of each kernel; `make test-gpu-static` takes them all.
"""

import re

import pytest
import torch

pytest.importorskip("triton", reason="the Triton backend needs the package triton")

from fastbert import kernels
from fastbert.testing import aot
from fastbert.testing.launches import calls

if kernels.INTERPRETED:
    pytest.skip("under TRITON_INTERPRET=1 nothing is compiled", allow_module_level=True)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MATRIX = r"_(attention_(fwd|bwd|bwd_dkdv|bwd_dq)|linear_fwd)_kernel"
# what multiplies matrices: Ampere's, Hopper's and Blackwell's tensor cores, CDNA's matrix cores
TENSOR_CORES = r"(HMMA|HGMMA|UTC\w*MMA)\b.*|v_mfma_.*"


def problems(kernel: aot.Kernel) -> list[str]:
    """What is wrong with a compiled kernel, in sentences."""
    found = []
    if kernel.spilled:
        found.append(f"{kernel.spilled} bytes spilled")
    if kernel.shared > aot.SHARED[kernel.arch]:
        found.append(f"{kernel.shared} bytes of shared memory, of {aot.SHARED[kernel.arch]}")
    matrix = re.fullmatch(MATRIX, kernel.name)
    if matrix and kernel.dtype != "fp32" and not kernel.count(TENSOR_CORES):
        found.append("no tensor-core instruction")
    return [f"{kernel.name} {kernel.arch} {kernel.dtype} {kernel.constants}: {text}" for text in found]


def check(arch, dtype, full):
    found, seen = [], set()
    for label, call in calls(DTYPES[dtype], full):
        for kernel in aot.compiled(arch, call, dtype):
            seen.add(kernel.name)
            found += [f"{label}: {text}" for text in problems(kernel)]
    assert seen
    assert not found, "\n".join(found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", [80, "gfx942"])
def test_one_configuration(arch, dtype):
    check(arch, dtype, full=False)


@pytest.mark.gpu_static
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", aot.ARCHS)
def test_every_configuration(arch, dtype):
    check(arch, dtype, full=True)
