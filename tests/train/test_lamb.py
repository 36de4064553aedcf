"""LAMB against the paper's formula in fp64: native on every instruction set, and in torch's operations."""

import copy
import io

import pytest
import torch
from random_feed import RandomFeed, small_config, small_model
from torch import nn

import fastbert
from fastbert.backend import cpu
from fastbert.pretrain.trainer import PretrainTrainer
from fastbert.testing.budget import assert_within_budget
from fastbert.train import LAMB
from fastbert.train.optim import make_optimiser

NATIVE = [] if cpu.native is None else cpu.native.isas()
# sizes of 1, primes, below and above a vector, a partition of the sums and its remainder, nothing
SHAPES = [(1,), (7, 13), (64,), (2, 31), (331, 211), (0, 4), ()]
needs_native = pytest.mark.skipif(cpu.native is None, reason=str(cpu.unavailable))


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


def drawn(seed=0, steps=5, shapes=SHAPES):
    """Parameters, and their gradients of some steps."""
    g = torch.Generator().manual_seed(seed)
    made = [0.05 * torch.randn(shape, generator=g) for shape in shapes]
    scales = [10.0 ** -(1 + step % 4) for step in range(steps)]
    return made, [[s * torch.randn(p.shape, generator=g) for p in made] for s in scales]


