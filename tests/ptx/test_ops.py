"""Every kernel of the triton and cuda backends, run on the machine with all its checks, against the fp64 reference.

On a machine with a GPU the same calls run there.
"""

from __future__ import annotations

import shutil
from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("triton", reason="the Triton backend needs the package triton")

from fastbert import functional, kernels
from fastbert.backend import chooser
from fastbert.testing import parity
from ptx import cuda_host, host
from ptx.host import on_machine
from ptx.memory import SECTOR, PtxError

if kernels.INTERPRETED:
    pytest.skip("under TRITON_INTERPRET=1 nothing is compiled", allow_module_level=True)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# (op, sample) -> {backend: kernels that its forward and backward must launch}
SMALL = {
    ("embed", "T13-C5-drop"): {
        "triton": ("embed_fwd embed_bwd embed_bwd_segments embed_bwd_crossing sum_partials"),
        "cuda": ("embed_fwd embed_bwd embed_bwd_segments embed_bwd_crossing sum_partials"),
    },
    ("embed", "T13-C6-padding"): {},
    ("linear", "T7-K13-N5"): {
        "triton": "linear_fwd sum_rows",
        "cuda": "linear_bwd_db sum_partials",
    },
    ("linear_int8", "T7-K13-N5"): {"triton": "linear_int8_rows linear_int8_fwd sum_rows"},
    ("linear_int8", "rows"): {},
    ("attention", "S33-17-H3-D64-drop"): {"cuda": "attention_fwd attention_bwd"},
    ("attention", "S129-7-H1-D8-drop"): {
        "triton": "attention_fwd attention_bwd_delta attention_bwd_dkdv attention_bwd_dq",
        "cuda": "attention_fwd attention_bwd_dkdv attention_bwd_dq",
    },
    ("attention", "modern"): {"triton": "attention_fwd attention_bwd_dbias attention_rope"},
    ("layer_norm", "N7x13"): {
        "triton": "layer_norm_fwd layer_norm_bwd sum_partials",
        "cuda": "layer_norm_fwd layer_norm_bwd sum_partials",
    },
    ("layer_norm", "N37-output"): {},
    ("dropout_add_layer_norm", "T7-C13-drop"): {
        "triton": "dropout_add_layer_norm_fwd dropout_add_layer_norm_bwd sum_partials",
        "cuda": "dropout_add_layer_norm_fwd dropout_add_layer_norm_bwd sum_partials",
    },
    ("dropout_add_layer_norm", "sum-nobias"): {},
    ("dropout_add_layer_norm", "rows"): {},
    ("rms_norm", "N7x13"): {
        "triton": "rms_norm_fwd rms_norm_bwd sum_partials",
        "cuda": "rms_norm_fwd rms_norm_bwd sum_partials",
    },
    ("rms_norm", "plain"): {},
    ("bias_gelu", "T7-F13"): {
        "triton": "bias_gelu_fwd bias_gelu_bwd sum_partials",
        "cuda": "bias_gelu_fwd bias_gelu_bwd sum_partials",
    },
    ("bias_gelu", "tails"): {},
    ("qkv_proj", "T7-C15-H3-split"): {
        "triton": "linear_fwd sum_rows",
        "cuda": "qkv_proj_fwd linear_bwd_db sum_partials",
    },
    ("feed_forward", "T5-C7-F11"): {"triton": "linear_fwd bias_gelu_bwd"},
    ("gated_feed_forward", "T7-C9-F13-silu"): {
        "triton": "linear_fwd gated_feed_forward_fwd gated_feed_forward_bwd sum_rows"
    },
    ("gated_feed_forward", "T67-C16-F24"): {},
    ("cross_entropy", "N7-V13"): {
        "triton": "cross_entropy_fwd cross_entropy_bwd",
        "cuda": "cross_entropy",
    },
    ("mlm_loss", "T17-C5-V13"): {
        "triton": "cross_entropy_fwd mlm_loss_bwd_scale",
        "cuda": "cross_entropy",
    },
    ("relation_loss", "S5-3-1-H2-D3-5"): {"triton": "relation_loss_fwd relation_loss_bwd"},
    ("relation_loss", "tail"): {},
}
# Triton's one-kernel backward takes this sample in 16 bits only
SHORT = ("attention", "S33-17-H3-D64-drop"), "attention_fwd attention_bwd"


def expected(name: str, slug: str, sample: str, dtype: str) -> set[str]:
    """The full names of the kernels in the table."""
    promised = SMALL[slug, sample].get(name, "")
    if name == "triton" and (slug, sample) == SHORT[0] and dtype != "fp32":
        promised = SHORT[1]
    return {f"{'_' * (name == 'triton')}{kernel}_kernel" for kernel in promised.split()}


def check(name: str, slug: str, sample: str, dtype: str, backward: bool) -> set[str]:
    """parity.check on the machine, or on a GPU; returns the kernels that ran, on a GPU the expected ones."""
    real = torch.cuda.is_available()
    if name == "cuda" and not real and (reason := cuda_host.missing()):
        pytest.skip(reason)
    with nullcontext([]) if real else on_machine(name) as launches:
        try:
            parity.check(slug, name, sample, DTYPES[dtype], backward, again=real)
        except chooser.Unsupported as reason:
            pytest.skip(str(reason))
    return (
        expected(name, slug, sample, dtype) if real and backward else {x.kernel for x in launches}
    )


