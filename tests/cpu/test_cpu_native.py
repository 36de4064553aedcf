"""The native CPU module itself: dropout bits, thread counts, one OpenMP runtime, refusals."""

import subprocess
import sys

import pytest
import torch

from fastbert.backend import cpu
from fastbert.backend.reference import philox

if cpu.native is None:
    pytest.skip(str(cpu.unavailable), allow_module_level=True)

from fastbert.backend.cpu import _gemm, embed, layer_norm
from fastbert.backend.cpu import dropout_add_layer_norm as op

WORDS = 64  # in one call of native_words


def philox_words(seed: int, row: int, site: int, groups: int) -> list[int]:
    """Philox4x32-10 in plain integers, checked against Random123's known answers below."""
    return [
        word
        for group in range(groups)
        for word in philox_block(
            (group, row, site, 0), (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)
        )
    ]


def philox_block(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Ten rounds on one counter."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        first, second = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            second >> 32 ^ c1 ^ k0,
            second & 0xFFFFFFFF,
            first >> 32 ^ c3 ^ k1,
            first & 0xFFFFFFFF,
        )
        k0, k1 = k0 + 0x9E3779B9 & 0xFFFFFFFF, k1 + 0xBB67AE85 & 0xFFFFFFFF
    return c0, c1, c2, c3


def native_words(seed: int, row: int, site: int, n: int = WORDS) -> list[int]:
    """The first `n` words of a row from the native module."""
    words = torch.zeros(n, dtype=torch.int32)
    cpu.native.philox_row(words.data_ptr(), n, seed, row, site)
    return [w & 0xFFFFFFFF for w in words.tolist()]


# kat_vectors of Random123 (Salmon et al.)
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_of_this_test_gives_the_known_answers(counter, key, expected):
    assert philox_block(counter, key) == expected


def test_native_philox_gives_the_known_answer():
    assert tuple(native_words(0, 0, 0)[:4]) == KNOWN_ANSWERS[0][2]


