"""Under an exporter or tracer our ops, drop-ins and models are plain torch operations on the padded batch."""

from __future__ import annotations

import importlib
import io
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from exporting import MASK, ONNX, OTHER, agree, batch, exported, onnx, traced
from torch import nn
from torch.utils import _pytree

import fastbert
import fastbert.nn as fnn
from fastbert import bert, functional
from fastbert.backend import chooser
from fastbert.integrations.accelerate import is_accelerated
from fastbert.testing import parity

HEADS = [name for name in bert.__all__ if name.startswith("BertFor")]
SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}


def model(name: str = "BertModel", **changes: Any) -> Any:
    """A model of one layer in eval mode, with norms and biases that do something."""
    torch.manual_seed(0)
    m = getattr(bert, name)(bert.BertConfig(**(SIZES | changes))).eval()
    with torch.no_grad():
        for p in m.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return m


# --- our models ---


@pytest.mark.parametrize("name", ["BertModel", *HEADS])
@pytest.mark.parametrize("by", [exported, traced])
def test_models(name, by):
    m = model(name)
    program = by(m, batch(MASK))
    for mask in (MASK, OTHER):
        given = batch(mask)
        agree(program(given), m(**given), mask)


def test_strict_export():
    m, given = model(), batch(OTHER)
    agree(exported(m, batch(MASK), strict=True)(given), m(**given), OTHER)


@ONNX
@pytest.mark.parametrize(
    ("name", "family", "dynamo"),
    [
        ("BertForPreTraining", "bert", False),
        ("BertForMaskedLM", "roberta", False),
        ("BertForMaskedLM", "roberta", True),
    ],
)
def test_onnx(name, family, dynamo, tmp_path):
    m, given = model(name, model_type=family, pad_token_id=1), batch(OTHER)
    run = onnx(m, batch(MASK), tmp_path / "model.onnx", dynamo)
    agree(run(given), m(**given), OTHER)


@pytest.mark.parametrize("family", ["roberta", "distilbert"])
def test_families(family):
    m, given = (
        model("BertForSequenceClassification", model_type=family, pad_token_id=1),
        batch(OTHER),
    )
    for by in (exported, traced):
        agree(by(m, batch(MASK))(given), m(**given), OTHER)


@pytest.mark.parametrize(
    "more",
    [
        {"attention_mask": None},
        {"attention_mask": MASK * torch.tensor([[1], [0], [1]])},  # a sequence without tokens
        {"token_type_ids": MASK, "position_ids": torch.arange(7)[None] + 1},
        {"input_ids": None, "inputs_embeds": torch.ones(3, 7, 32)},
        {"output_hidden_states": True, "output_attentions": True},
    ],
    ids=["no-mask", "empty", "types", "embeddings", "states"],
)
def test_arguments(more):
    m = model()
    given = {name: t for name, t in (batch(MASK) | more).items() if t is not None}
    found, wanted = torch.export.export(m, (), given).module()(**given), m(**given)
    assert type(found) is type(wanted)
    assert found.keys() == wanted.keys()
    for a, b in zip(_pytree.tree_leaves(found), _pytree.tree_leaves(wanted), strict=True):
        # zeros at padding, too
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_packed_tokens():
    m = model()
    given = {
        "input_ids": torch.randint(3, 99, (11,)),
        "cu_seqlens": torch.tensor([0, 4, 9], dtype=torch.int32),
    }
    program = torch.export.export(m, (), given | {"max_seqlen": 5})
    assert "fastbert" not in program.graph_module.code
    agree(
        program.module()(**given, max_seqlen=5).to_tuple(),
        m(**given, max_seqlen=5),
        torch.ones(1, 1),
    )


