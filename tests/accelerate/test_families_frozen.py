"""fastbert.freeze and fastbert.quantize of the families that only transformers 5 has, or that are new since."""

import copy
import logging
import pickle

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", minversion="5.0")

from hf_models import accelerated  # noqa: E402
from modern_models import FAMILIES, LENGTHS, MASK, batch, build  # noqa: E402

import fastbert  # noqa: E402
from fastbert.backend import cpu  # noqa: E402
from fastbert.bert import BertConfig, BertModel  # noqa: E402
from fastbert.integrations import layers  # noqa: E402
from fastbert.integrations.known_families import FAMILIES as KNOWN  # noqa: E402
from fastbert.nn import int8, watch  # noqa: E402

if cpu.native is None:
    pytest.skip(str(cpu.unavailable), allow_module_level=True)

# DeBERTa's attention has no native call: test_deberta.py
FAMILIES = tuple(f for f in FAMILIES if "Deberta" not in f)
# one of each form of layer
FORMS = ("Esm", "MPNet", "Albert", "MegatronBert", "JinaEmbeddingsV3")
FORMS = (*FORMS, "ModernBert", "NomicBert", "EuroBert")


@pytest.fixture
def no_layer(monkeypatch):
    """No layer may run by itself."""

    def run(*_):
        raise AssertionError("a layer ran by itself")

    return lambda: monkeypatch.setattr(layers, "run", run)


@torch.no_grad()
def output(model, given=None):
    """The last hidden states at tokens, or the logits."""
    given = dict(given or batch(model))
    for name in ("labels", "start_positions", "end_positions"):
        given.pop(name, None)
    y = model(**given)[0]
    mask = given.get("attention_mask")
    return y[mask.bool()] if mask is not None and y.shape[:2] == mask.shape else y


def same(y, expected, share=1e-5):
    assert y.shape == expected.shape
    assert y.dtype == expected.dtype
    assert (y - expected).abs().max() <= share * expected.abs().max()


def heads(family):
    names = ("Model", "ForMaskedLM", "ForSequenceClassification")
    return [n for n in names if hasattr(transformers, family + n)]


@pytest.mark.parametrize("isa", cpu.native.isas())
@pytest.mark.parametrize("family", FAMILIES)
def test_a_frozen_model_gives_the_same_hidden_states(family, isa, no_layer):
    before = cpu.native.isa()
    cpu.native.use_isa(isa)
    try:
        model = accelerated(build(family))
        given = batch(model)
        batches = [given, given | {"attention_mask": torch.ones_like(MASK)}]
        expected = [output(model, b) for b in batches]
        fastbert.freeze(model)
        no_layer()
        for b, y in zip(batches, expected, strict=True):
            same(output(model, b), y)
    finally:
        cpu.native.use_isa(before)


@pytest.mark.parametrize("layers_", [1, 3])
@pytest.mark.parametrize(
    ("family", "head"), [(f, h) for f in FAMILIES for h in heads(f) if h != "Model"]
)
def test_heads_of_a_frozen_model_give_the_same_logits(family, head, layers_, no_layer):
    changes = {"num_hidden_layers": layers_}
    if family == "Albert":
        changes["num_hidden_groups"] = 1
    model = accelerated(build(family, head, **changes))
    given = batch(model, head)
    expected = output(model, given)
    fastbert.freeze(model)
    no_layer()
    same(output(model, given), expected)


@pytest.mark.parametrize("family", FORMS)
def test_bf16_is_as_near_as_without_copies(family, no_layer):
    model = accelerated(build(family))
    truth = output(model)
    with torch.autocast("cpu", torch.bfloat16):
        expected = output(model)
        fastbert.freeze(model)
        no_layer()
        y = output(model)
    assert y.dtype == expected.dtype
    errors = [(t.float() - truth).abs().max() for t in (y, expected)]
    assert errors[0] <= 2 * errors[1]


def _all_weights(model):
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)


def _through_data(model):
    _last_projection(model).weight.data.lerp_(torch.ones(()), 0.1)


def _last_projection(model):
    family = getattr(type(model), "fastbert_family", None) or KNOWN[type(model).__module__]
    return family.layout.of(family.layers_of(family.stack_of(model))[-1]).down


def _hook(model):
    _last_projection(model).register_forward_hook(lambda m, args, y: 1.5 * y)


def _replaced(model):
    old = _last_projection(model)
    torch.manual_seed(7)
    new = nn.Linear(old.in_features, old.out_features, bias=old.bias is not None)
    for m in model.modules():
        for name, child in m._modules.items():
            if child is old:
                m._modules[name] = new


