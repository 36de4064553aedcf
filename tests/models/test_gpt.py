"""GPT-2 in our own models: against transformers, in files, frozen, and what is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import close, compare
from torch import Tensor, nn

import fastbert
from fastbert import bert
from fastbert.bert import BertConfig, GPTForCausalLM
from fastbert.models.names import TRANSPOSED, hf_keys, names_of

transformers = pytest.importorskip("transformers", minversion="5.0")

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "n_embd": 24,
    "n_layer": 3,
    "n_head": 3,
    "n_inner": 40,
    "n_positions": 24,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
OURS = BertConfig.from_dict({"model_type": "gpt2", **SIZES})


def models(name: str, folder: Path, kind: Any = None, **settings: Any) -> tuple[Any, nn.Module]:
    """Ours, of class `kind`, loaded from what transformers has saved, and transformers' with random weights."""
    config = transformers.GPT2Config(**{**SIZES, **settings})
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    theirs = getattr(transformers, f"GPT2{name}")(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn(p.shape), alpha=0.1)
    theirs.save_pretrained(folder)
    if kind is None:
        kind = GPTForCausalLM if name == "LMHeadModel" else bert.BertModel
    return kind.from_pretrained(folder), theirs


def batch(padding: str = "right") -> dict[str, Tensor]:
    """Three sequences of up to 19 tokens, some of which are not labelled."""
    g = torch.Generator().manual_seed(1)
    lengths = torch.tensor([19, 11, 1] if padding == "right" else [19, 19, 19])
    mask = (torch.arange(19) < lengths[:, None]).long()
    ids = torch.randint(2, 61, (3, 19), generator=g).where(mask == 1, 0)
    chosen = (torch.rand(3, 19, generator=g) < 0.7) & (mask == 1)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.where(chosen, -100)}


def packed(inputs: dict[str, Tensor]) -> dict[str, Any]:
    """The batch without padding."""
    token = inputs["attention_mask"].bool()
    cu_seqlens = nn.functional.pad(token.sum(1).cumsum(0), (1, 0)).int()
    names = ("input_ids", "labels")
    return {n: inputs[n][token] for n in names} | {"cu_seqlens": cu_seqlens, "max_seqlen": 19}


def gradients_agree(ours: nn.Module, theirs: nn.Module, bare: bool) -> None:
    names, state = names_of("gpt2", "GPTForCausalLM"), dict(theirs.named_parameters())
    for key, p in ours.named_parameters():
        (source,) = hf_keys(f"bert.{key}" if bare else key, names)
        found = state[source.removeprefix("transformer.") if bare else source].grad
        turned = source.endswith(TRANSPOSED["gpt2"])
        close(p.grad, found.T if turned else found, f"gradient of {key}")


@pytest.mark.parametrize("form", ["none", "right", "packed"])
@pytest.mark.parametrize("tied", [True, False])
def test_parity_with_transformers(form: str, tied: bool, tmp_path: Path) -> None:
    """Logits, loss, hidden states, attention weights and every gradient."""
    ours, theirs = models("LMHeadModel", tmp_path, tie_word_embeddings=tied)
    inputs = batch("none" if form == "none" else "right")
    mask = inputs["attention_mask"]
    b = theirs(**inputs, output_hidden_states=True, output_attentions=True)
    if form == "packed":
        a = ours(**packed(inputs))
        close(a.logits, b.logits[mask.bool()], "logits")
        close(a.loss, b.loss, "loss")
    else:
        a = ours(**inputs, output_hidden_states=True, output_attentions=True)
        compare(a, b, mask, False)
    a.loss.backward()
    b.loss.backward()
    gradients_agree(ours, theirs, bare=False)


def test_the_encoder_alone_is_gpt2model(tmp_path: Path) -> None:
    ours, theirs = models("Model", tmp_path / "theirs")
    inputs = batch()
    mask = inputs["attention_mask"]
    del inputs["labels"]
    a, b = ours(**inputs).last_hidden_state, theirs(**inputs).last_hidden_state
    close(a[mask.bool()], b[mask.bool()], "hidden states")
    a[mask.bool()].square().sum().backward()
    b[mask.bool()].square().sum().backward()
    gradients_agree(ours, theirs, bare=True)
    ours.save_pretrained(tmp_path / "ours")
    again = transformers.GPT2Model.from_pretrained(tmp_path / "ours")
    found = again.state_dict()
    assert all(torch.equal(found[key], value) for key, value in theirs.state_dict().items())


