"""Muon against its formulas in fp64: native on every instruction set, and in torch's operations."""

import copy
import io

import pytest
import torch
from random_feed import RandomFeed, small_config, small_model
from torch import nn

import fastbert
from fastbert.backend import cpu
from fastbert.nn import GatedFeedForward
from fastbert.pretrain.trainer import PretrainTrainer
from fastbert.testing.budget import assert_within_budget
from fastbert.train import Muon
from fastbert.train.muon import COEFFICIENTS, STEPS, orthogonalise
from fastbert.train.optim import make_optimiser, muon_groups

NATIVE = [] if cpu.native is None else cpu.native.isas()
# wide, tall and square; sides of 1, primes, below and above a vector and a block of rows
SHAPES = [(1, 5), (5, 1), (7, 13), (64, 24), (33, 33), (100, 211), (331, 151)]


@pytest.fixture(params=["torch", *NATIVE])
def _way(request):
    """Every way to compute a step on a CPU."""
    if request.param == "torch":
        with fastbert.use("torch"):
            yield
        return
    before = cpu.native.isa()
    cpu.native.use_isa(request.param)
    yield
    cpu.native.use_isa(before)


def drawn(*shapes, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g) for shape in shapes]


def by_singular_values(x):
    """U p(p(.. p(s))) V^T in fp64 for x / |x| = U s V^T, with the polynomial p of the iteration."""
    if not x.numel() or not x.any():
        return x.double()
    u, s, v = torch.linalg.svd(x.double() / x.double().norm(), full_matrices=False)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        s = a * s + b * s**3 + c * s**5
    return (u * s) @ v


def by_the_papers(weights, gradients, rates, momentum=0.95, decay=0.01, rms=0.2, matrices=1):
    """Muon's steps in fp64."""
    found = [w.double() for w in weights]
    buffers = [torch.zeros_like(w) for w in found]
    for step, rate in zip(gradients, rates, strict=True):
        for i, g in enumerate(step):
            buffers[i] = momentum * buffers[i] + g.double()
            parts = (g.double() + momentum * buffers[i]).chunk(matrices)
            update = torch.cat([max(p.shape) ** 0.5 * by_singular_values(p) for p in parts])
            found[i] = (1 - rate * decay) * found[i] - rate * rms * update
    return found


def stepped(weights, gradients, rates, **options):
    """The parameters after a step with each row of gradients, and the optimiser."""
    made = [nn.Parameter(w.clone()) for w in weights]
    optimiser = Muon(made, **options)
    for step, rate in zip(gradients, rates, strict=True):
        for p, g in zip(made, step, strict=True):
            p.grad = g.clone()
        optimiser.param_groups[0]["lr"] = rate
        optimiser.step()
    return [p.detach() for p in made], optimiser


RATES = [0.01, 0.05, 0.02]