def small() -> list:
    """(op, sample, dtype) of SMALL. Of an op's second sample `make test` runs bf16 alone, `make test-ptx` fp32 too.

    fp16, which has the kernels of bf16, runs in test_every_sample only.
    """
    first = dict(reversed(SMALL))
    full = {
        (slug, sample, "fp32"): pytest.mark.ptx_full
        for slug, sample in SMALL
        if sample != first[slug]
    }
    keys = [(*key, dtype) for key in SMALL for dtype in ("fp32", "bf16")]
    return [pytest.param(*key, marks=full.get(key, ())) for key in keys]


@pytest.mark.parametrize(("slug", "sample", "dtype"), small())
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_small(name, slug, sample, dtype):
    ran = check(name, slug, sample, dtype, backward=True)
    assert ran >= expected(name, slug, sample, dtype)


def every() -> list[tuple[str, str, str]]:
    """(op, sample, dtype) of all sample inputs."""
    return [
        (slug, sample.id, dtype)
        for slug in chooser.SLUGS
        for dtype, torch_dtype in DTYPES.items()
        for sample in parity.samples(slug, torch_dtype)
    ]


@pytest.mark.ptx_full
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(("slug", "sample", "dtype"), every())
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_every_sample(name, slug, sample, dtype, backward):
    check(name, slug, sample, dtype, backward)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs it")
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc, for source lines")
def test_an_error_in_cuda_names_its_source(monkeypatch):
    if reason := cuda_host.missing():
        pytest.skip(reason)
    monkeypatch.setattr(host.Tensors, "_expose", lambda self, t: self._buffer(t, 0))
    with (
        on_machine("cuda"),
        chooser.use("cuda"),
        pytest.raises(PtxError, match=r"out-of-bounds.*`ld\.global.*\(\w+\.cuh?:\d+\)"),
    ):
        functional.layer_norm(torch.randn(4, 8), torch.ones(8))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs it")
def test_a_tensor_that_nobody_wrote_is_seen():
    """Reading a tensor's shape, or a view of it, does not count as a write; filling it does."""
    x = torch.ones(8)
    with on_machine("triton"), chooser.use("triton"):
        empty = torch.empty(4, 8)
        assert empty.shape == empty[:].requires_grad_(False).shape
        with pytest.raises(PtxError, match="uninitialised"):
            functional.layer_norm(empty, x)
        functional.layer_norm(torch.empty(4, 8).fill_(1.0), x)
        empty[:] = 2.0
        functional.layer_norm(empty, x)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs it")
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_requests_of_attention_fill_their_sectors(name):
    """Loads and stores of aligned rows use whole sectors without bank conflicts; backward has five products."""
    if name == "cuda" and (reason := cuda_host.missing()):
        pytest.skip(reason)
    qkv, cu = torch.randn(64, 3, 1, 64).bfloat16(), torch.tensor([0, 64], dtype=torch.int32)
    with on_machine(name) as launches, chooser.use(name):
        parity.call(
            functional.attention, {"qkv": qkv, "cu_seqlens": cu, "max_seqlen": 64}, backward=True
        )
    for launch in launches:
        counts = launch.counts
        assert sum(counts.asked.values()) > 0.9 * SECTOR * sum(counts.sectors.values()), launch
        assert counts.shared_wavefronts <= 1.01 * counts.shared_accesses, launch
    # a product is S S D multiply-adds: two products forward, five backward
    assert sum(launch.counts.macs for launch in launches) == 7 * 64**3


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs it")
def test_the_cost_of_a_window_is_linear():
    """Of a sequence twice as long, each of Triton's kernels computes some twice the products, not four times."""
    macs = []
    for S in (256, 512):
        call = {
            "qkv": torch.randn(S, 3, 1, 16).bfloat16(),
            "cu_seqlens": torch.tensor([0, S], dtype=torch.int32),
            "max_seqlen": S,
            "window": (16, 16),
        }
        with on_machine("triton") as launches, chooser.use("triton"):
            parity.call(functional.attention, call, backward=True)
        macs.append({launch.kernel: launch.counts.macs for launch in launches})
    short, long = macs
    products = [kernel for kernel in short if short[kernel]]
    assert len(products) == 3
    for kernel in products:
        assert long[kernel] < 2.5 * short[kernel], kernel


def test_the_small_samples_promise_every_kernel():
    promised = {
        name: {
            kernel
            for slug, sample in SMALL
            for dtype in DTYPES
            for kernel in expected(name, slug, sample, dtype)
        }
        for name in ("triton", "cuda")
    }
    import test_triton_static

    assert promised["triton"] == test_triton_static.KERNELS
    if (reason := cuda_host.missing()) is None:
        assert promised["cuda"] == {cuda_host.plain(kernel) for kernel in cuda_host.texts()}
    else:
        pytest.skip(reason)
