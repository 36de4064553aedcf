"""fastbert.quantize(replace=True): the encoder's weights are int8 alone, with the same results."""

import copy
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastbert
from fastbert import functional as F
from fastbert.backend import cpu
from fastbert.bert import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertModel,
)
from fastbert.nn import int8

if cpu.native is None:
    pytest.skip(str(cpu.unavailable), allow_module_level=True)

# odd sizes: no product is a whole number of panels or of pairs
SIZES = {
    "vocab_size": 97,
    "hidden_size": 45,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 101,
    "max_position_embeddings": 40,
}
KINDS = pytest.mark.parametrize(
    "kind", [BertModel, BertForMaskedLM, BertForPreTraining, BertForSequenceClassification]
)


def made(kind=BertModel, **settings):
    """A model with weights of an ordinary size, and a column of outliers in one of them."""
    torch.manual_seed(3)
    model = kind(BertConfig(**SIZES | settings))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    with torch.no_grad():
        model.bert.layers[1].feed_forward.down.weight[:, 7] = 1.2
    return model.eval()


def batch():
    torch.manual_seed(1)
    mask = (torch.arange(19) < torch.tensor([19, 3, 11])[:, None]).long()
    return {"input_ids": torch.randint(5, 97, (3, 19)), "attention_mask": mask}


@torch.no_grad()
def results(model):
    """All tensors of a forward."""
    output = model(**batch())
    return [v for v in output.to_tuple() if isinstance(v, torch.Tensor)]


def assert_same(a, b):
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


def replaced(kind=BertModel, bits=12, embeddings=False, **settings):
    model = made(kind, **settings)
    return fastbert.quantize(model, bits, replace=True, embeddings=embeddings)


def matrix(model):
    """The module with extra columns."""
    return model.bert.layers[1].feed_forward.down


@pytest.mark.parametrize("bits", [12, 8])
@KINDS
def test_the_same_numbers_as_copies_of_the_weights(kind, bits):
    expected = results(fastbert.quantize(made(kind), bits))
    model = replaced(kind, bits)
    assert matrix(model).sources.numel() > 0
    # without no_grad too: no weight of the encoder requires a gradient
    assert_same(results(model), expected)
    assert model.bert.frozen._packs
    with torch.autocast("cpu", torch.bfloat16):
        low = results(model)
        assert_same(low, results(fastbert.quantize(made(kind), bits)))
    fresh = results(replaced(kind, bits))
    assert_same(fresh, expected)


def test_gradients_that_are_recorded_elsewhere_keep_the_native_call():
    model = replaced(BertForSequenceClassification)
    logits = model(**batch()).logits
    assert model.bert.frozen._packs
    logits.sum().backward()
    assert model.classifier.weight.grad is not None
    assert all(p.grad is None for p in model.bert.layers.parameters())


def test_memory_is_a_quarter():
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4}
    model = made(**sizes)
    before = fastbert.weight_bytes(model.layers)
    assert before["int8"] == before["copies"] == 0
    fastbert.quantize(model, replace=True)
    results(model)
    after = fastbert.weight_bytes(model)
    layers = fastbert.weight_bytes(model.layers)
    # nothing is held twice after a forward: scales, norms, biases and padding are the rest
    assert 0.25 < sum(layers.values()) / before["others"] < 0.28
    assert after["copies"] == fastbert.frozen_bytes(model) == 0
    assert after["int8"] == layers["int8"]
    word = model.embeddings.word.weight.nbytes
    fastbert.quantize(model, replace=True, embeddings=True)
    small = fastbert.weight_bytes(model)
    assert after["others"] - small["others"] == word
    assert small["int8"] - after["int8"] == word // 4 + 4 * SIZES["vocab_size"]


@pytest.mark.parametrize("isa", cpu.native.isas())
def test_packed_integers_come_back(isa):
    before = cpu.native.isa()
    for N, K in ((1, 1), (7, 13), (33, 45), (64, 1100)):
        m = int8.Int8Linear(K, N)
        weight = torch.randint(-127, 128, (N, K + 3), dtype=torch.int8)
        m.hold(weight, torch.rand(N), torch.tensor([0, K - 1, 0], dtype=torch.int32))
        cpu.native.use_isa(isa)
        try:
            m.packed()
        finally:
            cpu.native.use_isa(before)
        assert m.weight is None
        assert torch.equal(m.rows(), weight)
        assert torch.equal(m.state_dict()["weight"], weight)
        m.unpack()
        assert torch.equal(m.weight, weight)
        assert m.panels is None