@pytest.mark.parametrize("seed", [1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF])
@pytest.mark.parametrize(("row", "site"), [(0, 1), (70_000, 3), (2**31 + 1, 2**32 - 1)])
def test_native_philox_words_are_those_of_the_definition(seed, row, site):
    assert native_words(seed, row, site, 2 * WORDS) == philox_words(seed, row, site, WORDS // 2)


def sample(N: int, C: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Inputs of one call with a gradient."""
    torch.manual_seed(N + C)
    shapes = {"x": (N, C), "residual": (N, C), "dy": (N, C)}
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    return tensors | {"weight": torch.randn(C), "bias": torch.randn(C)}


def run(t: dict[str, torch.Tensor], p: float, rows: torch.Tensor | None = None, save: bool = True):
    """Every output and gradient of one call of dropout_add_layer_norm."""
    seed = torch.tensor([0x5EED_0000_0001])
    args = (p, seed, 5, rows)
    y, z, mean, rstd = op.forward(t["x"], t["residual"], t["weight"], t["bias"], 1e-12, *args, save)
    grads = op.backward(t["dy"], z, t["weight"], mean, rstd, *args) if save else ()
    return y, z, mean, rstd, *grads


def run_layer_norm(t: dict[str, torch.Tensor], weight: torch.Tensor | None):
    """Every output and gradient of one call of layer_norm."""
    y, mean, rstd = layer_norm.forward(t["x"], weight, None, 1e-5)
    return y, mean, rstd, *layer_norm.backward(t["dy"], t["x"], weight, mean, rstd)


def run_embed(t: dict[str, torch.Tensor], ready: bool, few: bool):
    """Every output and gradient of one call of embed, with position tables of 2 or of 130 rows."""
    T, C = t["x"].shape
    torch.manual_seed(T)
    V, P = (3, 2) if few else (777, 130)
    dtype = t["x"].dtype
    word, position, type_ = (torch.randn(rows, C).to(dtype) for rows in (V, P, 2))
    # squared, so that low ids are frequent: their gradients sum over many tokens
    ids = (torch.rand(T).square() * V).long()
    inputs = (t["x"] if ready else ids, torch.randint(P, (T,)), torch.randint(2, (T,)))
    tables = (None if ready else word, position, type_)
    drop = (0.1, torch.tensor([0x5EED_0000_0001]), 5)
    y, mean, rstd = embed.forward(*inputs, *tables, t["weight"], t["bias"], 1e-12, *drop, dtype)
    grads = embed.backward(
        t["dy"], *inputs, *tables, t["weight"], mean, rstd, *drop, None if ready else 1, 0, True
    )
    return y, mean, rstd, *grads


# every call whose sums over rows could depend on the number of threads
CALLS = {
    "dropout_add_layer_norm": lambda t: run(t, 0.1),
    "layer_norm": lambda t: run_layer_norm(t, t["weight"]),
    "layer_norm-plain": lambda t: run_layer_norm(t, None),
    "embed": lambda t: run_embed(t, ready=False, few=False),
    "embed-few-rows": lambda t: run_embed(t, ready=False, few=True),
    "embed-ready": lambda t: run_embed(t, ready=True, few=False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CALLS)
def test_results_do_not_depend_on_the_thread_count(name, dtype):
    # work for eight threads, partitions of unequal length, a tail of columns
    t = sample(1001, 261, dtype)
    before = torch.get_num_threads()
    try:
        outputs = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            outputs.append(CALLS[name](t))
    finally:
        torch.set_num_threads(before)
    for other in outputs[1:]:
        for first, second in zip(outputs[0], other, strict=True):
            assert torch.equal(first, second)


@pytest.mark.parametrize("isa", cpu.native.isas())
@pytest.mark.parametrize(("N", "K"), [(1024, 1040), (1030, 1031), (30, 48)])
def test_weight_gradients_of_any_size(isa, N, K):
    """Large ones with rows of whole vectors bypass the caches; 1031 columns and small ones do not."""
    dy, x = torch.randn(5, N), torch.randn(5, K)
    before = cpu.native.isa()
    cpu.native.use_isa(isa)
    try:
        _, dweight, _ = _gemm.gradients(dy, x, [torch.zeros(N, K)], [False, True, False])
    finally:
        cpu.native.use_isa(before)
    expected = dy.double().T @ x.double()
    torch.testing.assert_close(dweight.double(), expected, rtol=1e-5, atol=1e-5)


def test_rows_of_tables_without_a_token_and_padding_get_zeros():
    t = sample(5, 12, torch.float32)
    ids, positions = torch.tensor([4, 1, 4, 0, 1]), torch.arange(5)
    word, position = torch.randn(70, 12), torch.randn(9, 12)
    args = (ids, positions, None, word, position, None)
    _, mean, rstd = embed.forward(*args, t["weight"], t["bias"], 1e-12, 0.0, None, 0, word.dtype)
    dword, dposition, dtype, *_ = embed.backward(
        t["dy"], *args, t["weight"], mean, rstd, 0.0, None, 0, 1, 2, True
    )
    assert set(dword.abs().sum(1).nonzero().flatten().tolist()) == {0, 4}
    assert set(dposition.abs().sum(1).nonzero().flatten().tolist()) == {0, 1, 3, 4}
    assert dtype.numel() == 0
    assert torch.equal(dword[4], dposition[0] + embed_row(t, args, mean, rstd, 2))


def embed_row(t, args, mean, rstd, token: int) -> torch.Tensor:
    """The gradient of one token's position."""
    grads = embed.backward(t["dy"], *args, t["weight"], mean, rstd, 0.0, None, 0, None, None, True)
    return grads[1][token]


@pytest.mark.parametrize("C", [1, 3, 4, 63, 64, 65, 768])
@pytest.mark.parametrize("rows", [None, torch.tensor([9, 2**31 + 1, 0])], ids=["dense", "rows"])
def test_dropout_keeps_what_the_reference_keeps(C, rows):
    t = sample(3, C, torch.float32) | {"residual": torch.zeros(3, C), "x": torch.ones(3, C)}
    _, z, *_ = run(t, 0.3, rows)
    keep = philox.keep_mask(
        torch.tensor([0x5EED_0000_0001]), 5, 3 if rows is None else rows, C, 0.3
    )
    assert torch.equal(z != 0, keep)
    assert torch.equal(z[keep], torch.full_like(z[keep], 1 / 0.7))


def test_a_dropped_infinity_is_zero():
    t = sample(1, 64, torch.float32) | {"x": torch.full((1, 64), torch.inf)}
    _, z, *_ = run(t, 0.5)
    keep = philox.keep_mask(torch.tensor([0x5EED_0000_0001]), 5, 1, 64, 0.5)
    assert torch.equal(z[~keep], t["residual"][~keep])
    assert z[keep].isinf().all()


def test_bf16_rounds_as_torch_does_and_keeps_nan():
    x = torch.randn(64, 128)
    x[0, 0], x[1, 1], x[2, 2] = torch.nan, torch.inf, torch.finfo(torch.float32).max
    t = sample(64, 128, torch.bfloat16) | {"x": x.bfloat16()}
    _, z, *_ = run(t, 0.0)
    expected = (t["x"].float() + t["residual"].float()).bfloat16()
    assert torch.equal(z.isnan(), expected.isnan())
    assert torch.equal(z.nan_to_num(), expected.nan_to_num())


def test_a_nan_of_any_payload_stays_a_nan_in_bf16():
    # rounding by adding to the bits would carry a payload of ones into the sign, and give -0 or 0
    bits = [0x7F800001, 0x7FFFFFFF, 0x7FFF8000, -1, -0x7FFFFF, 0x7FC00000] * 8
    bias = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    y, *_ = layer_norm.forward(torch.randn(3, 48).bfloat16(), torch.ones(48), bias, 1e-5)
    assert y.isnan().all()


def test_without_save_the_output_is_the_same_and_z_is_empty():
    t = sample(5, 12, torch.bfloat16)
    y, z, mean, rstd = run(t, 0.1, save=False)
    assert z.shape == (0, 12)
    for ours, theirs in zip((y, mean, rstd), (run(t, 0.1)[i] for i in (0, 2, 3)), strict=True):
        assert torch.equal(ours, theirs)


def test_dx_does_not_alias_dresidual():
    *_, dx, dresidual, _, _ = run(sample(4, 8, torch.float32), 0.0)
    assert torch.equal(dx, dresidual)
    assert dx.data_ptr() != dresidual.data_ptr()


def test_empty_input_gives_empty_output_and_zero_weight_gradients():
    outputs = run(sample(0, 8, torch.float32), 0.1)
    assert [tuple(o.shape) for o in outputs[:6]] == [(0, 8), (0, 8), (0,), (0,), (0, 8), (0, 8)]
    assert all(torch.equal(o, torch.zeros(8)) for o in outputs[6:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=["fp16", "fp64"])
def test_other_dtypes_are_unsupported_with_a_sentence(dtype):
    t = sample(2, 4, dtype)
    reason = op.unsupported(
        t["x"], t["residual"], t["weight"], t["bias"], 1e-12, 0.0, None, 0, None, False
    )
    assert str(dtype) in reason
    assert "torch backend" in reason


def test_unsupported_is_traceable():
    def ask(x: torch.Tensor) -> torch.Tensor:
        reason = op.unsupported(x, x, x[0], x[0], 1e-12, 0.1, None, 0, None, True)
        return x + 1 if reason is None else x - 1

    traced = torch.compile(ask, fullgraph=True, backend="eager")
    for dtype, expected in ((torch.float32, 1.0), (torch.float16, -1.0)):
        assert (traced(torch.zeros(2, 4, dtype=dtype)) == expected).all()


def test_build_info_names_version_compiler_and_flags():
    import fastbert

    info = cpu.native.build_info()
    assert info["version"] == fastbert.__version__
    assert info["compiler"].split()[0] in ("gcc", "clang")
    assert "-O3" in info["flags"]
    assert "march=native" not in info["flags"]


ONE_RUNTIME = """
import torch, fastbert
from fastbert.functional import dropout_add_layer_norm
x = torch.randn(512, 768)
with fastbert.use("cpu"):
    dropout_add_layer_norm(x, x, x[0], x[0], p=0.1)
(x @ x.T).exp()
maps = open("/proc/self/maps").read().splitlines()
print(*sorted({m.split()[-1] for m in maps if "libgomp" in m or "libomp" in m or "libiomp" in m}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
def test_one_openmp_runtime_is_mapped():
    # a process of its own: packages that other tests import bring another libgomp, such as scikit-learn's wheel
    output = subprocess.run(
        [sys.executable, "-c", ONE_RUNTIME], capture_output=True, text=True, check=True
    )
    runtimes = output.stdout.split()
    assert len(runtimes) == 1, f"more than one OpenMP runtime: {runtimes}"