def case(shapes=SHAPES, steps=3):
    """Weights, and their gradients of some steps."""
    weights = [0.05 * w for w in drawn(*shapes)]
    scales = [10.0 ** -(1 + step % 3) for step in range(steps)]
    return weights, [[s * g for g in drawn(*shapes, seed=9 + i)] for i, s in enumerate(scales)]


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matrices_are_orthogonalised(shape):
    """Of any scale. Singular values that differ by a factor of 100 come to 0.68 to 1.21; singular vectors stay."""
    (x,) = drawn(shape)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    spread = (u * torch.logspace(-2, 0, len(s))) @ v
    for matrix in (x, 1e-5 * x, 1e15 * x, spread):
        (found,) = orthogonalise([matrix])
        with fastbert.use("torch"):
            (eager,) = orthogonalise([matrix])
        truth = by_singular_values(matrix)
        # the rounding errors of a row's norm say nothing about each other
        if min(shape) > 1:
            assert_within_budget(str(shape), found, truth, eager)
        for ours in (found, eager):
            torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=2e-5)
    values = torch.linalg.svdvals(found)
    assert float(values.min()) > 0.68
    assert float(values.max()) < 1.21


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (9, 4)], ids=str)
def test_without_numbers_and_of_zeros(shape):
    (found,) = orthogonalise([torch.zeros(shape)], 1)
    assert torch.equal(found, torch.zeros(shape))


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_makes_its_matrix_nan(value):
    (x,) = drawn((3 * 40, 90))
    x[50, 3] = value
    (found,) = orthogonalise([x], 3)
    first, second, third = found.chunk(3)
    assert bool(second.isnan().all())
    assert bool(first.isfinite().all())
    assert bool(third.isfinite().all())


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize(("decay", "momentum", "rms"), [(0.01, 0.95, 0.2), (0.0, 0.0, 1.0)])
def test_steps_are_the_papers(decay, momentum, rms):
    weights, gradients = case()
    settings = {"momentum": momentum, "rms": rms}
    truth = by_the_papers(weights, gradients, RATES, decay=decay, **settings)
    found, _ = stepped(weights, gradients, RATES, weight_decay=decay, **settings)
    for p, expected in zip(found, truth, strict=True):
        torch.testing.assert_close(p.double(), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("rows", [40, 0])
def test_a_stack_is_several_matrices(rows):
    """Queries, keys and values: each has a norm, singular values and a rate of its own."""
    weights, gradients = case([(3 * rows, 24), (3 * rows, 90)])
    truth = by_the_papers(weights, gradients, RATES, matrices=3)
    found, _ = stepped(weights, gradients, RATES, matrices=3)
    for p, expected in zip(found, truth, strict=True):
        torch.testing.assert_close(p.double(), expected, rtol=1e-5, atol=2e-6)
    if rows:
        whole, _ = stepped(weights, gradients, RATES)
        assert not torch.allclose(whole[0], found[0])


def test_a_group_without_matrices_has_the_bits_of_adamw():
    weights, gradients = case([(7, 13), (5,), (), (2, 3, 4)])
    settings = {"betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.1}
    found, _ = stepped(weights, gradients, RATES, matrices=0, **settings)
    peers = [nn.Parameter(w.clone()) for w in weights]
    adam = torch.optim.AdamW(peers, fused=True, **settings)
    for step, rate in zip(gradients, RATES, strict=True):
        for p, g in zip(peers, step, strict=True):
            p.grad = g.clone()
        adam.param_groups[0]["lr"] = rate
        adam.step()
    assert all(map(torch.equal, found, peers))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch 2.9 or later has Muon")
def test_it_moves_as_torchs():
    """torch.optim.Muon's products are in bf16."""
    weights, gradients = case([(48, 96), (96, 48)])
    found, _ = stepped(weights, gradients, RATES, weight_decay=0.1)
    peers = [nn.Parameter(w.clone()) for w in weights]
    settings = {"weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    peer = torch.optim.Muon(peers, **settings)
    for step, rate in zip(gradients, RATES, strict=True):
        for p, g in zip(peers, step, strict=True):
            p.grad = g.clone()
        peer.param_groups[0]["lr"] = rate
        peer.step()
    for w, p, expected in zip(weights, found, peers, strict=True):
        moved, theirs = p - w, expected.detach() - w
        assert float((moved - theirs).norm() / theirs.norm()) < 0.02


@pytest.mark.parametrize("isa", NATIVE)
def test_bits_are_the_same_again_and_with_other_numbers_of_threads(isa):
    """Symmetric products too, whose triangle is shared out otherwise; the last is deeper than a pass over K."""
    weights, gradients = case([(331, 211), (3 * 130, 130), (23, 3301)], 1)
    before, found = (cpu.native.isa(), torch.get_num_threads()), []
    cpu.native.use_isa(isa)
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        stepped_once, optimiser = stepped(weights, gradients, [0.01])
        buffers = [state["momentum_buffer"] for state in optimiser.state.values()]
        found.append([*stepped_once, *buffers])
    cpu.native.use_isa(before[0])
    torch.set_num_threads(before[1])
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))


@pytest.mark.usefixtures("_way")
def test_layouts_that_are_not_contiguous():
    """A transposed parameter and an expanded gradient."""
    (weight,), ((gradient,),) = case([(19, 23)], 1)
    for g in (gradient, gradient[:1].expand(19, 23)):
        truth = by_the_papers([weight], [[g]], [0.01])[0]
        p = nn.Parameter(weight.t().contiguous().t())
        p.grad = g
        Muon([p], lr=0.01).step()
        assert not p.is_contiguous()
        torch.testing.assert_close(p.detach().double(), truth, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    """fp64 has the truth; bf16 weights and momenta are rounded once a step."""
    weights, gradients = case([(64, 33), (5, 7)], 2)
    weights = [w.to(dtype) for w in weights]
    gradients = [[g.to(dtype) for g in step] for step in gradients]
    truth = by_the_papers(weights, gradients, RATES[:2])
    found, optimiser = stepped(weights, gradients, RATES[:2])
    bound = 1e-12 if dtype == torch.float64 else 2 * torch.finfo(dtype).eps
    for p, expected in zip(found, truth, strict=True):
        assert p.dtype == dtype
        assert float((p.double() - expected).norm() / expected.norm()) < bound
    assert all(s["momentum_buffer"].dtype == dtype for s in optimiser.state.values())


def test_state_goes_through_a_file():
    """Bitwise the same steps after state_dict, of both kinds of groups."""

    def groups(tensors):
        first, second = (nn.Parameter(t.clone()) for t in tensors)
        return [{"params": [first], "matrices": 3}, {"params": [second], "matrices": 0}]

    def steps(optimiser, gradients):
        for step in gradients:
            for group, g in zip(optimiser.param_groups, step, strict=True):
                group["params"][0].grad = g.clone()
            optimiser.step()
        return [group["params"][0].detach() for group in optimiser.param_groups]

    weights, gradients = case([(3 * 8, 11), (5,)], 6)
    whole = steps(Muon(groups(weights), lr=0.01), gradients)
    optimiser = Muon(groups(weights), lr=0.01)
    half = steps(optimiser, gradients[:3])
    kept = [set(state) for state in optimiser.state.values()]
    assert kept == [{"momentum_buffer"}, {"step", "exp_avg", "exp_avg_sq"}]
    file = io.BytesIO()
    torch.save(optimiser.state_dict(), file)
    file.seek(0)
    restored = Muon(groups(half), lr=9.0)
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert copy.deepcopy(restored).param_groups[0]["lr"] == 0.01
    assert all(map(torch.equal, steps(restored, gradients[3:]), whole))


@pytest.mark.parametrize("matrices", [0, 1])
def test_closure_and_parameters_without_a_gradient(matrices):
    used, unused = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))
    optimiser = Muon([used, unused], lr=0.1, matrices=matrices)

    def closure():
        optimiser.zero_grad()
        loss = used.square().sum()
        loss.backward()
        return float(loss.detach())

    assert optimiser.step(closure) == 9.0
    assert torch.equal(unused.detach(), torch.ones(3, 3))
    assert bool((used < 1).all())
    assert unused not in optimiser.state


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"lr": -1.0}, "lr is -1.0: it must be at least 0"),
        ({"eps": float("nan")}, "eps is nan: it must be at least 0"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"rms": -0.2}, "rms is -0.2: it must be at least 0"),
        ({"momentum": 1.0}, r"momentum is 1.0: it must be in \[0, 1\)"),
        ({"betas": (0.9, 1.0)}, r"betas is \(0.9, 1.0\): pass two numbers in \[0, 1\)"),
        ({"matrices": -1}, "matrices is -1: pass the number that a parameter stacks, 0 for AdamW"),
        ({"matrices": True}, "matrices is True: pass the number that a parameter stacks"),
        ({"matrices": 2}, r"shape \(3, 4\) is not 2 matrices one above the other.*matrices=0"),
    ],
)
def test_bad_settings(options, sentence):
    """At construction, and for a group that is added, which is then left out."""
    with pytest.raises(ValueError, match=sentence):
        Muon([nn.Parameter(torch.ones(3, 4))], **options)
    optimiser = Muon([nn.Parameter(torch.ones(2, 2))])
    with pytest.raises(ValueError, match=sentence):
        optimiser.add_param_group({"params": nn.Parameter(torch.ones(3, 4)), **options})
    assert len(optimiser.param_groups) == 1


