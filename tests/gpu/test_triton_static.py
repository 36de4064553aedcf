"""Triton's kernels compiled for GPUs that are not here: no spills, shared memory, tensor cores, wide accesses.

The default run compiles one configuration of each kernel in bf16 for sm_80, with optional arguments and without.
`make test-gpu-static` compiles all configurations in every dtype for every architecture.
"""

import re
from pathlib import Path
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="the Triton backend needs the package triton")

from fastbert import kernels
from fastbert.kernels import _launch, _tiles, linear_int8, relation_loss
from fastbert.testing import aot
from fastbert.testing.launches import calls

if kernels.INTERPRETED:
    pytest.skip("under TRITON_INTERPRET=1 nothing is compiled", allow_module_level=True)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MATRIX = r"_(attention_(fwd|bwd|bwd_dkdv|bwd_dq|bwd_dbias)|linear_fwd|linear_int8_fwd|relation_loss_(fwd|bwd))_kernel"
KERNELS = {
    "_attention_fwd_kernel",
    "_attention_bwd_kernel",
    "_attention_bwd_delta_kernel",
    "_attention_bwd_dkdv_kernel",
    "_attention_bwd_dq_kernel",
    "_attention_bwd_dbias_kernel",
    "_attention_rope_kernel",
    "_layer_norm_fwd_kernel",
    "_layer_norm_bwd_kernel",
    "_dropout_add_layer_norm_fwd_kernel",
    "_dropout_add_layer_norm_bwd_kernel",
    "_bias_gelu_fwd_kernel",
    "_bias_gelu_bwd_kernel",
    "_cross_entropy_fwd_kernel",
    "_cross_entropy_bwd_kernel",
    "_embed_fwd_kernel",
    "_gated_feed_forward_bwd_kernel",
    "_gated_feed_forward_fwd_kernel",
    "_embed_bwd_kernel",
    "_embed_bwd_segments_kernel",
    "_embed_bwd_crossing_kernel",
    "_linear_fwd_kernel",
    "_linear_int8_fwd_kernel",
    "_linear_int8_rows_kernel",
    "_mlm_loss_bwd_scale_kernel",
    "_relation_loss_bwd_kernel",
    "_relation_loss_fwd_kernel",
    "_rms_norm_bwd_kernel",
    "_rms_norm_fwd_kernel",
    "_sum_partials_kernel",
    "_sum_rows_kernel",
}
# kernels limited by memory bandwidth, and the accesses of less than 4 bytes a lane on NVIDIA
MEMORY = (
    r"_((layer_norm|rms_norm|dropout_add_layer_norm|bias_gelu|gated_feed_forward|embed|cross_entropy)_(fwd|bwd)"
    r"|linear_int8_rows)_kernel"
)
NARROW = r"(LDG|STG)\.E\.[US](8|16)\b.*"


# tiles of 64 rows and more use the tensor-core instructions of these architectures
GENERATION = {90: r"[HI]GMMA\b.*", 100: r"UTC\w*MMA\b.*"}


# (kernel, architecture) -> bytes that may be spilled. Attention's were measured faster than any tile without
# (docs/triton.md)
SPILLS = {
    ("_attention_bwd_kernel", 90): 128,
    # in causal attention only, which encoders do not use
    ("_attention_bwd_dkdv_kernel", 90): 8,
    ("_attention_fwd_kernel", 90): 8,
    # not measured: fp32 with a bias, heads of 128
    ("_attention_bwd_dq_kernel", 90): 8,
    ("_attention_bwd_dbias_kernel", 80): 8,
    ("_attention_bwd_dbias_kernel", 90): 40,
    ("_attention_bwd_dbias_kernel", 100): 40,
    # not measured: in fp32 up to 16 tokens, where two stages spill as much at other sizes
    ("_relation_loss_fwd_kernel", 90): 8,
    ("_relation_loss_fwd_kernel", 100): 16,
}


