"""Attention maps and rollouts against products of the weights that output_attentions gives."""

import pytest
import torch
from interpret_models import FORMS, model_of, question_of

import fastbert
from fastbert.bert import BertModel
from fastbert.interpret import attention_maps, explain, similarity_target
from fastbert.interpret.rollout import heads_of

IDS = torch.randint(5, 40, (3, 9), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(9) < torch.tensor([9, 4, 1])[:, None]).long()


@pytest.mark.parametrize("form", FORMS)
def test_maps_are_those_of_output_attentions(form):
    changes = {"local_attention": 4} if "modern" in form else {}
    model = model_of(form=form, **changes)
    given = {"input_ids": IDS, "attention_mask": MASK}
    with torch.no_grad():
        expected = model(**given, output_attentions=True).attentions
    # a part in evaluation inside a model that is trained stays so
    model.train()
    model.bert.layers[1].eval()
    found = attention_maps(model, given)
    assert [m.training for m in model.bert.layers] == [True, False, True]
    assert [*found] == [0, 1, 2]
    for i, m in found.items():
        torch.testing.assert_close(m, expected[i], atol=2e-6, rtol=1e-4)
    some = attention_maps(model, given, layers=[1], heads=[2, 0], rows=[3, 8])
    torch.testing.assert_close(some[1], expected[1][:, [2, 0]][:, :, [3, 8]], atol=2e-6, rtol=1e-4)
    assert not any(vars(layer.attention).get("observer") for layer in model.bert.layers)


def test_maps_of_packed_left_padded_and_frozen_batches():
    model = model_of()
    given = {"input_ids": IDS.flip(1), "attention_mask": MASK.flip(1)}
    with torch.no_grad():
        expected = model(**given, output_attentions=True).attentions[2]
    torch.testing.assert_close(attention_maps(model, given, [2])[2], expected, atol=2e-6, rtol=1e-4)
    fastbert.freeze(model)
    frozen = model.bert.frozen
    torch.testing.assert_close(attention_maps(model, given, [2])[2], expected, atol=2e-6, rtol=1e-4)
    assert model.bert.frozen is frozen
    packed = {"input_ids": IDS[MASK.bool()], "max_seqlen": 9}
    packed["cu_seqlens"] = torch.tensor([0, 9, 13, 14], dtype=torch.int32)
    with torch.no_grad():
        expected = model(**packed, output_attentions=True).attentions[0]
    torch.testing.assert_close(attention_maps(model, packed)[0], expected, atol=2e-6, rtol=1e-4)


def test_maps_refuse_what_is_not_there():
    for given, words in (
        ({"layers": [3]}, "no layer 3: the layers are numbered from 0 to 2"),
        ({"heads": [-1]}, "no head -1"),
        ({"rows": [9]}, "no row 9"),
    ):
        with pytest.raises(ValueError, match=words):
            attention_maps(model_of(), {"input_ids": IDS}, **given)


def weights(q):
    """The layers' weights (H, S, S) of a question's text."""
    with torch.no_grad():
        return [a[0] for a in q.model(q.ids[None], output_attentions=True).attentions]


def test_rollout_is_a_product_of_means():
    q = question_of(model_of())
    product = torch.eye(7)
    for a in weights(q):
        product = (a.mean(0) + torch.eye(7)) / 2 @ product
    expected = product[0].masked_fill(q.fixed, 0.0)
    torch.testing.assert_close(explain(q, "rollout").scores, expected, atol=1e-6, rtol=1e-5)


def test_gradient_rollout_is_a_product_of_weights_times_gradients():
    q = question_of(model_of())
    found = explain(q, "gradient-rollout").scores
    # attention in plain torch, so that autograd gives the gradients of the weights
    kept = []
    model = q.model
    x = model.bert.embeddings(q.ids, torch.arange(7))
    for layer in model.bert.layers:
        qkv = layer.attention.qkv(x).permute(1, 2, 0, 3)  # (3, H, S, D)
        a = (qkv[0] @ qkv[1].mT / qkv.shape[-1] ** 0.5).softmax(-1)
        kept.append(a)
        y = layer.attention.out((a @ qkv[2]).transpose(0, 1).flatten(1))
        x = layer.attention_norm(x + y)
        x = layer.output_norm(x + layer.feed_forward(x))
    score = model.classifier(model.bert.pool(x[:1]))[0, 1]
    relevance = torch.eye(7)
    for a, g in zip(kept, torch.autograd.grad(score, kept), strict=True):
        relevance = relevance + (a * g).clamp(min=0).mean(0) @ relevance
    expected = (relevance[0] - torch.eye(7)[0]).masked_fill(q.fixed, 0.0).detach()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_the_head_view_of_two_texts_has_nothing_between_them():
    aim = similarity_target(torch.tensor([2, *range(10, 15), 3]), (3, 4))
    q = question_of(model_of(BertModel), aim, lengths=(3, 4))
    (maps,) = heads_of(q, [1]).values()
    assert maps.shape == (3, 7, 7)
    torch.testing.assert_close(maps.sum(-1), torch.ones(3, 7))
    assert maps[:, :3, 3:].abs().sum() == 0


def test_rollouts_of_two_texts_are_those_of_each():
    model, ids = model_of(BertModel), torch.tensor([2, *range(10, 15), 3])
    q = question_of(model, similarity_target(ids, (3, 4)), lengths=(3, 4))
    found = explain(q, "rollout").scores
    for part, n in zip(ids.split([3, 4]), (slice(3), slice(3, 7)), strict=True):
        product = torch.eye(len(part))
        with torch.no_grad():
            for (a,) in model(part[None], output_attentions=True).attentions:
                product = (a.mean(0) + torch.eye(len(part))) / 2 @ product
        expected = product.mean(0).masked_fill(q.fixed[n], 0.0)
        torch.testing.assert_close(found[n], expected, atol=1e-6, rtol=1e-5)
    assert explain(q, "gradient-rollout").scores[~q.fixed].min() > 0


def test_gradients_explain_an_lstm_and_attention_does_not():
    model = model_of(model_type="lstm")
    question = question_of(model)
    found = explain(question, "integrated", steps=50)
    assert found.error < 0.02
    for method in ("rollout", "gradient-rollout"):
        with pytest.raises(ValueError, match="LSTMLayers, which have no attention"):
            explain(question, method)
    with pytest.raises(ValueError, match="no attention"):
        attention_maps(model, {"input_ids": question.ids[None]})