def test_another_instruction_set_packs_again():
    model = replaced()
    results(model)
    before = cpu.native.isa()
    try:
        for isa in cpu.native.isas():
            cpu.native.use_isa(isa)
            assert_same(results(model), results(replaced()))
    finally:
        cpu.native.use_isa(before)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles(make):
    model = replaced(bits=8, embeddings=True)
    expected = results(model)
    again = make(model)
    assert matrix(again).weight is not None
    assert_same(results(again), expected)
    assert again.frozen._packs


def test_a_state_dict_that_is_loaded_is_used():
    model, other = replaced(), made()
    with torch.no_grad():
        for p in other.layers.parameters():
            p.mul_(-1.1)
    fastbert.quantize(other, replace=True)
    results(model)
    missing = model.load_state_dict(other.state_dict())
    assert not missing.missing_keys
    assert not missing.unexpected_keys
    assert_same(results(model), results(other))


def test_layers_one_by_one_are_near_the_native_call():
    model = replaced(embeddings=True)
    expected = results(model)[0]
    with torch.no_grad():
        states = model(**batch(), output_hidden_states=True).hidden_states
    assert (states[-1] - expected).abs().max() < 2e-3 * expected.abs().max()
    fastbert.unfreeze(model)
    assert fastbert.weight_bytes(model)["copies"] == 0
    assert matrix(model).weight is not None
    again = results(model)[0]
    assert torch.equal(again, states[-1])
    with fastbert.use("reference"):
        reference = results(model)[0]
    assert (reference - expected).abs().max() < 2e-3 * expected.abs().max()


def test_relu_runs_op_by_op():
    expected = results(made(hidden_act="relu"))[0]
    found = results(replaced(hidden_act="relu"))[0]
    assert torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), 0) > 0.999


def test_casts_keep_the_scales():
    model = replaced(embeddings=True)
    scale = matrix(model).scale.clone()
    results(model)
    model.bfloat16()
    assert torch.equal(matrix(model).scale, scale)
    assert model.embeddings.word.scale.dtype == torch.float32
    low, exact = results(model)[0], results(replaced(embeddings=True))[0]
    assert low.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(low.float().flatten(), exact.flatten(), 0) > 0.99


def test_rows_of_words():
    model = replaced(embeddings=True)
    word, exact = model.embeddings.word, made().embeddings.word
    ids = torch.tensor([[0, 96], [5, 5]])
    assert word(ids).shape == (2, 2, 45)
    step = exact.weight.abs().amax(1) / 127
    assert ((word(ids) - exact(ids)).abs() <= 0.501 * step[ids][..., None]).all()
    with pytest.raises(IndexError, match=r"ids\[1\] is 97, outside \[0, 97\)"):
        word(torch.tensor([1, 97]))


def test_a_tied_decoder_computes_from_the_rows():
    model = replaced(BertForMaskedLM, embeddings=True)
    word, head = model.bert.embeddings.word, model.mlm_head
    inputs = batch()
    with torch.no_grad():
        hidden = model.bert(**inputs).last_hidden_state
        logits = model(**inputs).logits
        expected = F.linear_int8(head.transform(hidden), word.weight, word.scale, head.bias)
        tokens = inputs["attention_mask"].bool()
        assert torch.equal(logits[tokens], expected[tokens])
        labels = inputs["input_ids"].masked_fill(~tokens, -100)
        loss = model(**inputs, labels=labels).loss
        torch.testing.assert_close(loss, F.cross_entropy(logits[tokens], labels[tokens]))
        assert model(**inputs, labels=torch.full_like(labels, -100)).loss == 0.0
    exact = results(made(BertForMaskedLM))[0][tokens]
    assert torch.nn.functional.cosine_similarity(logits[tokens], exact, -1).min() > 0.999


def test_an_untied_decoder_stays():
    model = replaced(BertForMaskedLM, embeddings=True, tie_word_embeddings=False)
    assert model.mlm_head.decoder.weight.dtype == torch.float32
    exact = results(made(BertForMaskedLM, tie_word_embeddings=False))[0]
    found = results(model)[0]
    assert torch.nn.functional.cosine_similarity(found.flatten(), exact.flatten(), 0) > 0.999


def test_training_is_refused():
    model = replaced()
    with pytest.raises(RuntimeError, match=r"int8, which can't be trained: call eval\(\)"):
        model.train()(**batch())
    layer = replaced(embeddings=True).train().embeddings
    with pytest.raises(RuntimeError, match="int8, which can't be trained"):
        layer(torch.tensor([1]), torch.tensor([0]))


def test_other_bits_of_an_int8_model():
    model = replaced(bits=12)
    twelve = results(model)
    assert_same(results(fastbert.quantize(model, 8)), results(replaced(bits=8)))
    assert model.config.int8_bits == 8
    assert_same(results(fastbert.quantize(model)), twelve)


