"""The word table of a tied masked-LM model: one gradient for both of its uses."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from fastbert.bert import BertConfig, BertForMaskedLM, BertForPreTraining
from fastbert.models import heads

V, C = 61, 16


@pytest.fixture
def batch():
    """Ids with repetitions and padding tokens inside, and labels."""
    torch.manual_seed(0)
    ids = torch.randint(1, 9, (3, 12))
    ids[0, 3:5] = 0
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    labels = torch.where(torch.rand(ids.shape) < 0.3, ids, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def small(cls, **settings):
    """A model of two layers in training mode, without dropout."""
    torch.manual_seed(1)
    sizes = {"vocab_size": V, "hidden_size": C, "num_hidden_layers": 2, "num_attention_heads": 2}
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return cls(BertConfig(intermediate_size=32, **sizes, **rates, **settings)).train()


def gradients(model, batch, loss=lambda out: out.loss):
    """Every gradient of a forward and a backward."""
    model.zero_grad()
    loss(model(**batch)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("logits", [None, True])
def test_both_uses_are_in_the_gradient(batch, monkeypatch, logits):
    model = small(BertForMaskedLM).double()
    found = gradients(model, {**batch, "return_logits": logits})
    monkeypatch.setattr(heads, "tied", lambda word, ids: None)
    expected = gradients(model, {**batch, "return_logits": logits})
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-9, atol=1e-12, msg=name)


def test_either_use_alone_gives_a_dense_gradient(batch, monkeypatch):
    model = small(BertForPreTraining)
    both = {**batch, "next_sentence_label": torch.tensor([0, 1, 0])}
    for name in ("nsp_loss", "mlm_loss"):
        one = lambda out, name=name: getattr(out, name)  # noqa: E731
        found = gradients(model, both, one)["bert.embeddings.word.weight"]
        with monkeypatch.context() as patch:
            patch.setattr(heads, "tied", lambda word, ids: None)
            expected = gradients(model, both, one)["bert.embeddings.word.weight"]
        assert found.layout == torch.strided
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_gradients_are_added_over_batches(batch):
    model = small(BertForMaskedLM)
    word = model.bert.embeddings.word.weight
    once = gradients(model, batch)["bert.embeddings.word.weight"].clone()
    model(**batch).loss.backward()
    torch.testing.assert_close(word.grad, 2 * once)
    word.requires_grad_(False)
    assert gradients(model, batch)["bert.embeddings.word.weight"] is None


def test_the_encoder_makes_no_gradient_of_the_table(batch):
    """A step's backward allocates one tensor of the table's size: the decoder's gradient."""
    torch.manual_seed(1)
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=20_000,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
        )
    ).train()
    loss = model(**batch).loss
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss.backward()
    size = 20_000 * 32 * 4
    made = [e for e in profiler.events() if e.self_cpu_memory_usage >= size]
    assert len(made) == 1


def test_an_id_outside_the_table_is_named(batch):
    batch["input_ids"][0, 1] = V
    with pytest.raises(
        IndexError, match=rf"ids\[1\] is {V}, outside \[0, {V}\): check that the tok"
    ):
        small(BertForMaskedLM)(**batch)


@pytest.mark.parametrize("logits", [None, True])
@pytest.mark.parametrize("place", ["post", "pre"])
def test_a_gradient_that_a_hook_keeps_stays_as_it_is(batch, logits, place):
    """Hooks on autograd's nodes see the decoder's gradient before the encoder's rows are added to it."""
    model = small(BertForMaskedLM)
    out = model(**batch, return_logits=logits)
    expected = gradients(model, {**batch, "return_logits": logits})
    kept = []

    def keep(grads, *_):
        for grad in grads:
            if grad is not None and grad.shape == (V, C):
                kept.append((grad, grad.clone()))

    nodes, seen = [out.loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if place == "post" and "AccumulateGrad" not in node.name():
            node.register_hook(keep)
        if place == "pre" and "Tied" in node.name():
            node.register_prehook(keep)
        nodes += [after for after, _ in node.next_functions]
    model.zero_grad()
    out.loss.backward()
    assert kept
    assert all(torch.equal(grad, copy) for grad, copy in kept)
    for name, grad in expected.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, grad, msg=name)
