"""ModernBERT's form in our own models: against transformers, in files, frozen, and mixed with BERT's form."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import close, compare, scalar_loss
from torch import Tensor, nn

import fastbert
from fastbert import bert
from fastbert.bert import BertConfig, BertForMaskedLM, BertForPreTraining
from fastbert.models.names import hf_keys, names_of

transformers = pytest.importorskip("transformers", minversion="5.0")

NAMES = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification")
NAMES = (*NAMES, "ForQuestionAnswering")
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 24,
    "pad_token_id": 0,
    "local_attention": 6,
    "global_attn_every_n_layers": 3,
}
SPECIAL = {f"{name}_token_id": 1 for name in ("bos", "eos", "cls", "sep")}


def models(name: str, folder: Path, **settings: Any) -> tuple[nn.Module, nn.Module]:
    """Ours, loaded from what transformers has saved, and transformers' with random weights."""
    labels = 2 if name == "ForQuestionAnswering" else 3
    config = transformers.ModernBertConfig(**{**SIZES, **SPECIAL, "num_labels": labels, **settings})
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    theirs = getattr(transformers, f"ModernBert{name}")(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn(p.shape), alpha=0.1)
    theirs.save_pretrained(folder)
    return getattr(bert, f"Bert{name}").from_pretrained(folder), theirs


def batch(name: str, padding: str) -> dict[str, Tensor]:
    """Three sequences of up to 19 tokens, with targets for the class."""
    g = torch.Generator().manual_seed(1)
    lengths = torch.tensor([19, 11, 1] if padding == "right" else [19, 19, 19])
    mask = (torch.arange(19) < lengths[:, None]).long()
    if padding == "left":
        mask[1, :8] = mask[2, :18] = 0
    ids = torch.randint(2, 61, (3, 19), generator=g).where(mask == 1, 0)
    values = {"input_ids": ids, "attention_mask": mask}
    if name in ("ForMaskedLM", "ForTokenClassification"):
        chosen = (torch.rand(3, 19, generator=g) < 0.5) & (mask == 1)
        values["labels"] = torch.randint(0, 3, (3, 19), generator=g).where(chosen, -100)
    if name == "ForSequenceClassification":
        values["labels"] = torch.randint(0, 3, (3,), generator=g)
    if name == "ForQuestionAnswering" and padding == "none":
        values["start_positions"] = values["end_positions"] = torch.tensor([2, 0, 18])
    return values


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("name", NAMES)
def test_parity_with_transformers(name: str, padding: str, tmp_path: Path) -> None:
    """Outputs, hidden states, attention weights and every gradient, of layers that are local and that are not."""
    mean = {"classifier_pooling": "mean"} if padding == "right" else {}
    biases = ("norm_bias", "attention_bias", "mlp_bias", "classifier_bias")
    extra = dict.fromkeys(biases, padding == "right")
    ours, theirs = models(name, tmp_path, **mean, **extra)
    inputs = batch(name, padding)
    mask = inputs["attention_mask"]
    wanted = {"output_hidden_states": True, "output_attentions": True}
    a, b = ours(**inputs, **wanted), theirs(**inputs, **wanted)
    # transformers pools the first column, which is padding here
    tokens_only = padding == "left" and name == "ForSequenceClassification"
    compare(a, b, mask, tokens_only)
    if tokens_only or (name == "ForQuestionAnswering" and padding != "none"):
        return
    scalar_loss(a, mask).backward()
    scalar_loss(b, mask).backward()
    names = names_of("modernbert", f"Bert{name}")
    state = dict(theirs.named_parameters())
    for key, p in ours.named_parameters():
        whole = key if name != "Model" else f"bert.{key}"
        (source,) = hf_keys(whole, names)
        found = state[source.removeprefix("model.") if name == "Model" else source].grad
        if key == "classifier.bias" and name == "ForQuestionAnswering":
            # a shift of all positions' scores does not change a softmax over positions
            assert found.abs().max() < 1e-6
            assert p.grad.abs().max() < 1e-6
        else:
            close(p.grad, found, f"gradient of {key}")


