import pytest
import torch
from harness import check, compiled, gradcheck, parametrize

from fastbert import functional
from fastbert.backend import chooser
from fastbert.backend.reference.dropout_add_layer_norm import eager
from fastbert.integrations.memory import saved_bytes

SLUG = "dropout_add_layer_norm"


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
    compiled(SLUG, "torch")


def test_the_output_is_kept_instead_of_the_sum():
    """Backward needs no tensor of the size of x but the output. A weight of 0 gives no NaN."""
    x, residual = (torch.randn(50, 24, requires_grad=True) for _ in range(2))
    weight, bias = torch.ones(24, requires_grad=True), torch.zeros(24, requires_grad=True)

    def saved(**options):
        call = functional.dropout_add_layer_norm
        return saved_bytes(lambda: call(x, residual, weight, bias, **options), [weight, bias])

    assert saved() == saved(from_output=True) == x.nbytes + 2 * 50 * 4
    with torch.no_grad():
        weight[3] = 0
    y = functional.dropout_add_layer_norm(x, residual, weight, bias, from_output=True)
    y.square().sum().backward()
    assert x.grad.isfinite().all()
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("name", ["reference", "torch", "cpu"])
@pytest.mark.parametrize("used", ["y", "z", "both"])
def test_gradients_of_one_output_and_of_both(name, used):
    """An output that the loss does not use adds nothing; the gradients of both add up."""
    if reason := chooser.matrix()[SLUG][name]:
        pytest.skip(reason)
    given = [torch.randn(40, 24), torch.randn(40, 24), torch.randn(24)]
    seed, weights = torch.tensor([5]), torch.randn(2, 40, 24)
    found = []
    for op in (functional.dropout_add_layer_norm, eager):
        leaves = [t.clone().requires_grad_() for t in given]
        with chooser.use(name):
            outs = op(*leaves, p=0.3, seed=seed, site=2, return_sum=True)
            loss = [(t * w).sum() for t, w in zip(outs, weights, strict=True)]
            (loss[0] if used == "y" else loss[1] if used == "z" else sum(loss)).backward()
        found.append([*(t.detach() for t in outs), *(t.grad for t in leaves)])
    for ours, theirs in zip(*found, strict=True):
        theirs = torch.zeros_like(ours) if theirs is None else theirs
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["reference", "torch", "cpu"])
@pytest.mark.parametrize("grad", [False, True])
def test_the_sum_is_no_input(name, grad):
    """Without dropout and with zeros added, z equals an input, and still has memory of its own."""
    if reason := chooser.matrix()[SLUG][name]:
        pytest.skip(reason)
    x, residual, weight = torch.zeros(3, 8, requires_grad=grad), torch.randn(3, 8), torch.ones(8)
    with chooser.use(name):
        y, z = functional.dropout_add_layer_norm(x, residual, weight, return_sum=True)
    assert torch.equal(z, residual)
    assert len({t.data_ptr() for t in (x, residual, y, z)}) == 4
    assert z.requires_grad == grad