def problems(kernel: aot.Kernel, aligned: bool) -> list[str]:
    """The faults of a compiled kernel, in sentences; `aligned`: its rows are multiples of 16 elements."""
    found = []
    if kernel.spilled > SPILLS.get((kernel.name, kernel.arch), 0):
        found.append(f"{kernel.spilled} bytes spilled")
    if kernel.shared > aot.SHARED[kernel.arch]:
        found.append(f"{kernel.shared} bytes of shared memory, of {aot.SHARED[kernel.arch]}")
    if re.fullmatch(MATRIX, kernel.name) and (kernel.dtype != "fp32" or "int8" in kernel.name):
        large = kernel.constants["BLOCK_M"] >= 64 and kernel.arch in GENERATION
        if not kernel.count(GENERATION[kernel.arch] if large else aot.MATRIX):
            found.append("no tensor-core instruction")
    if aligned and re.fullmatch(MEMORY, kernel.name):
        if not kernel.count(aot.WIDE):
            found.append("no access of 16 bytes")
        # cross_entropy reads one single logit, that of the label
        if (narrow := kernel.count(NARROW)) > kernel.name.startswith("_cross_entropy"):
            found.append(f"{narrow} accesses of less than 4 bytes")
    where = f"{kernel.name} {kernel.arch} {kernel.dtype} {kernel.constants}"
    return [f"{where}: {text}" for text in found]


def check(arch, dtype, full):
    found, seen = [], set()
    for label, call in calls(DTYPES[dtype], full, optional=arch == 80):
        for kernel in aot.compiled(arch, call, dtype):
            seen.add(kernel.name)
            found += [f"{label}: {text}" for text in problems(kernel, aligned=not full)]
    assert seen == KERNELS
    assert not found, "\n".join(found)


def test_the_calls_reach_every_kernel():
    """The sources define the kernels in KERNELS, all of which every test must compile."""
    folder = Path(kernels.__file__).parent
    defined = re.findall(
        r"^def (_\w+_kernel)\(", "\n".join(p.read_text() for p in folder.glob("*.py")), re.M
    )
    assert set(defined) == KERNELS


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", aot.ARCHS)
def test_configurations(arch, dtype):
    """Every tile fits a matrix instruction, the head size and, where it says so, the whole sequence."""
    for D in (1, 24, 64, 80, 128):
        for drop in (False, True):
            kind = (D, DTYPES[dtype], arch, drop)
            for S in (0, 1, 16, 17, 32, 33, 64, 100, 128, 129, 512, 4096):
                forward, short = _tiles.attention_fwd(S, *kind), _tiles.attention_bwd(S, *kind)
                assert short is None or short.BLOCK_N >= S
                # where a length has no one-kernel backward a longer one has none
                assert short is not None or _tiles.attention_bwd(S + 1, *kind) is None
                bias = _tiles.attention_bwd_dbias(*kind)
                assert bias.BLOCK_N == 2 * bias.BLOCK_M
                loops = (
                    _tiles.attention_bwd_dkdv(*kind),
                    _tiles.attention_bwd_dkdv(*kind, True),
                    _tiles.attention_bwd_dq(*kind),
                    _tiles.attention_bwd_dq(*kind, True),
                    bias,
                )
                for config in filter(None, (forward, short, *loops)):
                    assert max(16, D) <= config.BLOCK_D
                    assert (
                        "tf32x3" if dtype == "fp32" and arch != "gfx942" else "ieee"
                    ) == config.PRECISION
                    assert all(
                        b >= 16 and b & (b - 1) == 0 for b in (config.BLOCK_M, config.BLOCK_N)
                    )
    # without dropout, in 16 bits: the lengths in docs/triton.md
    if dtype != "fp32" and arch != "gfx942":
        assert _tiles.attention_bwd(128, 64, DTYPES[dtype], arch, False) is not None
        assert _tiles.attention_bwd(65, 128, DTYPES[dtype], arch, False) is None