def by_the_paper(parameters, gradients, rates, adapt, betas=(0.9, 0.999), eps=1e-6, decay=0.01):
    """Algorithm 2 in fp64."""
    found = [p.double() for p in parameters]
    m, v = ([torch.zeros_like(p) for p in found] for _ in range(2))
    for t, (step, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        for i, g in enumerate(step):
            g = g.double()
            m[i] = betas[0] * m[i] + (1 - betas[0]) * g
            v[i] = betas[1] * v[i] + (1 - betas[1]) * g * g
            r = m[i] / (1 - betas[0] ** t) / ((v[i] / (1 - betas[1] ** t)).sqrt() + eps)
            update = r + decay * found[i]
            x, norm = found[i].norm(), update.norm()
            ratio = x / norm if adapt and x != 0 and norm != 0 else 1.0
            found[i] = found[i] - rate * ratio * update
    return found


def stepped(parameters, gradients, rates, **options):
    """The parameters after a step with each row of gradients, and the optimiser."""
    made = [nn.Parameter(p.clone()) for p in parameters]
    optimiser = LAMB(made, **options)
    for step, rate in zip(gradients, rates, strict=True):
        for p, g in zip(made, step, strict=True):
            p.grad = g.clone()
        optimiser.param_groups[0]["lr"] = rate
        optimiser.step()
    return [p.detach() for p in made], optimiser


RATES = [0.01, 0.05, 0.002, 0.03, 0.01]


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize(
    ("decay", "always", "adapt"), [(0.01, False, True), (0.0, False, False), (0.0, True, True)]
)
def test_steps_are_the_papers(decay, always, adapt):
    """With rates that change between steps; without decay there is a trust ratio if `always_adapt` says so."""
    made, gradients = drawn()
    truth = by_the_paper(made, gradients, RATES, adapt, decay=decay)
    options = {"weight_decay": decay, "always_adapt": always}
    found, _ = stepped(made, gradients, RATES, **options)
    with fastbert.use("torch"):
        eager, _ = stepped(made, gradients, RATES, **options)
    for shape, *tensors in zip(SHAPES, found, truth, eager, strict=True):
        assert_within_budget(str(shape), *tensors)
    # the torch way itself: a few ulps of the largest weight
    for ours, expected in zip(eager, truth, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("_way")
def test_groups_have_their_own_settings():
    made, gradients = drawn()
    parameters = [nn.Parameter(p.clone()) for p in made]
    settings = [
        {"lr": 0.02, "weight_decay": 0.1, "betas": (0.8, 0.95)},
        {"lr": 0.01, "weight_decay": 0.0, "eps": 1e-3},
    ]
    halves = [slice(0, 3), slice(3, None)]
    groups = [{"params": parameters[half], **s} for half, s in zip(halves, settings, strict=True)]
    optimiser = LAMB(groups)
    for step in gradients:
        for p, g in zip(parameters, step, strict=True):
            p.grad = g
        optimiser.step()
    first = by_the_paper(
        *(made[:3], [g[:3] for g in gradients], [0.02] * 5, True), betas=(0.8, 0.95), decay=0.1
    )
    second = by_the_paper(
        *(made[3:], [g[3:] for g in gradients], [0.01] * 5, False), eps=1e-3, decay=0.0
    )
    for p, expected in zip(parameters, first + second, strict=True):
        torch.testing.assert_close(p.detach().double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("_way")
def test_a_norm_of_zero_means_a_ratio_of_one():
    """Weights of zero move by Adam's update; gradients of zero without decay move nothing."""
    zeros, gradients = [torch.zeros(37)], drawn(shapes=[(37,)])[1]
    truth = by_the_paper(zeros, gradients, RATES, True)
    found, _ = stepped(zeros, gradients, RATES)
    torch.testing.assert_close(found[0].double(), truth[0], rtol=1e-6, atol=1e-8)
    made = [torch.randn(37)]
    nothing = [[torch.zeros(37)]] * 5
    options = {"weight_decay": 0.0, "always_adapt": True}
    assert torch.equal(stepped(made, nothing, RATES, **options)[0][0], made[0])


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_makes_its_tensor_nan(value):
    made, gradients = drawn(steps=1)
    gradients[0][1][3, 4] = value
    found, _ = stepped(made, gradients, [0.01])
    for i, p in enumerate(found):
        assert bool(p.isnan().all()) if i == 1 else bool(p.isfinite().all())


@pytest.mark.usefixtures("_way")
def test_an_epsilon_of_zero_reads_nothing_behind_the_end():
    """0 / 0 in the rest of a vector must not get into the norm."""
    made, gradients = drawn(steps=1, shapes=[(13,)])
    found, _ = stepped(made, gradients, [0.01], eps=0.0)
    truth = by_the_paper(made, gradients, [0.01], True, eps=0.0)
    torch.testing.assert_close(found[0].double(), truth[0], rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("_way")
def test_bits_are_the_same_again_and_with_two_threads():
    made, gradients = drawn(shapes=[(331, 211), (1013,), (5,)])
    found, optimiser = stepped(made, gradients, RATES)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            again, other = stepped(made, gradients, RATES)
        finally:
            torch.set_num_threads(1)
        assert all(map(torch.equal, again, found))
        for mine, theirs in zip(other.state.values(), optimiser.state.values(), strict=True):
            assert torch.equal(mine["exp_avg_sq"], theirs["exp_avg_sq"])


@needs_native
def test_instruction_sets_with_multiply_adds_have_the_same_bits():
    made, gradients = drawn()
    before, found = cpu.native.isa(), {}
    for isa in NATIVE:
        cpu.native.use_isa(isa)
        found[isa], _ = stepped(made, gradients, RATES)
    cpu.native.use_isa(before)
    # as an epsilon of a sum of values up to 1
    for other in found.values():
        for mine, theirs in zip(found["baseline"], other, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-8)
    fused = [found[isa] for isa in NATIVE if isa not in ("baseline", "emulated")]
    if "avx2" in found and "emulated" in found:
        fused.append(found["emulated"])
    for other in fused[1:]:
        assert all(map(torch.equal, other, fused[0]))


@pytest.mark.usefixtures("_way")
def test_layouts_that_are_not_contiguous():
    """A transposed parameter and an expanded gradient: torch's operations take them, with the same numbers."""
    (made,), ((gradient,),) = drawn(steps=1, shapes=[(19, 23)])
    truth = by_the_paper([made], [[gradient]], [0.01], True)[0]
    p = nn.Parameter(made.t().contiguous().t())
    p.grad = gradient
    LAMB([p], lr=0.01).step()
    assert not p.is_contiguous()
    torch.testing.assert_close(p.detach().double(), truth, rtol=1e-6, atol=1e-7)
    row = gradient[:1].expand(19, 23)
    truth = by_the_paper([made], [[row]], [0.01], True)[0]
    p = nn.Parameter(made.clone())
    p.grad = row
    LAMB([p], lr=0.01).step()
    torch.testing.assert_close(p.detach().double(), truth, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    """fp64 has the truth; bf16 weights and moments are rounded once a step."""
    made, *gradients = (
        [t.to(dtype) for t in tensors]
        for part in drawn(steps=2, shapes=[(64, 33), (5,)])
        for tensors in (part if isinstance(part[0], list) else [part])
    )
    truth = by_the_paper(made, gradients, RATES[:2], True)
    found, optimiser = stepped(made, gradients, RATES[:2])
    bound = 1e-12 if dtype == torch.float64 else 2 * torch.finfo(dtype).eps
    for p, expected in zip(found, truth, strict=True):
        assert p.dtype == dtype
        assert float((p.double() - expected).norm() / expected.norm()) < bound
    assert all(s["exp_avg"].dtype == dtype for s in optimiser.state.values())


def test_state_goes_through_a_file_and_comes_from_adamw():
    """Bitwise the same steps after state_dict; AdamW's state is taken too, and without decay on it nothing adapts."""
    made, gradients = drawn(steps=6)
    rates = [0.01] * 6
    whole, _ = stepped(made, gradients, rates)
    half, optimiser = stepped(made, gradients[:3], rates[:3])
    assert set(optimiser.state[optimiser.param_groups[0]["params"][0]]) == {
        *("step", "exp_avg", "exp_avg_sq")
    }
    file = io.BytesIO()
    torch.save(optimiser.state_dict(), file)
    file.seek(0)
    parameters = [nn.Parameter(p) for p in half]
    restored = LAMB(parameters, lr=9.0)
    restored.load_state_dict(torch.load(file, weights_only=True))
    copies = copy.deepcopy(restored)
    for step in gradients[3:]:
        for p, g in zip(parameters, step, strict=True):
            p.grad = g
        restored.step()
    assert all(map(torch.equal, [p.detach() for p in parameters], whole))
    assert copies.param_groups[0]["lr"] == 0.01
    adam = torch.optim.AdamW(parameters, lr=0.5)
    adam.step()
    restored.load_state_dict(adam.state_dict())
    restored.step()
    assert restored.param_groups[0]["lr"] == 0.5
    assert all(float(s["step"]) == 2 for s in restored.state.values())


def test_closure_and_parameters_without_a_gradient():
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimiser = LAMB([used, unused], lr=0.1)

    def closure():
        optimiser.zero_grad()
        loss = used.square().sum()
        loss.backward()
        return float(loss.detach())

    assert optimiser.step(closure) == 3.0
    assert torch.equal(unused.detach(), torch.ones(3))
    assert bool((used < 1).all())
    assert unused not in optimiser.state


@needs_native
def test_a_step_counts_as_a_write():
    """autograd refuses to go back through weights that a step has changed."""
    p = nn.Parameter(torch.ones(3))
    loss = p.square().sum()
    p.grad = torch.ones(3)
    LAMB([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"lr": -1.0}, "lr is -1.0: it must be at least 0"),
        ({"eps": float("nan")}, "eps is nan: it must be at least 0"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"betas": (0.9, 1.0)}, r"betas is \(0.9, 1.0\): pass two numbers in \[0, 1\)"),
    ],
)
def test_bad_settings(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        LAMB([nn.Parameter(torch.ones(1))], **options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"lr": -1.0}, "lr is -1.0: it must be at least 0"),
        ({"betas": (0.9, 0.99, 0.999)}, r"betas is \(0.9, 0.99, 0.999\): pass two numbers in"),
    ],
)
def test_bad_settings_of_a_group(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        LAMB([{"params": [torch.zeros(2, requires_grad=True)], **options}])


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (lambda p: torch.optim.SGD(p, momentum=0.9), "has no betas, eps: load a state of LAMB"),
        (lambda p: torch.optim.AdamW(p, maximize=True), "maximize=True, which LAMB does not have"),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), "amsgrad=True, which LAMB does not have"),
    ],
)
def test_states_of_other_optimisers_are_refused(other, sentence):
    params = [torch.ones(3, requires_grad=True)]
    theirs, ours = other(params), LAMB(params, lr=0.125)
    with pytest.raises(ValueError, match=sentence):
        ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["lr"] == 0.125


