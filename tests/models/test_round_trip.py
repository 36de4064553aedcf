"""Every family and head with random weights: transformers loads our files, and we load its files."""

from __future__ import annotations

import pytest
import torch
import transformers
from pairs import CASES, SIZES, batch

from fastbert import bert
from fastbert.bert import BertConfig

KINDS = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert"}


def config(family, **settings):
    return BertConfig(**{**SIZES, "num_labels": 3, **settings, "model_type": family})


def theirs_of(family, name, folder):
    """(transformers' model in a folder, its report of missing and unexpected keys)."""
    kind = getattr(transformers, KINDS[family] + name)
    model, info = kind.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    return model.eval(), {k: v for k, v in info.items() if v}


def outputs(model, inputs):
    """Per-token outputs at tokens, and all other outputs."""
    mask = inputs["attention_mask"]
    out = model(**inputs)
    found = {}
    for key in out.keys():  # noqa: SIM118 -- not a dict
        if isinstance(out[key], torch.Tensor):
            value = out[key].detach()
            found[key] = value[mask == 1] if value.shape[:2] == mask.shape else value
    return found


def assert_same(family, name, ours, theirs):
    inputs = batch(family, name, "none")
    a, b = outputs(ours, inputs), outputs(theirs, inputs)
    for key, value in b.items():
        torch.testing.assert_close(a[key], value, rtol=1e-5, atol=1e-5, msg=key)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_ours_to_transformers(family, name, tmp_path):
    """No key is missing or unexpected, the outputs are the same, and we load the same bits back."""
    labels = 2 if name in ("ForQuestionAnswering", "ForPreTraining") else 3
    kind = getattr(bert, f"Bert{name}")
    ours = kind(config(family, num_labels=labels)).eval()
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(torch.randn(p.shape), alpha=0.1)
    ours.save_pretrained(tmp_path)
    theirs, info = theirs_of(family, name, tmp_path)
    assert not info
    assert_same(family, name, ours, theirs)
    assert theirs.config.architectures == [KINDS[family] + name]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    back = kind.from_pretrained(tmp_path)
    assert not back.training
    assert all(torch.equal(back.state_dict()[k], v) for k, v in ours.state_dict().items())


@pytest.mark.parametrize(("family", "name"), CASES)
def test_transformers_to_ours(family, name, tmp_path, caplog):
    labels = 2 if name in ("ForQuestionAnswering", "ForPreTraining") else 3
    values = config(family, num_labels=labels).to_dict()
    theirs = getattr(transformers, KINDS[family] + name)(
        getattr(transformers, KINDS[family] + "Config")(**values)
    ).eval()
    theirs.save_pretrained(tmp_path)
    ours = getattr(bert, f"Bert{name}").from_pretrained(tmp_path)
    assert_same(family, name, ours, theirs)
    assert "newly initialised" not in caplog.text


@pytest.mark.parametrize("family", KINDS)
def test_untied_decoder(family, tmp_path):
    ours = bert.BertForMaskedLM(config(family, tie_word_embeddings=False)).eval()
    with torch.no_grad():
        ours.mlm_head.bias.normal_()
    ours.save_pretrained(tmp_path)
    theirs, info = theirs_of(family, "ForMaskedLM", tmp_path)
    assert not info
    assert_same(family, "ForMaskedLM", ours, theirs)
    assert_same(family, "ForMaskedLM", bert.BertForMaskedLM.from_pretrained(tmp_path), theirs)


def test_xlm_roberta_keeps_its_name(tmp_path):
    model = bert.BertForMaskedLM(BertConfig.from_dict({**SIZES, "model_type": "xlm-roberta"}))
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert type(loaded).__name__ == "XLMRobertaForMaskedLM"


def test_a_subclass_keeps_its_own_weights(tmp_path):
    class Scaled(bert.BertForMaskedLM):
        def __init__(self, config):
            super().__init__(config)
            self.scale = torch.nn.Linear(1, 1)

    model = Scaled(config("bert"))
    model.save_pretrained(tmp_path)
    assert torch.equal(Scaled.from_pretrained(tmp_path).scale.weight, model.scale.weight)
