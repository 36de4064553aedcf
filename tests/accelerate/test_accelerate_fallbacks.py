"""Where accelerate() calls transformers' modules instead of its kernels: hooks, replaced and unfused parts."""

import logging

import pytest
import torch
from hf_models import OLD, B, accelerated, at_tokens, batch, build, transformers, without_dropout
from torch import nn

import fastbert
from fastbert.nn import watch


@pytest.fixture
def said(monkeypatch, caplog):
    """The sentences of accelerate() on a model; no earlier test has logged them here."""
    monkeypatch.setattr(watch, "_logged", set())
    caplog.set_level(logging.INFO, logger="fastbert")
    # the first sentence counts the changed modules
    return lambda: [m for r in caplog.records if (m := r.getMessage()).startswith("accelerate: ")][
        1:
    ]


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("bert.encoder.layer.0.output.dense", "layer 0 runs"),
        ("bert.encoder.layer.1.attention.self.query", "layer 1 runs"),
        ("bert.encoder.layer.1.attention.self", "layer 1 runs"),
        ("bert.encoder.layer.1", "layer 1"),
        ("bert.encoder", "encoder"),
        ("bert.embeddings.LayerNorm", "embeddings"),
        ("cls.predictions.transform", "computes all logits"),
        ("bert", None),
        ("bert.pooler", None),
    ],
)
def test_hooks_see_what_transformers_shows(name, word, said):
    head = "ForPreTraining" if name == "bert.pooler" else "ForMaskedLM"
    stock, given = build("Bert", head), batch("Bert", head)
    models, seen = [without_dropout(m) for m in (accelerated(stock), stock)], []
    for m in models:
        m.get_submodule(name).register_forward_hook(lambda m, i, o: seen.append(o))
    x, y = (m(**given).loss for m in models)
    torch.testing.assert_close(x, y)
    ours, theirs = (
        o[0] if isinstance(o, tuple) else getattr(o, "last_hidden_state", o) for o in seen
    )
    torch.testing.assert_close(at_tokens(ours), at_tokens(theirs), atol=3e-6, rtol=1e-5)
    assert not said() if word is None else word in said()[0]


def test_backward_hooks_and_global_hooks():
    model, given, seen = accelerated(build("Bert")), batch("Bert"), []
    handle = model.encoder.layer[0].output.dense.register_full_backward_hook(
        lambda *_: seen.append(1)
    )
    model(**given).last_hidden_state.sum().backward()
    assert seen == [1]
    handle.remove()
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(m))
    try:
        model(**given)
    finally:
        handle.remove()
    assert model.encoder.layer[0].attention.self.key in seen


class Doubled(nn.Linear):
    """A Linear that computes more than its weight and bias."""

    def forward(self, x):
        return 2 * super().forward(x)


def _double(model):
    layer = model.encoder.layer[1].attention.self
    layer.query.__class__ = Doubled


def _parametrize(model):
    class Half(nn.Module):
        def forward(self, weight):
            return weight / 2

    nn.utils.parametrize.register_parametrization(
        model.encoder.layer[0].output.dense, "weight", Half()
    )


def _override(model):
    dense = model.encoder.layer[0].intermediate.dense
    dense.forward = lambda x: nn.functional.linear(x, -dense.weight)


def _activation(model):
    model.encoder.layer[0].intermediate.intermediate_act_fn = nn.SiLU()