def test_sparse_gradients_are_refused():
    p = nn.Parameter(torch.ones(3, 2))
    p.grad = torch.ones(3, 2).to_sparse()
    with pytest.raises(RuntimeError, match="LAMB takes no sparse gradients: "):
        LAMB([p]).step()
    assert torch.equal(p.detach(), torch.ones(3, 2))


def test_the_setting_chooses_it():
    """Biases and LayerNorm have neither decay nor a trust ratio; the others have one even without decay."""
    optimiser = make_optimiser(small_model(), small_config(optimiser="lamb", weight_decay=0.0))
    assert isinstance(optimiser, LAMB)
    assert [g["always_adapt"] for g in optimiser.param_groups] == [True, False]
    assert [g["eps"] for g in optimiser.param_groups] == [1e-6, 1e-6]
    assert isinstance(make_optimiser(small_model(), small_config()), torch.optim.AdamW)


class OneBatch(RandomFeed):
    """The same batch again and again."""

    def stream(self, epoch=0, start=0):
        while True:
            yield self.batch(0, 0)


@pytest.mark.usefixtures("_way")
def test_training_lowers_the_loss_and_resumes_bitwise():
    config = small_config(optimiser="lamb", lr=0.05, steps=30)

    def trainer(seed):
        model = small_model(dropout=0.0, seed=seed)
        return PretrainTrainer(model, OneBatch(), config)

    first, second = trainer(0), trainer(5)
    losses = [first.train_step().loss for _ in range(8)]
    second.restore(copy.deepcopy(first.state()))
    losses += [first.train_step().loss for _ in range(8)]
    assert [second.train_step().loss for _ in range(8)] == losses[8:]
    assert losses[-1] < losses[0] - 0.5