@pytest.mark.parametrize("change", [_all_weights, _through_data, _hook, _replaced])
@pytest.mark.parametrize("family", FORMS)
def test_a_change_is_seen(family, change):
    model = fastbert.freeze(accelerated(build(family)))
    before = output(model)
    assert fastbert.frozen_bytes(model) > 0
    change(model)
    other = accelerated(build(family))
    change(other)
    expected = output(other)
    assert (expected - before).abs().max() > 1e-3
    same(output(model), expected)


def test_what_attention_reads_beside_the_weights_is_read_in_every_call():
    def window(model):
        model.layers[1].attn.sliding_window = 3

    def rates(model):
        model.rotary_emb.full_attention_inv_freq.mul_(0.5)

    def biases(model):
        model.encoder.relative_attention_bias.weight.data.mul_(-1)

    for family, change in (("ModernBert", window), ("ModernBert", rates), ("MPNet", biases)):
        model, other = fastbert.freeze(accelerated(build(family))), accelerated(build(family))
        before = output(model)
        change(model)
        change(other)
        assert (output(other) - before).abs().max() > 1e-3
        same(output(model), output(other))


@pytest.mark.parametrize("family", ["ModernBert", "NomicBert", "EuroBert", "JinaEmbeddingsV3"])
def test_as_many_layers_run_as_in_transformers(family):
    """Three of the four families run the first config.num_hidden_layers of their list."""
    stock = build(family)
    stock.config.num_hidden_layers = 2
    expected, model = output(stock), accelerated(stock)
    same(output(model), expected)
    same(output(fastbert.freeze(model)), expected)
    assert fastbert.frozen_bytes(model) > 0


@pytest.mark.parametrize("bits", [None, 12])
def test_shared_layers_are_packed_once(bits):
    sizes = []
    for count in (2, 6):
        model = accelerated(build("Albert", num_hidden_layers=count))
        model = fastbert.freeze(model) if bits is None else fastbert.quantize(model, bits)
        output(model)
        sizes.append(fastbert.frozen_bytes(model))
    assert 0 < sizes[0] == sizes[1]


@pytest.mark.parametrize("family", ["ModernBert", "EuroBert", "Esm"])
@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_packs_its_own_weights(family, way):
    model = fastbert.freeze(accelerated(build(family)))
    expected = output(model)
    other = way(model)
    assert fastbert.frozen_bytes(other) == 0
    assert torch.equal(output(other), expected)
    assert fastbert.frozen_bytes(other) == fastbert.frozen_bytes(model) > 0
    fastbert.restore(other)
    assert fastbert.frozen_bytes(other) == 0


@pytest.mark.parametrize("family", ["ModernBert", "Esm"])
def test_the_layers_run_where_the_copies_do_not_serve(family, said):
    model = fastbert.freeze(accelerated(build(family)))
    given = batch(model)
    assert model(**given)[0].requires_grad
    with torch.no_grad():
        assert len(model(**given, output_hidden_states=True).hidden_states) == 4
        left = given | {"attention_mask": MASK.flip(1)}
        same(output(model, left), output(build(family), left))
    for line in ("gradients are recorded", "hidden states are requested", "begins with padding"):
        assert sum(line in s for s in said()) == 1
    assert fastbert.frozen_bytes(model) == 0


def test_adapters_of_a_model_that_holds_its_layers_are_not_skipped(said):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["Wqkv", "Wo"], init_lora_weights=False)
    model, stock = fastbert.freeze(accelerated(build("ModernBert"))), build("ModernBert")
    given, found = batch(stock), []
    before = output(model)
    for m in (model, stock):
        torch.manual_seed(0)
        found.append(output(peft.get_peft_model(m, config).eval(), given))
    same(*found)
    assert (found[0] - before).abs().max() > 1e-3
    assert any(
        "runs its layers one by one: a Linear or a norm is not torch.nn's" in s for s in said()
    )


def _no_key_bias(layer):
    layer.attention.self.key.bias = None


def _wide_query(layer):
    layer.attention.self.query.double()


@pytest.mark.parametrize("change", [_no_key_bias, _wide_query])
def test_projections_that_are_not_one_product_are_named(change, said):
    """Projections without any biases are one product; so the absence of a bias alone is no reason."""
    stock = build("Ernie")
    change(stock.encoder.layer[1])
    model = accelerated(stock)
    expected = output(model)
    same(output(fastbert.freeze(model)), expected)
    assert any("projections that are one product differ in biases" in s for s in said())
    assert fastbert.frozen_bytes(model) == 0
    for name in ("query", "key", "value"):
        for layer in stock.encoder.layer:
            getattr(layer.attention.self, name).float().bias = None
    model = fastbert.freeze(accelerated(stock))
    same(output(model), output(stock))
    assert fastbert.frozen_bytes(model) > 0