@pytest.mark.parametrize("shape", [(), (4,), (2, 3, 4)], ids=str)
def test_what_is_no_matrix_is_refused(shape):
    with pytest.raises(ValueError, match="is not a matrix, which its group has: put it into"):
        Muon([nn.Parameter(torch.ones(shape))])


def test_states_of_other_optimisers_are_refused():
    params = [torch.ones(3, 2, requires_grad=True)]
    ours = Muon(params, lr=0.125)
    with pytest.raises(ValueError, match="has no momentum, rms, matrices: load a state of fastb"):
        ours.load_state_dict(torch.optim.AdamW(params).state_dict())
    assert ours.param_groups[0]["lr"] == 0.125


@pytest.mark.parametrize("matrices", [0, 1])
def test_sparse_gradients_are_refused(matrices):
    p = nn.Parameter(torch.ones(3, 2))
    p.grad = torch.ones(3, 2).to_sparse()
    with pytest.raises(RuntimeError, match="Muon takes no sparse gradients: "):
        Muon([p], matrices=matrices).step()
    assert torch.equal(p.detach(), torch.ones(3, 2))


def test_a_models_groups():
    """Matrices of the layers are orthogonalised; embeddings, pooler, heads, norms and biases are AdamW's."""
    model = small_model(num_hidden_layers=1)
    three, one, rest, kept = muon_groups(model, 0.1)
    assert [g["matrices"] for g in (three, one, rest, kept)] == [3, 1, 0, 0]
    assert [g["weight_decay"] for g in (three, one, rest, kept)] == [0.1, 0.1, 0.1, 0.0]
    layer = "bert.layers.0."
    assert three["names"] == [f"{layer}attention.qkv.weight"]
    others = ["attention.out", "feed_forward.up", "feed_forward.down"]
    assert one["names"] == [f"{layer}{name}.weight" for name in others]
    assert {"bert.pooler.weight", "bert.embeddings.word.weight"} <= set(rest["names"])
    names = [name for g in (three, one, rest, kept) for name in g["names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    two, one, kept = muon_groups(GatedFeedForward(8, 16), 0.1)
    assert (two["names"], two["matrices"]) == (["up.weight"], 2)
    assert (one["names"], one["matrices"]) == (["down.weight"], 1)


def test_the_setting_chooses_it():
    optimiser = make_optimiser(small_model(), small_config(optimiser="muon", weight_decay=0.1))
    assert isinstance(optimiser, Muon)
    assert [g["weight_decay"] for g in optimiser.param_groups] == [0.1, 0.1, 0.1, 0.0]
    assert optimiser.param_groups[0]["eps"] == 1e-6


class OneBatch(RandomFeed):
    """The same batch again and again."""

    def stream(self, epoch=0, start=0):
        while True:
            yield self.batch(0, 0)


@pytest.mark.parametrize(
    "sizes", [{}, {"layer_heads": (0, 1), "layer_widths": (33, 0)}], ids=["dense", "pruned"]
)
def test_training_lowers_the_loss_and_resumes_bitwise(sizes):
    config = small_config(optimiser="muon", lr=5e-3, steps=30)

    def trainer(seed):
        model = small_model(dropout=0.0, seed=seed, **sizes)
        return PretrainTrainer(model, OneBatch(), config)

    first, second = trainer(0), trainer(5)
    losses = [first.train_step().loss for _ in range(6)]
    second.restore(copy.deepcopy(first.state()))
    losses += [first.train_step().loss for _ in range(6)]
    assert [second.train_step().loss for _ in range(6)] == losses[6:]
    assert losses[-1] < losses[0] - 0.5
