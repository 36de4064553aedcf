"""fastbert.freeze of accelerated models: same results, changed weights are found, layers run where copies can't."""

import copy
import io
import pickle

import pytest
import torch
from hf_models import FAMILIES, MASK, batch, build
from torch import nn

import fastbert
from fastbert.backend import cpu

if cpu.native is None:
    pytest.skip(str(cpu.unavailable), allow_module_level=True)


@torch.no_grad()
def outputs(model, given, **options):
    """All floating outputs at tokens."""
    out = model(**given, **options)
    found = {k: v for k, v in out.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    return {k: v[MASK.bool()] if v.shape[:2] == MASK.shape else v for k, v in found.items()}


def same(a, b, **tolerance):
    tolerance = tolerance or {"atol": 3e-6, "rtol": 1e-5}
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerance)


def frozen(family="Bert", head="Model", **changes):
    return fastbert.freeze(fastbert.accelerate(build(family, head, **changes)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", ["Model", "ForMaskedLM", "ForSequenceClassification"])
def test_same_results(family, head):
    stock, model = build(family, head), frozen(family, head)
    assert fastbert.frozen_bytes(model) == 0
    for mask in (MASK, torch.ones_like(MASK), None):
        given = {**batch(family, head), "attention_mask": mask}
        given.pop("labels", None)
        same(outputs(model, given), outputs(stock, given))
    assert fastbert.frozen_bytes(model) > 0


def test_same_results_in_bf16():
    model = frozen()
    given = batch("Bert")
    with torch.autocast("cpu", torch.bfloat16):
        found = outputs(model, given)
        copies = fastbert.frozen_bytes(model)
        expected = outputs(fastbert.unfreeze(model), given)
    assert copies > 0
    assert found["last_hidden_state"].dtype == expected["last_hidden_state"].dtype
    same(found, expected, atol=0.15, rtol=0.05)


def first_linear(model):
    return model.get_submodule("encoder.layer.0.attention.output.dense")


def _in_place(model):
    with torch.no_grad():
        first_linear(model).weight.mul_(1.5)


def _data(model):
    first_linear(model).weight.data = first_linear(model).weight.data * 1.5


def _written_through_data(model):
    first_linear(model).weight.data.lerp_(torch.ones(()), 0.1)


def _fused_adamw(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


def _load(model):
    model.load_state_dict({k: 1.25 * v for k, v in model.state_dict().items()})


def _replace_parameter(model):
    weight = first_linear(model).weight.detach()
    first_linear(model).weight = nn.Parameter(2 * weight)


def _replace_module(model):
    torch.manual_seed(3)
    model.encoder.layer[1].output.dense = nn.Linear(37, 32)


def _hook(model):
    first_linear(model).register_forward_hook(lambda m, args, y: 1.5 * y)


def _hook_on_a_layer(model):
    def larger(m, args, y):
        return 1.5 * y if isinstance(y, torch.Tensor) else (1.5 * y[0], *y[1:])

    model.encoder.layer[0].register_forward_hook(larger)


def _parametrize(model):
    class Double(nn.Module):
        def forward(self, w):
            return 2 * w

    nn.utils.parametrize.register_parametrization(first_linear(model), "weight", Double())


def _bias_gone(model):
    first_linear(model).bias = None


def _eps(model):
    model.encoder.layer[1].output.LayerNorm.eps = 0.5


def _activation(model):
    model.encoder.layer[0].intermediate.intermediate_act_fn = nn.SiLU()


def _forward(model):
    layer = model.encoder.layer[0]
    layer.forward = lambda x, *args, _kept=layer.forward, **given: 2 * _kept(x, *args, **given)


def _instruction_set(model):
    cpu.native.use_isa(cpu.native.isas()[0])


CHANGES = [
    _in_place,
    _data,
    _written_through_data,
    _fused_adamw,
    _load,
    _replace_parameter,
    _replace_module,
    _hook,
    _hook_on_a_layer,
    _parametrize,
    _bias_gone,
    _eps,
    _activation,
    _instruction_set,
]


@pytest.fixture(autouse=True)
def _restore():
    before = cpu.native.isa()
    yield
    cpu.native.use_isa(before)


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__.strip("_"))
def test_a_change_is_seen(change):
    model, given = frozen(), batch("Bert")
    before = outputs(model, given)
    assert fastbert.frozen_bytes(model) > 0
    change(model)
    other = fastbert.accelerate(build("Bert"))
    change(other)
    expected = outputs(other, given)
    same(outputs(model, given), expected)
    if change is not _instruction_set:
        assert not torch.allclose(
            before["last_hidden_state"], expected["last_hidden_state"], atol=1e-3
        )


def test_adapters_are_not_skipped():
    peft = pytest.importorskip("peft")
    model, given = frozen(), batch("Bert")
    before = outputs(model, given)
    config = peft.LoraConfig(target_modules=["query", "dense"], init_lora_weights=False)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, config).eval()
    stock = build("Bert")
    torch.manual_seed(0)
    expected = outputs(peft.get_peft_model(stock, config).eval(), given)
    same(outputs(adapted, given), expected)
    assert not torch.allclose(before["last_hidden_state"], expected["last_hidden_state"], atol=1e-3)


def test_what_layers_are_needed_for():
    """For gradients, dropout, hidden states and another backend the layers run, not the copies."""
    model, given = frozen(), batch("Bert")
    assert model(**given).last_hidden_state.requires_grad
    assert len(model(**given, output_hidden_states=True).hidden_states) == 3
    model.train()
    with torch.no_grad():
        assert not torch.equal(model(**given).last_hidden_state, model(**given).last_hidden_state)
    assert fastbert.frozen_bytes(model) == 0
    with fastbert.backend.use("torch"):
        outputs(model.eval(), given)
    assert fastbert.frozen_bytes(model) == 0


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("way", [copy.deepcopy, saved, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_packs_its_own_weights(way):
    model, given = frozen(), batch("Bert")
    expected = outputs(model, given)
    other = way(model)
    assert fastbert.frozen_bytes(other) == 0
    same(outputs(other, given), expected)
    assert fastbert.frozen_bytes(other) == fastbert.frozen_bytes(model)


def test_restored_models_keep_nothing():
    model, given = frozen(), batch("Bert")
    expected = outputs(model, given)
    same(outputs(fastbert.restore(model), given), expected)
    assert fastbert.frozen_bytes(model) == 0
    with pytest.raises(TypeError, match="or an accelerated one"):
        fastbert.freeze(model)