@pytest.mark.parametrize("name", NAMES)
def test_files_there_and_back(name: str, tmp_path: Path) -> None:
    """What we save loads in transformers with the same weights and settings."""
    ours, theirs = models(name, tmp_path / "theirs", classifier_pooling="mean")
    ours.save_pretrained(tmp_path / "ours")
    again = getattr(transformers, f"ModernBert{name}").from_pretrained(tmp_path / "ours")
    expected, found = theirs.state_dict(), again.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    before, after = theirs.config.to_dict(), again.config.to_dict()
    assert {k for k in before if before[k] != after.get(k)} <= {"_name_or_path"}


def test_packed_batches_and_padded_ones_agree() -> None:
    torch.manual_seed(0)
    model = bert.BertModel(BertConfig(**SIZES, model_type="modernbert")).eval()
    inputs = batch("Model", "right")
    padded = model(**inputs).last_hidden_state
    lengths = inputs["attention_mask"].sum(1)
    cu_seqlens = nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    token = inputs["attention_mask"].bool()
    packed = model(inputs["input_ids"][token], cu_seqlens=cu_seqlens, max_seqlen=19)
    assert torch.equal(packed.last_hidden_state, padded[token])


@pytest.mark.parametrize("form", [{}, {"biases": True}, {"gated": False}, {"pre_norm": False}])
def test_frozen_and_quantised(form: dict[str, Any], tmp_path: Path, caplog: Any) -> None:
    """freeze and quantize serve every form in the native call; int8 weights are saved and loaded."""
    if fastbert.backend.cpu.unavailable is not None:
        pytest.skip(fastbert.backend.cpu.unavailable)
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(**SIZES, **form, model_type="modernbert")).eval()
    inputs = batch("Model", "right")
    with torch.no_grad(), caplog.at_level(logging.INFO, "fastbert"):
        expected = model(**inputs).logits
        close(fastbert.freeze(model)(**inputs).logits, expected, "logits of the frozen model")
        integers = fastbert.quantize(model)(**inputs).logits
        replaced = fastbert.quantize(model, replace=True)(**inputs).logits
        assert torch.equal(integers, replaced)
        model.save_pretrained(tmp_path)
        again = BertForMaskedLM.from_pretrained(tmp_path)
        assert torch.equal(fastbert.quantize(again)(**inputs).logits, integers)
    assert not any("one by one" in r.message or "floating" in r.message for r in caplog.records)
    assert (integers - expected).abs().max() < 0.02 * expected.abs().max()


MIXED: list[dict[str, Any]] = [
    {"model_type": "bert", "pre_norm": True},
    {"model_type": "bert", "gated": True, "position_embedding_type": "rotary"},
    {"model_type": "roberta", "biases": False, "pad_token_id": 1, "local_attention": 4},
    {"model_type": "modernbert", "pre_norm": False, "local_attention": 6},
    {"model_type": "modernbert", "gated": False, "position_embedding_type": "absolute"},
    {"model_type": "modernbert", "add_pooler": True, "type_vocab_size": 2},
]


@pytest.mark.parametrize("form", MIXED, ids=lambda form: "-".join(map(str, form)))
def test_mixed_forms(form: dict[str, Any], tmp_path: Path) -> None:
    """A form that no family has: its own files, refused by transformers, with the same outputs; it can be trained."""
    torch.manual_seed(0)
    config = BertConfig(**{**SIZES, "local_attention": None, **form})
    assert config.is_mixed
    pooled = config.model_type == "bert" or bool(config.add_pooler)
    kind = BertForPreTraining if pooled and config.type_vocab_size == 2 else BertForMaskedLM
    model = kind(config).eval()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"].startswith("fastbert-")
    with pytest.raises(ValueError, match="fastbert-"):
        transformers.AutoModel.from_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path)
    different = {"id2label", "label2id", "extra"}
    before, after = vars(model.config), vars(again.config)
    assert {name for name in before if before[name] != after[name]} <= different
    inputs = batch("ForMaskedLM", "right")
    first, second = model(**inputs), again(**inputs)
    assert torch.equal(first.loss, second.loss)
    model.train()(**inputs).loss.backward()
    trained = [name for name, p in model.named_parameters() if p.grad is None]
    assert all("pooler" in name or "nsp" in name for name in trained)


