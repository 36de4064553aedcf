"""Models whose encoder is a bidirectional LSTM: values, gradients, batches, files, heads, and what has no meaning."""

import json

import pytest
import tiny_tasks
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence, unpack_sequence

import fastbert
from fastbert import bert
from fastbert.bert import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel
from fastbert.compress.prune import prune
from fastbert.infer import Embedder

SIZES = {"model_type": "lstm", "vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 3}
LENGTHS = [5, 1, 9]


def model_of(kind=BertForMaskedLM, **changes):
    torch.manual_seed(0)
    return kind(BertConfig(**SIZES | changes)).eval()


def packed(lengths=LENGTHS, seed=1):
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 40, (sum(lengths),), generator=draw)
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return {"input_ids": ids, "cu_seqlens": bounds, "max_seqlen": max(lengths)}


def padded(batch, lengths=LENGTHS):
    rows = batch["input_ids"].split(lengths)
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return {"input_ids": ids, "attention_mask": mask.long()}, mask


def test_the_encoder_is_torchs_lstm_with_gradients():
    model, batch = model_of(BertModel), packed()
    twin = nn.LSTM(24, 12, num_layers=3, bidirectional=True)
    with torch.no_grad():
        for i, layer in enumerate(model.layers):
            for name, p in layer.lstm.named_parameters():
                getattr(twin, name.replace("_l0", f"_l{i}")).copy_(p)
    y = model(**batch).last_hidden_state
    x = model.embeddings.norm(model.embeddings.word(batch["input_ids"])).detach().requires_grad_()
    theirs = torch.cat(unpack_sequence(twin(pack_sequence(x.split(LENGTHS), False))[0]))
    torch.testing.assert_close(y, theirs, rtol=0, atol=2e-6)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    (y * weights).sum().backward()
    (theirs * weights).sum().backward()
    for i, layer in enumerate(model.layers):
        for name, p in layer.lstm.named_parameters():
            wanted = getattr(twin, name.replace("_l0", f"_l{i}")).grad
            torch.testing.assert_close(p.grad, wanted, rtol=1e-4, atol=2e-5)
    half = model.layers[0].lstm.bias_ih_l0.detach()
    assert half.tolist() == [0.0] * 12 + [1.0] * 12 + [0.0] * 24


def test_padded_batches_give_what_packed_ones_give():
    model, batch = model_of(), packed()
    given, mask = padded(batch)
    states = model(**batch, output_hidden_states=True)
    others = model(**given, output_hidden_states=True)
    torch.testing.assert_close(others.logits[mask], states.logits, rtol=0, atol=1e-5)
    assert len(states.hidden_states) == 4
    classifier = model_of(BertForSequenceClassification)
    ours, theirs = classifier(**batch).logits, classifier(**given).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    # every token is classified, not the first alone
    other = batch | {"input_ids": batch["input_ids"].roll(1)}
    assert not torch.equal(classifier(**other).logits, ours)


def test_dropout_is_between_the_layers_and_replayed_when_layers_are_recomputed():
    model, batch = model_of().train(), packed()
    assert [layer.p for layer in model.bert.layers] == [0.1, 0.1, 0.0]
    labels = batch["input_ids"]
    found = []
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable()
        torch.manual_seed(3)
        model.zero_grad()
        model(**batch, labels=labels).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert all(torch.equal(g, found[1][name]) for name, g in found[0].items())
    torch.manual_seed(4)
    dropped = model(**batch, labels=labels).loss
    assert dropped != model.eval()(**batch, labels=labels).loss


@pytest.mark.parametrize(
    "kind",
    [
        *("BertModel", "BertForPreTraining", "BertForMaskedLM", "BertForNextSentencePrediction"),
        *("BertForSequenceClassification", "BertForTokenClassification"),
        "BertForQuestionAnswering",
    ],
)
def test_every_head_is_saved_and_loaded(kind, tmp_path):
    model, batch = model_of(getattr(bert, kind)), packed()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "fastbert-lstm"
    again = type(model).from_pretrained(tmp_path)
    assert again.config.layer_sizes == model.config.layer_sizes
    for one, other in zip(model(**batch).to_tuple(), again(**batch).to_tuple(), strict=True):
        assert torch.equal(one, other)
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(ValueError, match="weights of 3 layers and"):
        type(model).from_pretrained(tmp_path)


def test_a_frozen_model_runs_its_layers_and_gives_vectors(tmp_path):
    model, batch = model_of(), packed()
    plain = model(**batch).logits
    with torch.no_grad():
        assert torch.equal(fastbert.freeze(model)(**batch).logits, plain)
    tiny_tasks.base_model(tmp_path, model_type="lstm")
    vectors = Embedder(tmp_path)(["the man was great", "a film"])
    assert vectors.shape == (2, 32)
    assert torch.isfinite(torch.as_tensor(vectors)).all()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hidden_size": 25}, "hidden_size is 25: an lstm has half of it in each direction"),
        ({"position_embedding_type": "rotary"}, "choose 'none'"),
        ({"gated": True}, "gated is True: the layers of an lstm have one form"),
        ({"local_attention": 8}, "local_attention is 8: the layers of an lstm"),
        ({"int8_bits": 12}, "int8_bits is 12: the layers of an lstm"),
        ({"layer_heads": (1, 0, 1)}, "layer_heads is .*: the layers of an lstm"),
        ({"model_type": "bert", "position_embedding_type": "none"}, "choose 'absolute'"),
    ],
)
def test_settings_of_other_layers_are_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        BertConfig(**SIZES | changes)


def test_tools_of_attention_are_refused():
    model, batch = model_of(), packed()
    with pytest.raises(ValueError, match="output_attentions is set and an LSTM has no attention"):
        model(**batch, output_attentions=True)
    with pytest.raises(ValueError, match=r"can't be quantised: .* it is an LSTM"):
        fastbert.quantize(model)
    with pytest.raises(ValueError, match="its layers are LSTMs"):
        fastbert.quantize(model, replace=True)
    with pytest.raises(ValueError, match="can't be pruned: it is an LSTM"):
        prune(model, [{**batch, "labels": batch["input_ids"]}])


def test_exporters_are_refused():
    ids = torch.randint(5, 40, (2, 6))
    with pytest.raises(NotImplementedError, match="export one with attention"):
        torch.export.export(model_of(BertModel), (ids,))