def test_another_model_keeps_its_configuration():
    config = BertConfig(**SIZES)
    one, other = BertForMaskedLM(config), BertModel(config)
    fastbert.quantize(one, replace=True)
    assert one.config.int8_bits == one.bert.config.int8_bits == 12
    assert other.config.int8_bits is None


class Adapter(torch.nn.Linear):
    pass


@torch.no_grad()
def test_a_batch_without_tokens():
    """The layers run one by one: the native call takes no empty batch."""
    model = fastbert.quantize(made(), replace=True)
    output = model(input_ids=torch.zeros(0, 8, dtype=torch.long))
    assert output.last_hidden_state.shape == (0, 8, SIZES["hidden_size"])


@pytest.mark.parametrize("bits", [12.0, [12], "12", True])
def test_bits_that_are_no_whole_number_are_refused(bits):
    model = made()
    with pytest.raises(ValueError, match="pass 12 or 8"):
        fastbert.quantize(model, bits, replace=True)
    assert model.config.int8_bits is None
    x, scale = torch.randn(2, 4), torch.ones(3)
    with pytest.raises(ValueError, match="choose 12 or 8"):
        F.linear_int8(x, torch.ones(3, 4, dtype=torch.int8), scale, None, bits)


@torch.no_grad()
def test_a_repeated_column_outside_the_weight_is_refused():
    made_int8 = int8.Int8Linear(8, 4)
    made_int8.hold(
        torch.ones(4, 9, dtype=torch.int8), torch.ones(4), torch.tensor([8], dtype=torch.int32)
    )
    with pytest.raises(ValueError, match=r"a column outside \[0, 8\)"):
        made_int8.packed()


def test_refusals_change_nothing():
    with pytest.raises(ValueError, match="pass replace=True too"):
        fastbert.quantize(made(), embeddings=True)
    with pytest.raises(TypeError, match="Linear has no encoder of fastbert"):
        fastbert.quantize(torch.nn.Linear(2, 2), replace=True)
    with pytest.raises(ValueError, match="weights are int8: call quantize"):
        fastbert.freeze(replaced())
    model = made()
    model.layers[1].attention.out = Adapter(45, 45)
    with pytest.raises(ValueError, match=r"attention\.out of layer 1 is a Adapter"):
        fastbert.quantize(model, replace=True)
    model = made()
    with torch.no_grad():
        model.layers[1].feed_forward.up.weight[7, 2] = float("nan")
    with pytest.raises(ValueError, match=r"feed_forward\.up of layer 1 has a number that is not f"):
        fastbert.quantize(model, replace=True)
    assert fastbert.weight_bytes(model)["int8"] == 0
    model = made()
    model.layers[0].feed_forward.down.register_forward_hook(print)
    with pytest.raises(ValueError, match=r"feed_forward\.down of layer 0 has hooks"):
        fastbert.quantize(model, replace=True)


def test_an_accelerated_model_is_refused():
    transformers = pytest.importorskip("transformers")
    theirs = fastbert.accelerate(transformers.BertModel(transformers.BertConfig(**SIZES)).eval())
    with pytest.raises(TypeError, match=r"load the folder with fastbert\.bert"):
        fastbert.quantize(theirs, replace=True)


def test_a_weight_of_128_is_refused():
    m = int8.Int8Linear(5, 3)
    m.weight[1, 2] = -128
    with pytest.raises(ValueError, match="the int8 weight has the integer -128"):
        m.packed()


def test_packed_weights_are_not_traced():
    model = replaced()
    results(model)
    with pytest.raises(Exception, match=r"call fastbert\.unfreeze\(model\) first"):
        torch.export.export(model, (), batch())
    fastbert.unfreeze(model)
    program = torch.export.export(model, (), batch())
    found = program.module()(**batch()).last_hidden_state
    torch.testing.assert_close(found, results(model)[0], rtol=0, atol=2e-3)


class Made(TorchDispatchMode):
    """The shapes of the floating-point tensors with memory that ops return."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.is_floating_point() and not out.is_meta:
            self.shapes.add(tuple(out.shape))
        return out


def test_loading_makes_no_floating_point_weights(tmp_path):
    model = replaced(BertForMaskedLM, embeddings=True)
    expected = results(model)
    model.save_pretrained(tmp_path)
    weights = {(135, 45), (45, 45), (101, 45), (45, 101), (97, 45)}
    with Made() as seen:
        made(BertForMaskedLM)
    assert weights <= seen.shapes
    with Made() as seen:
        again = BertForMaskedLM.from_pretrained(tmp_path)
    # the head's dense weight is (45, 45) as well
    assert seen.shapes & weights <= {(45, 45)}
    assert_same(results(again), expected)
    assert again.bert.frozen._packs
