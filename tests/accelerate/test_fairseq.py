"""The converter of fairseq's RoBERTa, on a small model in that format and on files of other kinds."""

from __future__ import annotations

import argparse
import os

import pytest
import torch
import transformers
from pairs import SIZES

from fastbert import bert
from fastbert.bert import BertConfig
from fastbert.integrations.fairseq import convert_fairseq_roberta
from fastbert.models import checkpoint


class Sneaky:
    def __reduce__(self):
        return os.getenv, ("HOME",)


def fairseq(folder, change=lambda state, arguments: None):
    """A small RoBERTa in fairseq's format, and the same model in ours."""
    roberta = BertConfig(**SIZES, model_type="roberta", layer_norm_eps=1e-5)
    model = bert.BertForMaskedLM(roberta).eval()
    torch.nn.init.zeros_(model.bert.embeddings.token_type.weight)
    table = {"query": "q", "key": "k", "value": "v"}
    state = {}
    names = checkpoint.names_of("roberta", "BertForMaskedLM")
    for key, value in checkpoint.to_hf(model, names).items():
        key = key.replace("roberta.encoder.layer", "decoder.sentence_encoder.layers")
        key = key.replace("roberta.embeddings.LayerNorm", "decoder.sentence_encoder.emb_layer_norm")
        for word, short in table.items():
            key = key.replace(f"attention.self.{word}", f"self_attn.{short}_proj")
        key = key.replace("attention.output.dense", "self_attn.out_proj")
        key = key.replace("attention.output.LayerNorm", "self_attn_layer_norm")
        key = key.replace("intermediate.dense", "fc1").replace("output.dense", "fc2")
        key = key.replace("output.LayerNorm", "final_layer_norm")
        key = key.replace(
            "roberta.embeddings.word_embeddings", "decoder.sentence_encoder.embed_tokens"
        )
        key = key.replace(
            "roberta.embeddings.position_embeddings", "decoder.sentence_encoder.embed_positions"
        )
        if "token_type" not in key:
            state[key.replace("lm_head", "decoder.lm_head")] = value.clone()
    state["decoder.lm_head.weight"] = state["decoder.sentence_encoder.embed_tokens.weight"].clone()
    arguments = argparse.Namespace(
        encoder_layers=2,
        encoder_embed_dim=24,
        encoder_ffn_embed_dim=44,
        encoder_attention_heads=3,
        dropout=0.1,
        attention_dropout=0.1,
        activation_fn="gelu",
    )
    change(state, arguments)
    torch.save({"args": arguments, "model": state}, folder / "checkpoint.pt")
    return model


@pytest.mark.parametrize("untied", [False, True])
def test_fairseq(tmp_path, untied):
    other = torch.randn(61, 24)

    def change(state, arguments):
        if untied:
            state["decoder.lm_head.weight"] = other

    ours = fairseq(tmp_path, change)
    (tmp_path / "dict.txt").write_text("".join(f"word{i} 1\n" for i in range(56)))
    convert_fairseq_roberta(tmp_path / "checkpoint.pt", tmp_path / "out")
    theirs, info = transformers.AutoModelForMaskedLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values())
    ids = torch.arange(2, 12)[None]
    expected = ours(ids).logits.detach()
    if untied:
        x = ours.mlm_head.transform(ours.bert(ids).last_hidden_state)
        expected = x.detach() @ other.T + ours.mlm_head.bias.detach()
    torch.testing.assert_close(theirs.eval()(ids).logits.detach(), expected, rtol=1e-5, atol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("word0 <mask> word55 nothing")["input_ids"] == [0, 4, 60, 59, 3, 2]


def without_layers(state, arguments):
    del arguments.encoder_layers


FAIRSEQ = {
    "other activation": (lambda s, a: setattr(a, "activation_fn", "relu"), "activation_fn 'relu'"),
    "no setting": (without_layers, "does not say its encoder_layers"),
    "more weights": (
        lambda s, a: s.update({"decoder.sentence_encoder.layer_norm.weight": torch.ones(24)}),
        "weights that a RoBERTa masked LM has not",
    ),
    "no RoBERTa": (lambda s, a: s.clear(), "holds no RoBERTa"),
    "code": (lambda s, a: setattr(a, "x", Sneaky()), "Python objects .*getenv"),
}


@pytest.mark.parametrize("name", FAIRSEQ)
def test_fairseq_refusals(tmp_path, name):
    change, message = FAIRSEQ[name]
    fairseq(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        convert_fairseq_roberta(tmp_path / "checkpoint.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_fairseq_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        convert_fairseq_roberta(tmp_path / "checkpoint.pt", tmp_path / "out")
    torch.save({"weights": torch.ones(1)}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="not a fairseq checkpoint"):
        convert_fairseq_roberta(tmp_path / "checkpoint.pt", tmp_path / "out")
    fairseq(tmp_path)
    (tmp_path / "dict.txt").write_text("one 1\n")
    with pytest.raises(ValueError, match=r"gives 6 tokens .* the model has 61"):
        convert_fairseq_roberta(tmp_path / "checkpoint.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()
