"""The configuration, fresh weights, the output object, and every refusal with its sentence."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import torch
import transformers
from pairs import SIZES, batch, build

from fastbert import bert, nn
from fastbert.bert import BertConfig

LAYER = ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size")

# --- configuration, fresh weights, outputs ---


def test_fresh_weights() -> None:
    """normal(0, initializer_range), zero biases and padding row, one copy of the tied decoder."""
    torch.manual_seed(0)
    model = bert.BertForPreTraining(
        BertConfig(**{**SIZES, "hidden_size": 96, "intermediate_size": 128})
    )
    state = model.state_dict()
    for key, value in state.items():
        if "norm" in key or key.endswith("bias"):
            assert value.eq(1.0 if "norm.weight" in key else 0.0).all(), key
        else:
            assert abs(float(value.std()) - 0.02) < 0.003, key
    assert state["bert.embeddings.word.weight"][0].eq(0).all()
    assert not any(k.startswith("mlm_head.decoder") for k in state)
    assert sum(v.shape == (61, 96) for v in state.values()) == 1
    named = dict(model.named_parameters())
    swapped = {k: v + 0.01 for k, v in named.items()}
    inputs = batch("bert", "ForPreTraining")
    out = torch.func.functional_call(model.eval(), swapped, (), inputs)
    assert out.loss != model(**inputs).loss


def test_sinusoidal_positions_are_fixed_and_saved() -> None:
    settings = {**SIZES, "position_embedding_type": "sinusoidal"}
    model = bert.BertModel(BertConfig(**settings))
    table = model.embeddings.position.weight
    assert not table.requires_grad
    assert torch.equal(table, nn.sinusoidal_positions(24, 24))
    theirs = torch.empty(24, 24)
    from transformers.models.distilbert.modeling_distilbert import create_sinusoidal_embeddings

    torch.testing.assert_close(table.data, create_sinusoidal_embeddings(24, 24, theirs))
    assert "embeddings.position.weight" in model.state_dict()


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "DistilBert"])
def test_config_round_trip(kind: str) -> None:
    """A configuration of transformers is read; transformers reads the same one from our file."""
    settings = {"vocab_size": 99, "num_labels": 4, "problem_type": "regression"}
    theirs = getattr(transformers, f"{kind}Config")(**settings, summary_type="mean")
    ours = BertConfig.from_dict(theirs.to_dict())
    assert ours.extra["summary_type"] == "mean"
    assert ours.num_labels == 4
    again = type(theirs)(**ours.to_dict())
    assert again.to_dict() == theirs.to_dict()
    assert BertConfig.from_dict(ours.to_dict()) == ours


def test_config_of_relatives_and_files(tmp_path: Any) -> None:
    config = BertConfig.from_dict({"model_type": "xlm-roberta", "vocab_size": 50})
    assert config.model_type == "roberta"
    assert config.to_dict()["model_type"] == "xlm-roberta"
    (tmp_path / "config.json").write_text('{"model_type": "distilbert", "dim": 96, "n_heads": 12}')
    assert BertConfig.from_file(tmp_path).hidden_size == 96
    with pytest.raises(FileNotFoundError, match="there is no configuration"):
        BertConfig.from_file(tmp_path / "nowhere.json")
    for text in ("{", "[1]", '{"hidden_size": "wide"}', '{"model_type": "t5"}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config\.json"):
            BertConfig.from_file(tmp_path)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"hidden_size": 100}, "hidden_size 100 is not divisible"),
        ({"hidden_size": 780, "num_attention_heads": 6}, "head size is 130"),
        ({"hidden_act": "swish"}, "hidden_act is 'swish'"),
        ({"hidden_dropout_prob": -0.1}, "hidden_dropout_prob is -0.1"),
        ({"classifier_dropout": 1.0}, "classifier_dropout is 1.0"),
        ({"position_embedding_type": "relative_key"}, "relative positions are not supported"),
        ({"extra": {"is_decoder": True}}, "is_decoder is set"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"pad_token_id": 30522}, "pad_token_id is 30522"),
        ({"model_type": "t5"}, "model_type is 't5'"),
        ({"problem_type": "ranking"}, "problem_type is 'ranking'"),
        ({"model_type": "roberta", "max_position_embeddings": 2}, "positions start at"),
    ],
)
def test_config_refuses(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        BertConfig(**settings)


def test_output_by_name_index_and_iteration() -> None:
    out = build("bert", "ForPreTraining")[0](**batch("bert", "ForPreTraining"))
    assert out[0] is out.loss is out["loss"]
    assert out[1] is out.seq_relationship_logits
    assert [x is y for x, y in zip(out, out.to_tuple(), strict=True)] == [True] * len(out)
    assert "prediction_logits" not in out
    with pytest.raises(KeyError, match="was not computed"):
        out["hidden_states"]


IDS = torch.ones(2, 5, dtype=torch.int64)
CU = torch.tensor([0, 4, 10], dtype=torch.int32)


@pytest.mark.parametrize(
    ("error", "sentence", "inputs"),
    [
        (ValueError, "pass one of input_ids and inputs_embeds", {}),
        (ValueError, "pass one of", {"input_ids": IDS, "inputs_embeds": torch.ones(2, 5, 24)}),
        (ValueError, "hidden_size 24", {"inputs_embeds": torch.ones(2, 5, 23)}),
        (ValueError, "attention_mask has shape", {"input_ids": IDS, "attention_mask": IDS[:1]}),
        (
            ValueError,
            "2 values that are neither",
            {"attention_mask": IDS + (IDS.cumsum(0) * IDS.cumsum(1) > 6)},
        ),
        (ValueError, "token_type_ids has shape", {"input_ids": IDS, "token_type_ids": IDS[:, :4]}),
        (ValueError, "labels has shape", {"input_ids": IDS, "labels": IDS[0]}),
        (TypeError, "input_ids is torch.float32", {"input_ids": IDS.float()}),
        (
            ValueError,
            "31 tokens long but the model has 24",
            {"input_ids": torch.ones(1, 31).long()},
        ),
        (ValueError, "with cu_seqlens", {"input_ids": IDS[0]}),
        (ValueError, "pass packed tokens", {"input_ids": IDS, "cu_seqlens": CU, "max_seqlen": 6}),
        (TypeError, "max_seqlen is NoneType", {"input_ids": IDS.view(-1), "cu_seqlens": CU}),
        (
            ValueError,
            "int32 running sums",
            {"input_ids": IDS.view(-1), "cu_seqlens": CU.long(), "max_seqlen": 6},
        ),
        (
            ValueError,
            "need no mask",
            {"input_ids": IDS.view(-1), "attention_mask": IDS, "cu_seqlens": CU},
        ),
        (
            ValueError,
            "max_seqlen is 5",
            {"input_ids": IDS.view(-1), "cu_seqlens": CU, "max_seqlen": 5},
        ),
        (IndexError, "belongs to the model", {"input_ids": IDS + 60}),
        (IndexError, "labels", {"input_ids": IDS, "labels": IDS * 61}),
        (TypeError, "unexpected keyword", {"input_ids": IDS, "mask": IDS}),
    ],
)
def test_bad_input_is_refused_with_a_sentence(
    error: type[Exception], sentence: str, inputs: dict[str, Any]
) -> None:
    model = bert.BertForMaskedLM(BertConfig(**SIZES)).train()
    if set(inputs) == {"attention_mask"}:
        inputs = {"input_ids": IDS, **inputs}
    with pytest.raises(error, match=sentence):
        model(**inputs)


def test_wrong_labels_of_classifiers_are_refused() -> None:
    model = bert.BertForSequenceClassification(BertConfig(**SIZES, num_labels=3))
    with pytest.raises(ValueError, match="multi_label_classification takes floating-point labels"):
        model(IDS, labels=torch.ones(2))
    with pytest.raises(IndexError, match="labels"):
        model(IDS, labels=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="needs the pooler"):
        bert.BertForPreTraining(BertConfig(**SIZES, model_type="distilbert"))


@pytest.mark.parametrize("family", ["Bert", "Roberta", "DistilBert", "ModernBert", "GPT2"])
def test_a_wrong_value_of_any_key_of_a_config_is_a_sentence(family: str) -> None:
    """Each key of transformers' file takes wrong values in turn: it is refused, or without meaning for fastbert."""
    distil = {"dim": 32, "n_heads": 2, "n_layers": 2, "hidden_dim": 64}
    sizes = distil if family == "DistilBert" else {k: v for k, v in SIZES.items() if k in LAYER}
    kind = getattr(transformers, f"{family}Config")
    values = kind(**sizes, vocab_size=60, pad_token_id=0).to_dict()
    BertConfig.from_dict(values)
    for key in values:
        for wrong in ([], [1], {}, {"a": 1}, "x", -1, 0.5, float("inf"), True, None):
            with suppress(ValueError):
                BertConfig.from_dict({**values, key: wrong})