def test_gradient_checkpointing_and_dropout_agree() -> None:
    """Recomputed layers draw the same masks and turn by the same angles."""
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(**SIZES, model_type="modernbert")).train()
    inputs, gradients = batch("ForMaskedLM", "right"), []
    for recompute in (False, True):
        if recompute:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(5)
        model(**inputs).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"norm_bias": True}, "all or none"),
        ({"decoder_bias": False}, "all or none"),
        ({"classifier_activation": "silu"}, "classifier_activation is 'silu'"),
        ({"hidden_activation": "relu"}, "a gate takes a GELU"),
        ({"layer_types": ["sliding_attention"] * 4}, "full_attention"),
        ({"layer_types": ["full_attention", "linear"]}, "layer_types are"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "rope_type is 'dynamic'"),
        ({"classifier_pooling": "max"}, "choose cls or mean"),
        ({"rope_scaling": {"type": "dynamic"}}, "rope_type is 'dynamic'"),
        ({"rope_scaling": "dynamic"}, "must be JSON objects"),
        ({"rope_parameters": [1]}, "must be JSON objects"),
        ({"global_rope_theta": "many"}, "rope_theta is 'many': it must be a number"),
        ({"layer_types": 3}, "layer_types are 3"),
        ({"layer_types": ["full_attention"]}, "lists 1 layers and num_hidden_layers is 4"),
        ({"local_attention": -2}, "local_attention is -2"),
        ({"local_attention": 1}, "local_attention is 1"),
        ({"global_attn_every_n_layers": 0}, "at least 0 and 1"),
        ({"global_rope_theta": 0.0}, "must be above 0"),
        ({"hidden_size": 21}, "rotary positions turn pairs"),
    ],
)
def test_what_is_not_supported_is_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        BertConfig.from_dict({"model_type": "modernbert", **SIZES, **settings})


def test_a_published_config() -> None:
    """ModernBERT-base's config.json has keys of version 4, and two that mean nothing."""
    values = {
        "model_type": "modernbert",
        "classifier_pooling": "mean",
        "local_attention": 128,
        "global_attn_every_n_layers": 3,
        "global_rope_theta": 160000.0,
        "norm_eps": 1e-5,
        "local_rope_theta": 10000.0,
        "norm_bias": False,
        "position_embedding_type": "absolute",
        "layer_norm_eps": 1e-6,
        "decoder_bias": True,
        "deterministic_flash_attn": False,
    }
    config = BertConfig.from_dict(values)
    assert (config.num_hidden_layers, config.vocab_size, config.intermediate_size) == (
        22,
        50368,
        1152,
    )
    assert (config.rotary, config.is_mixed, config.layer_norm_eps) == (True, False, 1e-5)
    assert config.windows[:4] == [None, (64, 64), (64, 64), None]
    assert (config.rope_theta, config.local_rope_theta) == (160000.0, 10000.0)
    again = BertConfig.from_dict(config.to_dict())
    assert (again.windows, again.classifier_pooling) == (config.windows, "mean")


def test_a_mixed_form_of_an_alias_keeps_its_name() -> None:
    values = BertConfig(model_type="xlm-roberta", pre_norm=True).to_dict()
    assert values["model_type"] == "fastbert-xlm-roberta"
    again = BertConfig.from_dict(values)
    assert (again.model_type, again.pre_norm) == ("roberta", True)


def test_position_ids_are_refused() -> None:
    model = bert.BertModel(BertConfig(**SIZES, model_type="modernbert"))
    ids = torch.ones(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="rotary positions, which count the tokens"):
        model(ids, position_ids=ids)
    with pytest.raises(ValueError, match="set add_pooler to true"):
        BertForPreTraining(model.config)
    with pytest.raises(ValueError, match="set model_type to bert"):
        BertConfig(model_type="distilbert", pre_norm=True)


def test_prune_refuses_the_form() -> None:
    model = BertForMaskedLM(BertConfig(**SIZES, model_type="modernbert"))
    with pytest.raises(ValueError, match="takes those of BERT's own form"):
        fastbert.prune(model, [dict(batch("ForMaskedLM", "right"))], speedup=1.5)