# --- quantize ---


def rounded(model):
    """The model with weights that int8 holds exactly."""
    family = getattr(type(model), "fastbert_family", None) or KNOWN[type(model).__module__]
    for layer in family.layers_of(family.stack_of(model)):
        for m in layer.modules():
            if isinstance(m, nn.Linear):
                q, scale, sources = int8.split(m.weight)
                whole = q[:, : m.in_features].float()
                whole = whole.index_add(1, sources.long(), q[:, m.in_features :].float())
                m.weight.data = whole * scale[:, None]
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_quantised_model_computes_every_product_in_integers(family, no_layer):
    """With weights that are integers the activations' rounding is left: 12 bits are 16 times as near as 8."""
    model = accelerated(rounded(build(family)))
    given, exact = batch(model), output(model)
    errors = []
    no_layer()
    for bits in (12, 8):
        y = output(fastbert.quantize(model, bits), given)
        errors.append(((y - exact).norm() / exact.norm()).item())
    assert 0 < errors[0] < 4e-3
    assert 5 < errors[1] / errors[0] < 40
    # a quarter of freeze's copies
    small = fastbert.frozen_bytes(model)
    output(fastbert.freeze(model))
    assert small < 0.4 * fastbert.frozen_bytes(model)


# ALBERT's product before its layers is in floating point, and rounds otherwise in another batch
@pytest.mark.parametrize("family", [f for f in FORMS if f != "Albert"])
def test_a_text_alone_is_bitwise_itself_in_a_batch(family):
    model = fastbert.quantize(accelerated(build(family)))
    given = batch(model)
    with torch.no_grad():
        together = model(**given)[0]
        for i, length in enumerate(LENGTHS.tolist()):
            alone = model(input_ids=given["input_ids"][i : i + 1, :length])[0]
            assert torch.equal(alone[0], together[i, :length])


# what has no product in integers, and where the layers' own activation is named
RELU = {"hidden_act": "relu"}
REFUSED = {
    "Bert": ({"is_decoder": True}, "layer 0: its attention is causal"),
    "Ernie": (RELU, "layer 0: the activation is not GELU"),
    "MPNet": (RELU, "layer 0: the activation is not GELU"),
    "NomicBert": (RELU, "layer 0: the activation is not GELU or SiLU"),
    "ModernBert": ({"local_attention": 0}, "layer 1: its sliding window is of 0 tokens"),
    "EuroBert": ({"hidden_act": "tanh"}, "layer 0: the activation is not GELU or SiLU"),
}


@pytest.mark.parametrize("family", REFUSED)
def test_a_form_without_integers_is_refused(family):
    changes, reason = REFUSED[family]
    if family == "Bert":
        sizes = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3}
        model = transformers.BertModel(transformers.BertConfig(**sizes, **changes))
    else:
        model = build(family, **changes)
    fastbert.accelerate(model).train()
    with pytest.raises(ValueError, match="the model can't be quantised: .*" + reason):
        fastbert.quantize(model)
    assert model.training
    assert not any("frozen" in vars(m) for m in model.modules())


def test_our_own_models_without_integers_are_refused():
    config = BertConfig(vocab_size=9, hidden_size=8, num_attention_heads=2, hidden_act="relu")
    with pytest.raises(ValueError, match="layer 0: the activation is not GELU"):
        fastbert.quantize(BertModel(config))


def test_too_many_columns_for_exact_sums_are_refused():
    model = accelerated(build("Esm", intermediate_size=8192, num_hidden_layers=1))
    with pytest.raises(ValueError, match="layer 0: a weight has 8192 columns, and 12 bits allow"):
        fastbert.quantize(model)
    fastbert.quantize(model, 8)


def test_a_quantised_model_that_runs_transformers_code_warns(caplog, monkeypatch):
    monkeypatch.setattr(watch, "_logged", set())
    for family in ("ModernBert", "Esm"):
        model = fastbert.quantize(accelerated(build(family)))
        caplog.clear()
        with caplog.at_level(logging.WARNING, "fastbert"):
            output(model)
            assert not caplog.records
            output(model, batch(model) | {"attention_mask": MASK.flip(1)})
        assert "runs transformers' code: attention reads the distances" in caplog.text