@pytest.mark.parametrize("train", [False, True])
def test_losses(train):
    """Labels at padding don't count, and label_rows need not be the numbers of the padded batch's rows."""
    m = model("BertForPreTraining", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    m.train(train)
    labels = torch.where(torch.arange(21).view(3, 7) % 3 == 0, 7, -100)
    given = batch(MASK) | {"labels": labels, "next_sentence_label": torch.tensor([0, 1, 0])}
    rows = {"label_rows": (labels[MASK == 1] != -100).nonzero().squeeze(1)}
    for arguments in (given, given | rows):
        program = torch.export.export(m, (), arguments)
        wanted, found = m(**arguments), program.module()(**arguments)
        torch.testing.assert_close(found.loss, wanted.loss)
        assert found.keys() == wanted.keys()


def test_training_with_dropout():
    m = model("BertForMaskedLM").train()
    given = batch(MASK) | {"labels": torch.full_like(MASK, 5)}
    program = torch.export.export(m, (), given)
    named = {str(node.target) for node in program.graph.nodes}
    assert "aten.dropout.default" in named
    assert not any("randint" in name or "xor" in name for name in named)
    program.module()(**given).loss.backward()


def test_frozen_model_is_traced_from_its_parameters():
    m, given = model(), batch(OTHER)
    with torch.no_grad():
        fastbert.freeze(m)(**batch(MASK))
        program = traced(m, batch(MASK))
        wanted = m(**given)
        agree(program(given), wanted, OTHER)


def test_traced_models_return_tuples_to_the_outside_only():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = model()

        def forward(self, ids, mask):
            states = self.encoder(ids, mask).last_hidden_state
            return (states * mask[..., None]).sum(1)

    m, given = Pooled(), batch(OTHER)
    program = torch.jit.trace(m, tuple(batch(MASK).values()))
    torch.testing.assert_close(program(*given.values()), m(*given.values()), atol=1e-5, rtol=1e-5)

    # a class of the user's own, whose forward reads the output
    class Twice(bert.BertModel):
        def forward(self, ids, mask):
            return 2 * super().forward(ids, mask).last_hidden_state

    m = Twice(model().config).eval()
    program = torch.jit.trace(m, tuple(batch(MASK).values()))
    agree([program(*given.values())], [m(*given.values())], given["attention_mask"])


def test_wrong_inputs_are_refused_with_numbers():
    given = {"input_ids": torch.ones(2, 5, dtype=torch.int64), "attention_mask": torch.ones(2, 3)}
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 3\).*\(2, 5\)"):
        traced(model(), given)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 3\).*\(2, 5\)"):
        torch.export.export(model(), (), given)


def test_what_cannot_be_exported_says_so():
    for m in (model(), model("BertForMaskedLM"), fnn.FeedForward(4, 8), nn.Sequential(model())):
        with pytest.raises(
            NotImplementedError, match=r"torch\.jit.script cannot compile .*torch\.export"
        ):
            torch.jit.script(m)
    with pytest.raises(
        NotImplementedError, match=r"torch\.fx cannot look into BertModel.*torch\.export"
    ):
        torch.fx.symbolic_trace(model())


def test_fx_records_a_call_of_a_model():
    class Caller(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = model()

        def forward(self, ids, mask):
            return self.encoder(ids, attention_mask=mask).last_hidden_state + 1

    m, given = Caller(), tuple(batch(MASK).values())
    program = torch.fx.symbolic_trace(m)
    assert "encoder" in [node.target for node in program.graph.nodes if node.op == "call_module"]
    assert torch.equal(program(*given), m(*given))


def test_output_is_a_pytree():
    output = model("BertForSequenceClassification")(**batch(MASK), output_hidden_states=True)
    leaves, spec = _pytree.tree_flatten(output)
    assert len(leaves) == 3  # logits, and the states before and after the layer
    again = _pytree.tree_unflatten(leaves, spec)
    assert type(again) is type(output)
    assert again.keys() == output.keys()
    program, file = torch.export.export(model(), (), batch(MASK)), io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    assert type(torch.export.load(file).module()(**batch(MASK))) is type(model()(**batch(MASK)))


# --- ops ---


@pytest.mark.parametrize("slug", chooser.SLUGS)
def test_ops(slug):
    """Each sample without dropout by torch.jit.trace: plain operations, the value of the reference."""
    op = getattr(functional, slug)
    reference = importlib.import_module(f"fastbert.backend.reference.{slug}").eager
    for sample in parity.samples(slug, torch.float32):
        tensors = {k: t for k, t in sample.kwargs.items() if isinstance(t, torch.Tensor)}
        rest = {k: v for k, v in sample.kwargs.items() if k not in tensors}
        some = [t for t in tensors.values() if t.numel() == 0 or t.isnan().any()]
        if some or rest.get("p") or sum(t.numel() for t in tensors.values()) > 20_000:
            continue

        def call(*values, names=tuple(tensors), rest=rest):
            return op(**dict(zip(names, values, strict=True)), **rest)

        program = torch.jit.trace(call, tuple(tensors.values()), check_trace=False)
        assert "fastbert" not in str(program.graph).replace("/fastbert/", "")
        found, wanted = program(*tensors.values()), reference(**sample.kwargs)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5, equal_nan=True)


