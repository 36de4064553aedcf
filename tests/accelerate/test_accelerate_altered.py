"""Altered models: their own code runs, or a sentence says that it can't; no alteration is ignored."""

import copy

import pytest
import torch
from hf_models import batch, build
from torch import nn
from torch.autograd import forward_ad, functional
from torch.nn import functional as F

import fastbert

X = torch.linspace(-2, 2, 3 * 7 * 32).sin().view(3, 7, 32)


def encoder_layer(**given):
    torch.manual_seed(0)
    options = {"dropout": 0.0, "batch_first": True, **given}
    return nn.TransformerEncoderLayer(32, 4, 64, **options)


class SquaredReLU(nn.ReLU):
    def forward(self, input):
        return super().forward(input) ** 2


def doubled(m, _, y):
    return 2 * y


ALTERED = {
    "function": lambda m: setattr(m, "activation", F.silu),
    "module": lambda m: setattr(m, "activation", nn.SiLU()),
    "gelu for relu": lambda m: setattr(m, "activation", nn.GELU()),
    "subclass": lambda m: setattr(m, "activation", SquaredReLU()),
    "hook": lambda m: (
        setattr(m, "activation", nn.GELU()),
        m.activation.register_forward_hook(doubled),
    ),
    "feed-forward": lambda m: setattr(m, "_ff_block", lambda x: 3 * x),
    "attention": lambda m: setattr(m, "_sa_block", lambda x, *_, **__: 3 * x),
    "dropout of 1": lambda m: setattr(m.dropout1, "p", 1.0),
}


@pytest.mark.parametrize("name", ALTERED)
def test_an_altered_layer_of_torch_nn(name):
    stock = encoder_layer()
    before = stock(X)
    ours = copy.deepcopy(stock)
    ALTERED[name](stock)
    fastbert.accelerate(ours)
    ALTERED[name](ours)
    assert not torch.allclose(stock(X), before, atol=1e-2)
    torch.testing.assert_close(ours(X), stock(X), atol=1e-5, rtol=1e-5)


def test_dropouts_have_modes_of_their_own():
    """Monte Carlo dropout in eval mode, and dropouts that are off in training mode."""
    model = fastbert.accelerate(nn.TransformerEncoder(encoder_layer(dropout=0.5), 2).eval())
    assert torch.equal(model(X), model(X))
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.train()
    assert not torch.equal(model(X), model(X))
    model.train()
    for m in model.modules():
        if isinstance(m, (nn.Dropout, nn.MultiheadAttention)):
            m.eval()
    assert torch.equal(model(X), model(X))


def test_global_hooks_see_the_parts_of_an_encoder():
    stock = nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=False)
    ours = fastbert.accelerate(copy.deepcopy(stock))
    seen = []
    hook = nn.modules.module.register_module_forward_hook(
        lambda m, *_: seen.append(type(m).__name__)
    )
    try:
        torch.testing.assert_close(ours(X), stock(X), atol=1e-5, rtol=1e-5)
    finally:
        hook.remove()
    assert seen.count("Linear") == 2 * len(stock.layers) * 2


def test_second_derivatives_are_refused_and_not_zero():
    model = fastbert.accelerate(encoder_layer()).requires_grad_(False)
    x = X[:, :2].clone()

    def square(x):
        return model(x).square().sum()

    for derive in (functional.hvp, functional.vhp, lambda f, x, v: functional.jvp(model, x, v)):
        with pytest.raises(RuntimeError, match="no second derivatives"):
            derive(square, x, torch.ones_like(x))
    x.requires_grad_()
    (dx,) = torch.autograd.grad(square(x), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        dx.sum().backward()
    (plain,) = torch.autograd.grad(square(x), x)
    torch.testing.assert_close(dx.detach(), plain)


@pytest.mark.parametrize("kind", [nn.GELU, lambda: nn.LayerNorm(32)])
def test_forward_mode_runs_stock_code_in_modules(kind):
    stock = kind().requires_grad_(False)
    ours = fastbert.accelerate(copy.deepcopy(stock))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(X, torch.ones_like(X))
        expected, found = (forward_ad.unpack_dual(m(dual)).tangent for m in (stock, ours))
        torch.testing.assert_close(found, expected)
        with pytest.raises(NotImplementedError, match="no forward-mode derivatives"):
            fastbert.functional.layer_norm(dual)


def losses(family, change):
    """The training losses of a masked LM after a change, stock's and the accelerated model's."""
    found = []
    for accelerated in (False, True):
        model = build(
            family, "ForMaskedLM", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        change(model)
        if accelerated:
            fastbert.accelerate(model)
        found.append(model.train()(**batch(family, "ForMaskedLM")).loss)
    return found


def tripled(module):
    """Give the module a class of its own with outputs three times as large."""
    kind = type(module)
    module.__class__ = type("Mine", (kind,), {"forward": lambda self, x: 3 * kind.forward(self, x)})
    module.__class__.__module__ = "mine"


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.only = nn.Linear(32, 99)

    def forward(self, x):
        return self.only(x)


def own_head(model):
    torch.manual_seed(0)
    model.cls = Head()


HEADS = {
    "roberta": ("Roberta", lambda m: tripled(m.lm_head)),
    "predictions": ("Bert", lambda m: tripled(m.cls.predictions)),
    "cls": ("Bert", own_head),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_of_ones_own(name):
    expected, found = losses(*HEADS[name])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_function_that_mixes_tokens():
    stock = build("Bert")
    for layer in stock.encoder.layer:
        del layer.intermediate.intermediate_act_fn
        layer.intermediate.intermediate_act_fn = F.normalize
    ours = fastbert.accelerate(copy.deepcopy(stock))
    ids = batch("Bert")["input_ids"]
    expected, found = (m(ids).last_hidden_state for m in (stock, ours))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_replaced_method_of_a_layer():
    stock = build("Bert")
    ours = fastbert.accelerate(copy.deepcopy(stock))
    for m in (stock, ours):
        m.encoder.layer[1].feed_forward_chunk = lambda x: 2 * x
    given = batch("Bert")
    expected, found = (m(**given).last_hidden_state for m in (stock, ours))
    token = given["attention_mask"].bool()
    torch.testing.assert_close(found[token], expected[token], atol=1e-5, rtol=1e-5)


def test_restored_under_a_wrapped_forward():
    model = build("Bert", "ForMaskedLM")
    expected = model(**batch("Bert", "ForMaskedLM")).loss
    forward = fastbert.accelerate(model).forward
    model.forward = lambda **given: forward(**given)
    fastbert.restore(model)
    torch.testing.assert_close(model(**batch("Bert", "ForMaskedLM")).loss, expected)