def test_gradients_turn_in_place():
    """Every element of a tile has one thread, of AMD's 64 lanes too, that loads it and those beside it in 16 bytes."""
    for half in (0, 1, 3, 16, 17, 64):
        config = _tiles.rope(half)
        assert half <= config.BLOCK_N
        assert 64 * config.num_warps * 8 <= config.BLOCK_M * config.BLOCK_N


@pytest.mark.parametrize("arch", aot.ARCHS)
@pytest.mark.parametrize("bits", [12, 8])
def test_int8_configurations(arch, bits):
    """Tiles fit matrix instructions of int8, 32 steps of K; no multiply-add is fused, as on a CPU."""
    for M in (16, 64, 512, 8192):
        for N in (1, 64, 65, 768, 30522):
            config = linear_int8._linear_int8_gemm(M, N, bits, arch)
            assert config.BLOCK_M >= 16
            assert config.BLOCK_K >= 32
            assert not config.enable_fp_fusion
    for K in (1, 768, 4096, 133144):
        rows = linear_int8._linear_int8_rows(K, arch)
        assert not rows.enable_fp_fusion
        assert 1024 * rows.num_warps >= rows.BLOCK_C


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", aot.ARCHS)
def test_relation_configurations(arch, dtype):
    """Every tile fits a matrix instruction and both head sizes."""
    for D, of_teacher in ((1, 128), (8, 16), (24, 80), (64, 64), (128, 1)):
        for S in (16, 32, 64, 512):
            for choose in (relation_loss._relation_loss_fwd, relation_loss._relation_loss_bwd):
                config = choose(S, D, of_teacher, DTYPES[dtype], arch)
                assert max(16, D) <= config.BLOCK_D
                assert max(16, of_teacher) <= config.BLOCK_T
                assert all(b >= 16 and b & (b - 1) == 0 for b in (config.BLOCK_M, config.BLOCK_N))


@pytest.mark.parametrize("arch", aot.ARCHS)
@pytest.mark.parametrize("width", [1, 100, 768, 1024, 1025, 8192])
def test_row_configurations(width, arch):
    lanes = 64 if arch == "gfx942" else 32
    for config, most in (
        (_launch.rows(width, arch), 32),
        # two rows of 1024 are fastest on Hopper
        (_launch.persistent_rows(width, arch), 48 if arch == 90 else 24),
    ):
        assert width <= config.BLOCK_C
        # a thread holds at most `most` elements
        assert lanes * most * config.num_warps >= config.ROWS * width
    for reads in (2, 3):
        config = _launch.persistent_rows(width, arch, False, reads)
        ahead = reads * (config.STAGES - 1) * config.ROWS * config.BLOCK_C * 4
        assert arch == "gfx942" or ahead <= aot.SHARED[arch]


# `make test` compiles for sm_80 what tests/ptx executes
static = pytest.mark.gpu_static


@static
def test_a_spill_is_seen():
    """A tile too large for its threads spills, and the measure for NVIDIA and that for AMD both find it."""
    config = _tiles.Attention(128, 16, 128, "ieee", 1, 1)
    qkv, cu = (
        torch.empty(s, dtype=d, device="meta")
        for s, d in (((9, 3, 2, 128), torch.bfloat16), (3, torch.int32))
    )
    form = (-1, -1, 2, None, False, None)
    with mock.patch.object(_tiles, "attention_fwd", return_value=config):
        for arch in (80, "gfx942"):
            (kernel,) = aot.compiled(
                arch,
                lambda: kernels.attention.forward(qkv, cu, 256, 0.1, 0.0, None, 0, *form, True),
            )
            assert kernel.spilled > 0, arch


@static
@pytest.mark.parametrize(("arch", "dtype"), [(80, "bf16"), (80, "fp32"), ("gfx942", "bf16")])
def test_one_configuration(arch, dtype):
    check(arch, dtype, full=False)


@static
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", aot.ARCHS)
def test_every_configuration(arch, dtype):
    check(arch, dtype, full=True)