def test_fx_records_a_call_of_an_op():
    program = torch.fx.symbolic_trace(lambda x: functional.bias_gelu(x) + 1)
    assert functional.bias_gelu in [node.target for node in program.graph.nodes]
    x = torch.randn(3, 5)
    torch.testing.assert_close(program(x), nn.functional.gelu(x) + 1)


# --- drop-ins ---


class Attention(nn.Module):
    """Self-attention that returns a tensor."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Loss(nn.Module):
    """A classifier's loss."""

    def __init__(self):
        super().__init__()
        self.project, self.loss = nn.Linear(16, 4), nn.CrossEntropyLoss()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.loss(self.project(x).flatten(0, 1), torch.zeros(21, dtype=torch.int64))


class Translator(nn.Module):
    """An encoder and a decoder."""

    def __init__(self):
        super().__init__()
        self.both = nn.Transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.both(x, x)


def _layer() -> nn.Module:
    return nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)


NETS = {
    "norm": lambda: nn.Sequential(
        nn.LayerNorm((7, 16)), nn.LayerNorm(16, bias=False), nn.RMSNorm(16), nn.GELU("tanh")
    ),
    "attention": Attention,
    "layer": lambda: nn.Sequential(_layer()),
    "encoder": lambda: nn.Sequential(nn.TransformerEncoder(_layer(), 2)),
    "loss": Loss,
    "translator": Translator,
}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("net", NETS)
def test_drop_ins(net, train, grad):
    m, x = NETS[net]().train(train), torch.randn(3, 7, 16)
    # torch's own check of a traced module fails where it takes torch's fast path without gradients only
    trace = partial(torch.jit.trace, example_inputs=(x,), check_trace=train or not grad)
    with torch.set_grad_enabled(grad):
        wanted = m(x)
        fastbert.accelerate(m)
        for program in (
            torch.jit.script(m),
            trace(m),
            torch.export.export(m, (x,)).module(),
            torch.fx.symbolic_trace(m),
        ):
            torch.testing.assert_close(program(x), wanted, atol=1e-5, rtol=1e-5)
            assert is_accelerated(m)
        graph = str(torch.export.export(m, (x,)).graph) + str(trace(m).inlined_graph)
        assert "fastbert::" not in graph
        assert "torch.ops.fastbert" not in graph
        assert "^" not in graph


def test_fx_treats_drop_ins_as_modules_of_torch():
    def targets(m, tracer=torch.fx.Tracer):
        return [node.target for node in tracer().trace(m).nodes if node.op.startswith("call")]

    m = nn.Sequential(fnn.LayerNorm(16), fnn.GELU(), fnn.Linear(16, 4))
    assert targets(m) == ["0", "1", "2"]
    pickle.loads(pickle.dumps(torch.fx.symbolic_trace(m)))

    class Tracer(torch.fx.Tracer):
        """Looks into norms."""

        def is_leaf_module(self, m, name):
            return isinstance(m, (nn.GELU, nn.Linear))

    assert targets(m, Tracer) == [nn.functional.layer_norm, "1", "2"]
    assert targets(fnn.LayerNorm(16)) == [nn.functional.layer_norm]
    assert targets(fnn.RMSNorm(16)) == [nn.functional.rms_norm]

    class Shifted(fnn.LayerNorm):
        """A class of the user's own, which torch.fx looks into."""

        def forward(self, x):
            return super().forward(x) + 1

    assert targets(nn.Sequential(Shifted(16)))[0] is nn.functional.layer_norm
