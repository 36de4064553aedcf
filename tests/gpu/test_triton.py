"""The Triton backend beyond single ops: whole models, many shapes, our changes to its interpreter.

Kernels run here under TRITON_INTERPRET=1 only (`make test` starts such a process), or on a GPU.
"""

import pytest
import torch

from fastbert import bert, functional
from fastbert.backend import chooser
from fastbert.models.config import BertConfig

if chooser.device_of("triton") is None:
    reason = chooser.matrix()["attention"]["triton"] or "there is no GPU and no TRITON_INTERPRET=1"
    pytest.skip(f"Triton's kernels cannot run: {reason}", allow_module_level=True)

from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert import kernels
from fastbert.testing import poison
from fastbert.testing.budget import assert_within_budget

DEVICE = kernels.device_type


def tiny(**options):
    config = BertConfig(
        vocab_size=101,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=48,
        **options,
    )
    return bert.BertForPreTraining(config).to(DEVICE)


def batch():
    ids = torch.randint(101, (3, 20), device=DEVICE)
    mask = (torch.arange(20, device=DEVICE) < torch.tensor([[20], [7], [13]], device=DEVICE)).long()
    labels = torch.where((torch.rand(ids.shape, device=DEVICE) < 0.3) & (mask == 1), ids, -100)
    pairs = torch.tensor([0, 1, 0], device=DEVICE)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "next_sentence_label": pairs,
    }


def step(model, inputs, name, dtype=None):
    """The loss and every gradient of one training step on a backend, with the same dropout each time."""
    model.zero_grad()
    torch.manual_seed(3)
    with chooser.use(name), torch.autocast(DEVICE, dtype, enabled=dtype is not None):
        loss = model(**inputs).loss
        loss.backward()
    return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in model.named_parameters()}}


def test_training_step():
    """With dropout, the loss and all gradients are as close to fp64 as stock's are, and the same at every run."""
    model, inputs = tiny(), batch()
    ours = step(model, inputs, "triton")
    # the interpreter runs one program after the other
    again = ours if kernels.INTERPRETED else step(model, inputs, "triton")
    assert all(torch.equal(ours[name], again[name]) for name in ours)
    stock = step(model, inputs, "torch")
    truth = step(model.double(), inputs, "reference")
    for name, value in ours.items():
        assert_within_budget(name, value.float(), truth[name], stock[name].float())


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("length", "causal"),
    [
        (129, True),
        (129, False),
        pytest.param(200, False, marks=slow),
        pytest.param(200, True, marks=slow),
    ],
)
def test_attention_over_several_tiles(length, causal):
    """Sequences too long for the one-kernel backward, with dropout, odd lengths and an empty sequence."""
    lengths = [length, 0, 17, 64]
    T = sum(lengths)
    qkv = torch.randn(T + 5, 3, 2, 24, device=DEVICE)
    qkv[T:] = float("nan")
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, torch.int32)
    seed = torch.tensor([5], device=DEVICE)
    results = {}
    for name, dtype in (
        ("triton", torch.float32),
        ("torch", torch.float32),
        ("reference", torch.float64),
    ):
        leaf = qkv.to(dtype).requires_grad_()
        with chooser.use(name), poison.outputs():
            out = functional.attention(
                leaf, bounds, length, p=0.1, seed=seed, site=2, causal=causal
            )
            (grad,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
        results[name] = (out.detach(), grad)
    for ours, stock, truth in zip(
        *(results[n] for n in ("triton", "torch", "reference")), strict=True
    ):
        assert_within_budget("attention", ours, truth, stock)


@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    heads=st.integers(1, 3),
    size=st.integers(1, 70),
    p=st.sampled_from([0.0, 0.3]),
)
def test_attention_of_any_shape(lengths, heads, size, p):
    qkv = torch.randn(sum(lengths), 3, heads, size, device=DEVICE)
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, torch.int32)
    options = {"p": p, "seed": torch.tensor([9], device=DEVICE)} if p else {}
    with chooser.use("triton"), poison.outputs():
        ours = functional.attention(qkv, bounds, max(lengths), **options)
    with chooser.use("reference"):
        truth = functional.attention(qkv.double(), bounds, max(lengths), **options)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-5)


@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    heads=st.integers(1, 3),
    size=st.integers(1, 40),
    of_teacher=st.integers(1, 40),
)
def test_relations_of_any_shape(lengths, heads, size, of_teacher):
    T = sum(lengths)
    student, teacher = (torch.randn(T, heads * D, device=DEVICE) for D in (size, of_teacher))
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, torch.int32)
    rest = (bounds, max(lengths), heads)
    results = {}
    for name, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaf = student.to(dtype).requires_grad_()
        with chooser.use(name), poison.outputs():
            loss = functional.relation_loss(leaf, teacher.to(dtype), *rest, reduction="sum")
            (grad,) = torch.autograd.grad(loss, leaf)
        results[name] = loss.detach().double(), grad.double()
    for ours, truth in zip(*results.values(), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-5)


@settings(max_examples=12, deadline=None)
@given(
    ids=st.lists(st.integers(0, 4), min_size=1, max_size=150),
    padding=st.sampled_from([None, 0, 3]),
)
def test_scatter_of_any_ids(ids, padding):
    """Runs of equal ids that start in, end in or cover a program's chunk, against index_add."""
    from fastbert.kernels._embed_bwd import scatter

    dz = torch.randn(len(ids), 9, device=DEVICE)
    index, table = torch.tensor(ids, device=DEVICE), torch.zeros(6, 9, device=DEVICE)
    expected = table.index_add(0, index, dz)
    if padding is not None:
        expected[padding] = 0
    torch.testing.assert_close(scatter(dz, index, table, padding), expected)


def test_values_out_of_range_are_memory_safe():
    """Kernels check no values: a bad label gives a NaN loss, a bad id NaN embeddings, and neither a stray access."""
    logits, labels = torch.randn(4, 9, device=DEVICE), torch.tensor([1, 9, -7, -100], device=DEVICE)
    loss, _ = kernels.cross_entropy.forward(logits, labels, -100)
    assert loss.isnan().tolist() == [False, True, True, False]
    ids, zero = (
        torch.tensor([2, 11, -1], device=DEVICE),
        torch.zeros(3, dtype=torch.long, device=DEVICE),
    )
    tables = (torch.randn(11, 8, device=DEVICE), torch.randn(4, 8, device=DEVICE), None)
    ones = torch.ones(8, device=DEVICE)
    y, _, _ = kernels.embed.forward(
        ids, zero, None, *tables, ones, ones, 1e-12, 0.0, None, 0, torch.float32
    )
    assert y.isnan().any(1).tolist() == [False, True, True]


@pytest.mark.skipif(not kernels.INTERPRETED, reason="Triton's interpreter is off")
def test_the_interpreter_rounds_bf16_to_nearest():
    from fastbert.kernels._interpreter import _rounded, _widened

    values = torch.tensor([1.0, 1.00390625, 1.01171875, -3.3e38, 1e-40, float("inf"), float("nan")])
    values = torch.cat([values, torch.randn(1000)])
    ours = torch.from_numpy(_widened(_rounded(values.numpy())))
    assert torch.equal(ours.nan_to_num(), values.bfloat16().float().nan_to_num())
    assert ours[6].isnan()
