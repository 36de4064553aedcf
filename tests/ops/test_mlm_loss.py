import pytest
import torch
from harness import check, compiled, gradcheck, parametrize

from fastbert import functional
from fastbert.backend import chooser

SLUG = "mlm_loss"


@parametrize(SLUG)
def test_forward(name, sample, dtype):
    check(SLUG, name, sample, dtype, backward=False)


@parametrize(SLUG)
def test_backward(name, sample, dtype):
    check(SLUG, name, sample, dtype, backward=True)


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_gradcheck(name):
    gradcheck(SLUG, name)


def test_compile():
    # finding the labelled rows is the one permitted break: a graph without it needs `rows` or `compacted`
    compiled(SLUG, "torch", lambda sample: sample in ("rows", "compacted"))


def _inputs(T=40, C=8, V=50, fill=0.2):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(T, C, generator=generator).requires_grad_()
    weight = torch.randn(V, C, generator=generator).requires_grad_()
    bias = torch.randn(V, generator=generator).requires_grad_()
    labels = torch.randint(V, (T,), generator=generator)
    return hidden, weight, bias, labels.where(torch.rand(T, generator=generator) < fill, -100)


def test_no_labelled_row_gives_a_connected_zero():
    hidden, weight, bias, labels = _inputs(fill=0.0)
    loss = functional.mlm_loss(hidden, weight, bias, labels)
    assert loss.item() == 0.0
    loss.backward()
    for t in (hidden, weight, bias):
        assert torch.equal(t.grad, torch.zeros_like(t))


def test_saves_nothing_of_all_rows_times_vocabulary():
    hidden, weight, bias, labels = _inputs()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.shape) or t, lambda t: t
    ):
        functional.mlm_loss(hidden, weight, bias, labels)
    labelled = int((labels >= 0).sum())
    assert (labelled, weight.shape[0]) in saved
    assert (hidden.shape[0], weight.shape[0]) not in saved


def test_chunked_equals_whole():
    hidden, weight, bias, labels = _inputs(fill=0.9)
    whole = torch.autograd.grad(
        functional.mlm_loss(hidden, weight, bias, labels), (hidden, weight, bias)
    )
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.shape) or t, lambda t: t
    ):
        loss = functional.mlm_loss(hidden, weight, bias, labels, max_rows=7)
    assert max(s.numel() for s in saved) == weight.numel()
    for a, b in zip(torch.autograd.grad(loss, (hidden, weight, bias)), whole, strict=True):
        torch.testing.assert_close(a, b)


def test_chunks_are_summed_in_fp32():
    """Also for bf16 tensors: the sum over chunks is rounded to bf16 once."""
    if reason := chooser.matrix()[SLUG]["cpu"]:
        pytest.skip(reason)
    hidden, weight, bias, labels = _inputs(T=200, fill=0.9)
    leaves = [t.detach().bfloat16().requires_grad_() for t in (hidden, weight, bias)]
    with chooser.use("cpu"):
        whole, chunked = (
            torch.autograd.grad(functional.mlm_loss(*leaves, labels, max_rows=n), leaves)
            for n in (200, 7)
        )
    for a, b in zip(whole, chunked, strict=True):
        # the order of an fp32 sum rarely changes its bf16 rounding
        assert (a != b).float().mean() < 0.02


def test_gradscaler_fp16():
    """fp16 with a loss scale of 2**16: the saved p - onehot is unscaled, so nothing overflows on the way."""
    hidden, weight, bias, labels = _inputs()
    with torch.autocast("cpu", dtype=torch.float16):
        plain = functional.mlm_loss(hidden, weight, bias, labels)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    optimizer = torch.optim.SGD([hidden, weight, bias], lr=0.0)
    scaler.scale(plain).backward()
    scaler.unscale_(optimizer)
    with torch.autocast("cpu", enabled=False):
        exact = torch.autograd.grad(
            functional.mlm_loss(hidden, weight, bias, labels), (hidden, weight, bias)
        )
    for t, expected in zip((hidden, weight, bias), exact, strict=True):
        torch.testing.assert_close(t.grad, expected, rtol=2e-2, atol=2e-3)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**16


def test_sum_over_two_micro_batches_is_one_loss():
    """The loss of a step is one sum over one count, however its rows are divided into micro-batches."""
    hidden, weight, bias, labels = _inputs()
    whole = functional.mlm_loss(hidden, weight, bias, labels)
    count = (labels >= 0).sum()
    parts = [
        functional.mlm_loss(hidden[s], weight, bias, labels[s], reduction="sum") / count
        for s in (slice(0, 11), slice(11, None))
    ]
    torch.testing.assert_close(sum(parts), whole)
