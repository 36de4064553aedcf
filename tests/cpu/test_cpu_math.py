"""The native elementary functions against fp64 on a grid over [-100, 100], once per instruction set."""

import math

import pytest
import torch

from fastbert.backend import cpu

if cpu.native is None:
    pytest.skip(str(cpu.unavailable), allow_module_level=True)

from fastbert.backend.cpu import bias_gelu, cross_entropy, gated_feed_forward

EPS = torch.finfo(torch.float32).eps
ISAS = pytest.mark.parametrize("isa", cpu.native.isas())
FORMS = pytest.mark.parametrize("form", ["none", "tanh", "silu"])


@pytest.fixture(autouse=True)
def _restore():
    """Leave the instruction set as it was."""
    before = cpu.native.isa()
    yield
    cpu.native.use_isa(before)


def grid() -> torch.Tensor:
    """A fine grid, denormals, and values around the functions' own limits."""
    fine = torch.linspace(-100.0, 100.0, 400_001)
    near = torch.linspace(-1.0, 1.0, 20_001) * 1e-3
    edges = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 1e-45, -1e-45, 14.0, -14.0, 15.0, -15.0])
    return torch.cat([fine, near, edges, torch.tensor([1e10, -1e10, 3e38, -3e38])])


def native(x: torch.Tensor, form: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The native value and derivative, (N,), of GELU by its `approximate`, or of SiLU."""
    row = x[None]
    one = torch.ones_like(row)
    if form == "silu":
        # a gate of 1 and a gradient of 1: dg is the value, da the derivative
        u, needs = torch.cat([row, one], 1), [False, False, True, False, False]
        args = (one[:, :1], one[:, :1], u, [one.t()], one, form, needs, x.dtype)
        derivative, value = gated_feed_forward.backward(*args)[2].chunk(2)
        return value, derivative
    return bias_gelu.forward(row, None, form)[0], bias_gelu.backward(one, row, None, form)[0][0]


def truth(x: torch.Tensor, form: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in fp64, from formulas that keep the left tail's digits."""
    x = x.double().clamp(-200.0)
    if form == "silu":
        s, other = torch.sigmoid(x), torch.sigmoid(-x)
        return x * s, s + x * s * other
    if form == "tanh":
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
        s, other = torch.sigmoid(2 * inner), torch.sigmoid(-2 * inner)
        slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x.clamp(-200, 200) ** 2)
        return x * s, s + x.clamp(-200, 200) * s * other * 2 * slope
    cdf = 0.5 * torch.erfc(-x / math.sqrt(2.0))
    pdf = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return x * cdf, cdf + x * pdf


@ISAS
@FORMS
def test_activations_and_their_derivatives_are_within_a_few_ulp(isa, form):
    cpu.native.use_isa(isa)
    x = grid()
    value, derivative = native(x, form)
    expected, slope = truth(x, form)
    # the left tail is about e^-u, so its relative error has that of u times u; SiLU's u is exact
    u = {"none": x.double().square() / 2, "tanh": 2 * x.double().abs() ** 3}.get(form, 0 * x)
    relative = EPS * (6 + torch.where(x < 0, u.clamp(max=100.0), 0.0))
    assert ((value - expected).abs() <= relative * expected.abs() + 1e-36).all()
    # near its zero the derivative is a difference of numbers of at most 0.3
    size = slope.abs() + torch.where(x.abs() < 2, 0.3, 0.0)
    assert ((derivative - slope).abs() <= 2 * relative * size + 1e-35).all()


@ISAS
@FORMS
def test_activations_of_infinities_and_nan(isa, form):
    cpu.native.use_isa(isa)
    # 20 elements: a whole vector of every width, and a rest
    x = torch.tensor([math.inf, -math.inf, math.nan, 1.0]).repeat(5)
    value, derivative = native(x, form)
    assert torch.equal(value[0::4], torch.full((5,), math.inf))
    assert torch.equal(derivative[0::4], torch.ones(5))
    assert torch.equal(value[1::4], torch.zeros(5))
    assert torch.equal(derivative[1::4], torch.zeros(5))
    assert value[2::4].isnan().all()
    assert derivative[2::4].isnan().all()
    assert value[3::4].isfinite().all()


@ISAS
def test_the_exponential_is_within_two_ulp(isa):
    """The gradient of the loss of logits (0, x) with label 0 has e^x / (1 + e^x) at x."""
    cpu.native.use_isa(isa)
    x = torch.cat([torch.linspace(-100.0, 0.0, 200_001), torch.tensor([-1e-40, -1e10, -math.inf])])
    logits = torch.stack([torch.zeros_like(x), x], 1)
    labels = torch.zeros(len(x), dtype=torch.int64)
    _, lse = cross_entropy.forward(logits, labels, -100)
    grad = cross_entropy.backward(torch.ones(len(x)), logits, labels, lse, -100)[:, 1].double()
    expected = torch.sigmoid(x.double())
    normal = x > -87.3
    assert ((grad - expected).abs()[normal] <= 2 * EPS * expected[normal]).all()
    assert (grad[~normal] <= 1.3e-38).all()
    assert (grad[x < -88] == 0).all()