def test_training_computes_labelled_rows_alone() -> None:
    """The same loss with and without logits, by the caller's rows, and over parts of a batch."""
    torch.manual_seed(0)
    model = GPTForCausalLM(BertConfig(**{**vars(OURS), "hidden_dropout_prob": 0.0}))
    model.config.attention_probs_dropout_prob = 0.0
    for layer in model.bert.layers:
        layer.attention.p = 0.0
    inputs = packed(batch())
    inputs["labels"] = inputs["input_ids"]
    whole = model.eval()(**inputs)
    trained = model.train()(**inputs)
    assert trained.logits is None
    close(trained.loss, whole.loss, "loss")
    bounds = inputs["cu_seqlens"].tolist()
    rows = torch.tensor([i for i in range(bounds[-1]) if i + 1 not in bounds])
    close(model(**inputs, label_rows=rows).loss, whole.loss, "loss by rows")
    count = len(rows)
    parts = model(**inputs, num_items_in_batch=4 * count).loss
    close(parts, whole.loss / 4, "a part of a step's loss")
    ids = torch.tensor([[5]])
    lonely = model(ids, labels=ids).loss
    assert lonely == 0
    lonely.backward()


@pytest.mark.parametrize("tied", [True, False])
def test_files_there_and_back(tied: bool, tmp_path: Path) -> None:
    """What we save loads in transformers with the same weights and settings."""
    ours, theirs = models("LMHeadModel", tmp_path / "theirs", tie_word_embeddings=tied)
    ours.save_pretrained(tmp_path / "ours")
    kept = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert kept["architectures"] == ["GPT2LMHeadModel"]
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours")
    expected, found = theirs.state_dict(), again.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    before, after = theirs.config.to_dict(), again.config.to_dict()
    assert {k for k in before if before[k] != after.get(k)} <= {"_name_or_path"}


def test_a_published_folder(tmp_path: Path) -> None:
    """The files of the first GPT-2: no prefix, masks among the weights, n_ctx, an n_inner that is null."""
    _, theirs = models("LMHeadModel", tmp_path, n_inner=None)
    state = {k.removeprefix("transformer."): v for k, v in theirs.state_dict().items()}
    del state["lm_head.weight"]
    for i in range(3):
        state[f"h.{i}.attn.bias"] = torch.ones(1, 1, 24, 24).tril()
        state[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"n_ctx": 24, "n_inner": None}))
    ours = GPTForCausalLM.from_pretrained(tmp_path)
    assert ours.config.intermediate_size == 96
    inputs = batch("none")
    close(ours(**inputs).logits, theirs(**inputs).logits, "logits")


def test_frozen_and_quantised(tmp_path: Path, caplog: Any) -> None:
    """The native call masks later tokens too; int8 weights are saved and loaded."""
    if fastbert.backend.cpu.unavailable is not None:
        pytest.skip(fastbert.backend.cpu.unavailable)
    model, _ = models("LMHeadModel", tmp_path / "theirs")
    inputs = batch()
    del inputs["labels"]
    with torch.no_grad(), caplog.at_level(logging.INFO, "fastbert"):
        expected = model(**inputs).logits
        close(fastbert.freeze(model)(**inputs).logits, expected, "logits of the frozen model")
        integers = fastbert.quantize(model)(**inputs).logits
        replaced = fastbert.quantize(model, replace=True)(**inputs).logits
        assert torch.equal(integers, replaced)
        model.save_pretrained(tmp_path / "int8")
        again = GPTForCausalLM.from_pretrained(tmp_path / "int8")
        assert torch.equal(fastbert.quantize(again)(**inputs).logits, integers)
    assert not any("one by one" in r.message or "floating" in r.message for r in caplog.records)
    assert (integers - expected).abs().max() < 0.05 * expected.abs().max()


def test_gradient_checkpointing_and_dropout_agree() -> None:
    """Recomputed layers draw the same masks."""
    torch.manual_seed(0)
    model = GPTForCausalLM(OURS).train()
    inputs, gradients = batch(), []
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
        ({"scale_attn_weights": False}, "scale_attn_weights is False: fastbert has True"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn is True"),
        ({"add_cross_attention": True}, "no cross attention"),
        ({"embd_pdrop": 0.0}, "embd_pdrop is 0.0 and resid_pdrop 0.1"),
        ({"activation_function": "swish"}, "hidden_act is 'swish'"),
        ({"n_embd": "wide"}, "hidden_size is 'wide'"),
        ({"pre_norm": False}, "a gpt2 of another form"),
        ({"position_embedding_type": "rotary"}, "a gpt2 of another form"),
        ({"type_vocab_size": 2}, "a gpt2 of another form"),
    ],
)
def test_what_is_not_supported_is_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        BertConfig.from_dict({"model_type": "gpt2", **SIZES, **settings})


def test_classes_of_other_kinds_and_types_are_refused() -> None:
    for kind in (bert.BertForMaskedLM, bert.BertForQuestionAnswering):
        with pytest.raises(ValueError, match="load a gpt2 with GPTForCausalLM"):
            kind(OURS)
    with pytest.raises(ValueError, match="it takes gpt2 alone"):
        GPTForCausalLM(BertConfig())
    ids = torch.ones(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="no token types"):
        GPTForCausalLM(OURS)(ids, token_type_ids=ids)
