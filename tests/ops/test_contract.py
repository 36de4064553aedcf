"""The contract of every op: schema, gradients, dtypes under autocast, refusals, choice of backend."""

import importlib
import threading
from types import SimpleNamespace

import pytest
import torch
from harness import compiled, short, tensors
from torch.utils._python_dispatch import TorchDispatchMode

import fastbert
from fastbert import functional
from fastbert.backend import chooser
from fastbert.ops import _register
from fastbert.testing import parity
from fastbert.testing.budget import excess

ALL = pytest.mark.parametrize("slug", chooser.SLUGS)
# float inputs that get no gradient
CONSTANTS = {("linear_int8", "scale"), ("relation_loss", "teacher")}


class _Recorder(TorchDispatchMode):
    """Records the calls of our registered ops."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastbert":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def skip_absent(slug, name):
    """Skip a backend that lacks this op, or a device in this process."""
    if reason := chooser.matrix()[slug][name]:
        pytest.skip(reason)
    if chooser.device_of(name) != "cpu":
        pytest.skip(f"the {name} backend's kernels need a GPU, or TRITON_INTERPRET=1")


def small(slug, dtype=torch.float32):
    """The samples that are cheap and finite."""
    picked = []
    for sample in parity.samples(slug, dtype):
        leaves = [t for _, t in parity.leaves_of(sample.kwargs)]
        if all(t.numel() < 600 and not t.isnan().any() for t in leaves):
            picked.append(sample)
    return picked


@ALL
@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all"])
@pytest.mark.parametrize("name", ["torch", "cpu", "triton"])
def test_opcheck(slug, name, every):
    """opcheck traces and compiles: the default run checks a third of the samples, `make test-slow` all.

    Of Triton, whose interpreter takes seconds for each, the default run checks one. Its other shapes are in the
    parity tests.
    """
    skip_absent(slug, name)
    checked = False
    samples = small(slug) if every == 1 else small(slug)[1::every]
    for sample in samples[: 1 if (name, every) == ("triton", 3) else None]:
        with chooser.use(name), _Recorder() as recorder:
            try:
                parity.call(getattr(functional, slug), sample.kwargs, backward=True)
            except chooser.Unsupported:
                continue
        checked = True
        assert {str(func)[9:] for func, _ in recorder.calls} == {
            f"{slug}_fwd.default",
            f"{slug}_bwd.default",
        }
        for func, args in recorder.calls:
            args = tuple(parity.tree_map(a, torch.Tensor.detach) for a in args)
            torch.library.opcheck(func, args)
    assert checked


@ALL
def test_eager_calls_skip_the_dispatcher_and_agree(slug):
    """Without a mode that sees the registered op its body runs directly, to the same bits. The profiler sees it."""
    sample = small(slug)[1]
    op = getattr(functional, slug)
    direct = parity.call(op, sample.kwargs, backward=True)
    with _Recorder() as recorder:
        seen = parity.call(op, sample.kwargs, backward=True)
    assert len(recorder.calls) == 2
    assert direct.keys() == seen.keys()
    for key, value in direct.items():
        assert torch.equal(value.nan_to_num(), seen[key].nan_to_num()), key
    with torch.autograd.profiler.profile() as profile:
        parity.call(op, sample.kwargs, backward=True)
    names = {event.name for event in profile.function_events}
    assert {f"fastbert::{slug}_fwd", f"fastbert::{slug}_bwd"} <= names


@ALL
def test_explicit_backward_is_autograd_of_the_reference_forward(slug):
    """fp64: the reference's written-out backward against autograd through the reference's own forward."""
    tried = 0
    for sample in small(slug, torch.float64):
        with chooser.use("reference"), _Recorder() as recorder:
            ours = parity.call(getattr(functional, slug), sample.kwargs, backward=True)
        _, args = recorder.calls[0]
        leaves = {}

        def leaf(t, leaves=leaves):
            if not t.is_floating_point():
                return t
            leaves[len(leaves)] = t.detach().clone().requires_grad_()
            return leaves[len(leaves) - 1]

        args = [parity.tree_map(a, leaf) for a in args[:-1]]
        out = chooser.module("reference", slug).forward(*args)
        outs = list(out) if isinstance(out, tuple) else [out]
        # the gradients that the backward op took, dy first, dz before the backend's name
        taken = recorder.calls[1][1]
        pairs = [(outs[0], taken[0])]
        if sample.kwargs.get("return_sum") or sample.kwargs.get("return_cells"):
            pairs.append((outs[1], taken[-2]))
        outs, upstreams = zip(*((t, g.reshape(t.shape)) for t, g in pairs), strict=True)
        grads = torch.autograd.grad(outs, list(leaves.values()), upstreams, allow_unused=True)
        explicit = [v for k, v in ours.items() if k.startswith("d")]
        padding = "padding" in sample.id
        for mine, theirs in zip(explicit, grads, strict=True):
            theirs = torch.zeros_like(mine) if theirs is None else theirs.reshape(mine.shape)
            if not padding:
                torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)
                tried += 1
    assert tried


@ALL
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
def test_autocast(slug, dtype):
    """Outputs have the dtypes of the table in docs/ops.md, and gradients those of the parameters."""
    stays = {"layer_norm", "dropout_add_layer_norm", "rms_norm"}
    fp32 = {"cross_entropy", "mlm_loss", "relation_loss"}
    sample = small(slug)[1]
    with torch.autocast("cpu", dtype=dtype):
        results = parity.call(getattr(functional, slug), sample.kwargs, backward=True)
    expected = torch.float32 if slug in stays | fp32 else dtype
    assert results["output 0"].dtype == expected
    for name, leaf in parity.leaves_of(sample.kwargs):
        assert results[f"d{name}"].dtype == leaf.dtype


@pytest.mark.parametrize("name", ["reference", "torch", "cpu", "triton"])
@pytest.mark.parametrize(
    "slug",
    [
        "embed",
        "linear",
        "linear_int8",
        "layer_norm",
        "dropout_add_layer_norm",
        "feed_forward",
        "gated_feed_forward",
        "mlm_loss",
    ],
)
def test_bias_gradients_are_rounded_to_the_biases_dtype(slug, name):
    """fp32 biases beside bf16 weights: their gradients are the fp32 sums, with bits that bf16 does not have."""
    skip_absent(slug, name)
    if name == "torch" and "norm" in slug:
        pytest.skip("native_layer_norm_backward itself adds in bf16")
    sample = small(slug, torch.bfloat16)[1]
    biases = ("bias", "b1", "b2")
    kwargs = {
        k: parity.tree_map(v, torch.Tensor.float) if k in biases else v
        for k, v in sample.kwargs.items()
    }
    with chooser.use(name):
        found = parity.call(getattr(functional, slug), kwargs, backward=True)
    keys = [key for key in found if key.removeprefix("d").partition("[")[0] in biases]
    assert keys
    for key in keys:
        grad = found[key]
        assert not torch.equal(grad, grad.bfloat16().float()), key


@ALL
def test_compile_on_triton(slug):
    """Each op's own test compiles the torch backend. Triton's outputs differ in layout: rows of logits are aligned."""
    skip_absent(slug, "triton")
    wanted = {"rows"} if slug == "mlm_loss" else {s.id for s in small(slug)[:2]}
    compiled(slug, "triton", wanted.__contains__)


@ALL
def test_no_second_derivative(slug):
    sample = small(slug)[1]
    kwargs = tensors(sample.kwargs)
    out = getattr(functional, slug)(**kwargs)
    leaf = next(t for _, t in parity.leaves_of(kwargs))
    scale = torch.ones(out.shape, dtype=out.dtype, requires_grad=True)
    (grad,) = torch.autograd.grad(out, leaf, scale, create_graph=True)
    if slug in ("layer_norm", "rms_norm", "bias_gelu"):  # through plain torch
        grad.sum().backward()
        assert scale.grad.any()
        return
    with pytest.raises(RuntimeError, match="no second derivatives"):
        grad.sum().backward()


@ALL
def test_retain_graph_and_untouched_inputs(slug):
    """A second backward gives the same gradients. Nothing writes to inputs or to the incoming gradient."""
    sample = small(slug)[1]
    kwargs = tensors(sample.kwargs)
    leaves = dict(parity.leaves_of(kwargs))
    before = [t.detach().clone() for t in leaves.values()]
    out = getattr(functional, slug)(**kwargs)
    dy = torch.randn_like(out)
    kept = dy.clone()
    first = torch.autograd.grad(
        out, list(leaves.values()), dy, retain_graph=True, allow_unused=True
    )
    again = torch.autograd.grad(out, list(leaves.values()), dy, allow_unused=True)
    assert torch.equal(dy, kept)
    for a, b in zip(first, again, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    for t, b in zip(leaves.values(), before, strict=True):
        assert torch.equal(t, b)


@ALL
def test_needs_only_what_is_wanted(slug):
    """With one input that requires a gradient, that gradient is the same as with all."""
    sample = small(slug)[1]
    op = getattr(functional, slug)
    full = parity.call(op, sample.kwargs, backward=True)
    names = [name for name, _ in parity.leaves_of(sample.kwargs)]
    for wanted in names:
        counter = iter(names)
        kwargs = {
            k: parity.tree_map(
                v,
                lambda t, c=counter, w=wanted: (
                    t.clone().requires_grad_(next(c) == w) if t.is_floating_point() else t
                ),
            )
            for k, v in sample.kwargs.items()
        }
        leaf = dict(parity.leaves_of(kwargs))[wanted]
        out = op(**kwargs)
        constant = (slug, wanted) in CONSTANTS
        dy = parity.upstream(out).to(out.dtype)
        (grad,) = torch.autograd.grad(out, leaf, dy, allow_unused=constant)
        assert grad is None if constant else torch.equal(grad, full[f"d{wanted}"])


@ALL
def test_explain(slug, capsys):
    table = fastbert.explain(slug, **small(slug)[1].kwargs)
    assert set(table) == set(chooser.BACKENDS)
    assert table["torch"] is None
    assert table["reference"] is None
    assert all(reason is None or len(reason) > 20 for reason in table.values())
    assert "->" in capsys.readouterr().out


def test_explain_leaves_other_threads_alone(capsys):
    x, weight = torch.randn(2, 4), torch.randn(3, 4)
    found = []

    def op():
        # another thread computes while this one explains a call
        thread = threading.Thread(target=lambda: found.append(functional.linear(x, weight)))
        thread.start()
        thread.join()
        return functional.linear(x, weight)

    assert fastbert.explain(op)["torch"] is None
    assert torch.equal(found[0], functional.linear(x, weight))


def test_use_never_falls_back():
    x = torch.randn(2, 4)
    with fastbert.use("cuda"), pytest.raises(chooser.Unsupported, match="asked for by name"):
        functional.layer_norm(x)
    with pytest.raises(ValueError, match="no backend 'cud'"):
        fastbert.use("cud")
    fastbert.use("torch")
    assert chooser.forced() == "torch"
    fastbert.use(None)
    assert chooser.forced() is None
    with pytest.raises(ValueError, match="no op"):
        fastbert.explain("layernorm", x)


def test_debug_checks_values():
    assert chooser.checks_values(torch.device("cpu"))
    assert not chooser.checks_values(torch.device("cuda"))
    with fastbert.debug():
        assert chooser.checks_values(torch.device("cuda"))
    assert not chooser.checks_values(torch.device("cuda"))


@ALL
def test_torch_func_is_refused(slug):
    """Under a transform of torch.func the ops would give a zero tangent, and raise instead."""
    kwargs = small(slug)[1].kwargs
    name, leaf = next(iter(parity.leaves_of(kwargs)))
    key = name.split("[")[0]

    def call(t):
        value = [t, *kwargs[key][1:]] if isinstance(kwargs[key], list) else t
        return getattr(functional, slug)(**{**kwargs, key: value})

    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.jvp(call, (leaf,), (torch.ones_like(leaf),))


def test_budget_allows_nothing_where_stock_fails():
    ones = torch.ones(4)
    infinite = torch.tensor([1.0, 1.0, 1.0, float("inf")])
    assert excess(ones, ones.double(), infinite) is None
    assert "max error" in excess(torch.tensor([99.0, 1, 1, 1]), ones.double(), infinite)
    assert "NaN" in excess(torch.tensor([float("nan"), 1, 1, 1]), ones.double(), ones)


def test_budget_of_a_number_that_stock_rounds_by_luck():
    """Stock's bf16 loss is exact by chance: an fp32 loss may still be off by a quarter of bf16's spacing."""
    truth = torch.tensor(3.28125, dtype=torch.float64)
    lucky, spacing = truth.bfloat16(), 2.0**-6
    assert excess((truth + 0.24 * spacing).float(), truth, lucky) is None
    assert "max error" in excess((truth + 0.5 * spacing).float(), truth, lucky)
    # the allowance is for two dtypes only
    assert "max error" in excess((truth + 0.24 * spacing).float(), truth, truth.float())


def test_gpu_kernels_start_on_their_tensors_device(monkeypatch):
    """The call makes its tensors' GPU the current device, unless it is, and restores the old one."""
    entered = []

    class Fake(torch.Tensor):
        device = torch.device("cuda", 1)

    class Device:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *exc):
            entered.append("left")

    monkeypatch.setattr(torch.cuda, "device", Device)
    for current, expected in ((1, []), (0, [torch.device("cuda", 1), "left"])):
        monkeypatch.setattr(torch.cuda, "current_device", lambda current=current: current)
        entered.clear()
        assert _register._on_device(lambda x, n: n, Fake(), 7) == 7
        assert entered == expected


@pytest.mark.parametrize("slug", ["linear", "qkv_proj", "feed_forward", "gated_feed_forward"])
def test_a_cast_weight_serves_forward_and_backward(slug, monkeypatch):
    """On a GPU the copy in x's dtype is saved. Gradients still come back in the weight's own dtype."""
    ops = importlib.import_module(f"fastbert.ops.{slug}")
    share = ops.shared

    def on_gpu(x, weights):
        return share(SimpleNamespace(is_cuda=True, dtype=x.dtype, new_empty=x.new_empty), weights)

    op, found = getattr(functional, slug), parity.samples(slug, torch.bfloat16)
    (mixed,) = (sample for sample in found if sample.id == "mixed")
    with chooser.use("torch"):
        expected = parity.call(op, mixed.kwargs, True)
        monkeypatch.setattr(ops, "shared", on_gpu)
        ours = parity.call(op, mixed.kwargs, True)
    for key, value in expected.items():
        assert value.dtype == ours[key].dtype
        assert torch.equal(value, ours[key]), key
