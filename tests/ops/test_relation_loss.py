import subprocess
import sys

import pytest
import torch
from harness import backends, check, compiled, instruction_set, parametrize

from fastbert import functional
from fastbert.backend import chooser, cpu
from fastbert.testing import parity
from fastbert.testing.budget import assert_within_budget

SLUG = "relation_loss"
NATIVE = pytest.mark.skipif(cpu.native is None, reason=f"no native module: {cpu.unavailable}")


@parametrize(SLUG)
def test_forward(name, sample, dtype):
    check(SLUG, name, sample, dtype, backward=False)


@parametrize(SLUG)
def test_backward(name, sample, dtype):
    check(SLUG, name, sample, dtype, backward=True)


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_gradcheck(name):
    """Z is on both sides of the product: a gradient that lacks one of the two terms is wrong by as much as itself."""
    ran = 0
    for sample in parity.samples(SLUG, torch.float64):
        student = sample.kwargs["student"]
        if student.numel() > 200:
            continue
        rest = {k: v for k, v in sample.kwargs.items() if k != "student"}
        with chooser.use(name):
            assert torch.autograd.gradcheck(
                lambda z, rest=rest: functional.relation_loss(z, **rest),
                student.clone().requires_grad_(),
                fast_mode=True,
            )
        ran += 1
    assert ran > 5


def test_compile():
    compiled(SLUG, "torch")


def drawn(lengths, heads=2, D=6, of_teacher=9, seed=0):
    """The arguments of a call on random tensors."""
    generator = torch.Generator().manual_seed(seed)
    T = sum(lengths)
    return {
        "student": torch.randn(T, heads * D, generator=generator),
        "teacher": torch.randn(T, heads * of_teacher, generator=generator),
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        "max_seqlen": max(lengths),
        "num_heads": heads,
    }


def test_it_is_the_loss_of_the_paper():
    """The mean over heads and rows of KL(teacher || student), from probabilities and in fp64."""
    lengths, heads = (7, 4), 2
    call = drawn(lengths, heads)
    total = 0.0
    for z, target in zip(
        call["student"].double().split(lengths),
        call["teacher"].double().split(lengths),
        strict=True,
    ):
        for s, t in zip(z.chunk(heads, 1), target.chunk(heads, 1), strict=True):
            p, q = ((x @ x.t() / x.shape[1] ** 0.5).softmax(1) for x in (s, t))
            total += float((q * (q / p).log()).sum())
    expected = total / (heads * sum(lengths))
    assert float(functional.relation_loss(**call)) == pytest.approx(expected, rel=1e-5)
    summed = functional.relation_loss(**call, reduction="sum")
    assert float(summed) == pytest.approx(total, rel=1e-5)


def test_the_teacher_is_a_constant():
    call = drawn((5, 3))
    student, teacher = (call[name].requires_grad_() for name in ("student", "teacher"))
    functional.relation_loss(**call).backward()
    assert teacher.grad is None
    assert bool(student.grad.any())
    student.requires_grad_(False)
    functional.relation_loss(**call).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("name", backends(SLUG))
def test_a_student_that_agrees_has_no_loss_and_no_gradient(name):
    """Head sizes whose root is exact; another layer's weights would do the same through a rotation of Z."""
    name, _, isa = name.partition("/")
    call = drawn((40, 7, 1), heads=3, D=16, of_teacher=16)
    call["student"] = call["teacher"].clone().requires_grad_()
    with chooser.use(name), instruction_set(isa):
        loss = functional.relation_loss(**call)
        loss.backward()
    assert float(loss.detach()) == 0.0
    assert not bool(call["student"].grad.any())


@NATIVE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_sequence_has_the_same_bits_alone_and_in_any_batch(dtype):
    lengths = (70, 1, 0, 33, 129)
    call = drawn(lengths, heads=3, D=20, of_teacher=33)
    call = {k: v.to(dtype) if k in ("student", "teacher") else v for k, v in call.items()}
    rest = {"num_heads": 3, "reduction": "sum"}
    for isa in cpu.native.isas():
        with chooser.use("cpu"), instruction_set(isa):
            whole = parity.call(functional.relation_loss, call | rest, True)
            losses, starts = 0.0, call["cu_seqlens"].tolist()
            for length, start in zip(lengths, starts[:-1], strict=True):
                rows = slice(start, start + length)
                alone = {
                    "student": call["student"][rows],
                    "teacher": call["teacher"][rows],
                    "cu_seqlens": torch.tensor([0, length], dtype=torch.int32),
                    "max_seqlen": length,
                }
                found = parity.call(functional.relation_loss, alone | rest, True)
                assert torch.equal(found["dstudent"], whole["dstudent"][rows]), (isa, length)
                losses += float(found["output 0"])
        assert losses == pytest.approx(float(whole["output 0"]), rel=1e-6)


@pytest.mark.parametrize("name", ["cpu", "torch"])
def test_confident_rows(name):
    """Products of up to 3000: probabilities from a log-sum-exp in fp32 would be off by a ten-thousandth."""
    if name == "cpu" and cpu.unavailable:
        pytest.skip(cpu.unavailable)
    call = drawn((50,), heads=1, D=16, of_teacher=16)
    # the student's rows are near the teacher's: the loss is a small difference of large scores
    call["teacher"] = call["teacher"] * 12
    call["student"] = call["teacher"] + 0.01 * call["student"]
    wide = {k: v.double() if k in ("student", "teacher") else v for k, v in call.items()}
    with chooser.use("reference"):
        truth = parity.call(functional.relation_loss, wide, True)
        stock = parity.call(functional.relation_loss, call, True)
    with chooser.use(name):
        ours = parity.call(functional.relation_loss, call, True)
    assert_within_budget("dstudent", ours["dstudent"], truth["dstudent"], stock["dstudent"])


@pytest.mark.parametrize("name", ["reference", "torch", "cpu"])
def test_sequences_without_a_token(name):
    if name == "cpu" and cpu.unavailable:
        pytest.skip(cpu.unavailable)
    call = drawn((4, 2))
    for bounds in ([0], [0, 0], [0, 0, 0]):
        student = call["student"].clone().requires_grad_()
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        with chooser.use(name):
            loss = functional.relation_loss(student, call["teacher"], cu_seqlens, 4, 2)
            loss.backward()
        assert float(loss.detach()) == 0.0
        assert torch.equal(student.grad, torch.zeros(6, 12))


# one S x S tensor of all heads has 256 MB; a stock loss keeps six or more
MEMORY = """
import resource
import torch
from fastbert import functional
from fastbert.backend import chooser

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

def run(S):
    student = torch.randn(S, 32, requires_grad=True)
    bounds = torch.tensor([0, S], dtype=torch.int32)
    functional.relation_loss(student, torch.randn(S, 32), bounds, S, 4).backward()

with chooser.use(NAME):
    run(64)
    before = peak()
    run(4096)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units")
@pytest.mark.parametrize(("name", "most"), [("cpu", 40), ("torch", 250)])
def test_memory_does_not_grow_with_the_square_of_the_length(name, most):
    """In MB, forward and backward of 4,096 tokens."""
    if name == "cpu" and cpu.unavailable:
        pytest.skip(cpu.unavailable)
    code = MEMORY.replace("NAME", repr(name))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < most