def _sequence_mixing(model):
    class Mixed(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.norm = norm

        def forward(self, x):
            return self.norm(x - x[:, :1])

    layer = model.encoder.layer[1]
    layer.output.LayerNorm = Mixed(layer.output.LayerNorm)


class Shifted(nn.Embedding):
    """Word embeddings that mix neighbours."""

    def forward(self, ids):
        return super().forward(ids) + super().forward(ids.roll(1, 1))


def _mixing_embeddings(model):
    model.embeddings.word_embeddings.__class__ = Shifted


def _bare_norm(model):
    model.encoder.layer[0].output.LayerNorm = nn.LayerNorm(32, bias=False)


@pytest.mark.parametrize(
    "change",
    [
        _double,
        _parametrize,
        _override,
        _activation,
        _sequence_mixing,
        _mixing_embeddings,
        _bare_norm,
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_replaced_parts_are_called(change, first):
    """A replaced part is called, whether it was replaced before accelerate() or after."""
    stock, ours = build("Bert"), build("Bert")
    given = batch("Bert")
    plain = stock(**given).last_hidden_state
    change(stock)
    if first:
        change(ours)
    fastbert.accelerate(ours)
    if not first:
        change(ours)
    x, y = stock(**given).last_hidden_state, ours(**given).last_hidden_state
    assert not torch.allclose(at_tokens(plain), at_tokens(x))
    torch.testing.assert_close(at_tokens(x), at_tokens(y), atol=1e-5, rtol=1e-5)


class MeanHead(nn.Module):
    """A head that reads all columns; RoBERTa's own reads the first."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(32, 3)

    def forward(self, x):
        return self.out(x.mean(1))


class Mixing(nn.Module):
    """A masked-LM transform that mixes tokens."""

    def forward(self, x):
        return x - x[..., :1, :]


def test_heads_that_read_more_get_more():
    """The last layer leaves out rows only for heads of transformers."""
    torch.manual_seed(0)
    stock, given = build("Roberta", "ForSequenceClassification"), batch("Roberta")
    stock.classifier = MeanHead()
    given = {"input_ids": given["input_ids"].clamp(min=5)}
    torch.testing.assert_close(stock(**given).logits, accelerated(stock)(**given).logits)
    stock, given = build("Bert", "ForMaskedLM"), batch("Bert", "ForMaskedLM")
    given = given | {
        "attention_mask": None,
        "labels": given["labels"].where(torch.arange(B)[:, None] < 1, 3),
    }
    stock.cls.predictions.transform = Mixing()
    losses = [without_dropout(m)(**given).loss for m in (stock, accelerated(stock))]
    torch.testing.assert_close(*losses)
    stock, seen = build("Bert", "ForSequenceClassification"), []
    given = batch("Bert", "ForSequenceClassification")
    for m in (stock, accelerated(stock)):
        m.bert.pooler.register_forward_pre_hook(lambda m, i: seen.append(i[0]))
        m(**given)
    torch.testing.assert_close(at_tokens(seen[0]), at_tokens(seen[1]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "changes", "options", "word"),
    [
        (
            "Bert",
            {"attn_implementation": "eager"},
            {"output_attentions": True},
            "output_attentions",
        ),
        ("Bert", {"is_decoder": True}, {}, "is_decoder"),
        ("Bert", {"hidden_act": "silu"}, {}, "SiLU"),
        ("Bert", {"hidden_act": "gelu_new"}, {}, None),
        ("DistilBert", {"activation": "relu"}, {}, "ReLU"),
        ("Bert", {"chunk_size_feed_forward": 11}, {}, None),
        # transformers 4's attention has a rate of its own besides its Dropout's
        ("Bert", {"attention_probs_dropout_prob": 1.0}, {}, "dropout_prob" if OLD else "Dropout"),
        ("Bert", {}, {"is_causal": True}, "is_causal"),
        ("Bert", {}, {"cu_seq_lens_q": torch.tensor([0, 5])}, "cu_seq_lens_q"),
    ],
)
def test_what_is_not_fused_is_transformers_own(family, changes, options, word, said):
    if OLD and {"is_causal", "cu_seq_lens_q"} & options.keys():
        pytest.skip("transformers 4 refuses the argument")
    stock, given = build(family, **changes), batch(family)
    # where no gradient is recorded, attention weights are rebuilt: test_attention_maps.py
    with torch.set_grad_enabled("output_attentions" in options):
        outputs = [m(**given, **options) for m in (stock, accelerated(stock))]
    torch.testing.assert_close(
        *(at_tokens(o.last_hidden_state) for o in outputs), atol=1e-5, rtol=1e-5
    )
    if "output_attentions" in options:
        torch.testing.assert_close(outputs[0].attentions, outputs[1].attentions)
    assert len(said()) == (word is not None)
    assert word is None or word in said()[0]


def test_as_an_encoder_of_encoder_decoder():
    encoder, decoder = (
        build("Bert"),
        build("Bert", "LMHeadModel", is_decoder=True, add_cross_attention=True),
    )
    stock = transformers.EncoderDecoderModel(encoder=encoder, decoder=decoder).eval()
    given = batch("Bert") | {"decoder_input_ids": torch.randint(5, 99, (B, 4))}
    with torch.no_grad():
        torch.testing.assert_close(*(m(**given).logits for m in (stock, accelerated(stock))))


@pytest.mark.parametrize("head", ["ForQuestionAnswering", "ForTokenClassification"])
def test_exported_heads_are_transformers_own(head):
    """Also without restore(): in a graph no head reads values of the mask or the labels."""
    stock, given = build("Bert", head), batch("Bert", head)
    wanted = stock(**given)
    program = torch.export.export(accelerated(stock), (), given, strict=False)
    found = program.module()(**given)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name])
