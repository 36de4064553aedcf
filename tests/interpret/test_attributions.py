"""Scores of tokens against the formulas that define them, on models small enough to compute these in full."""

from itertools import permutations

import pytest
import torch
from interpret_models import FORMS, model_of, question_of

import fastbert
from fastbert.bert import (
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForTokenClassification,
    BertModel,
)
from fastbert.interpret import (
    METHODS,
    Target,
    answer_target,
    class_target,
    explain,
    similarity_target,
    tag_target,
    word_target,
)


def exact_shapley(q, absent):
    """(S,) the mean over all orders of what each token adds."""
    players = q.players.tolist()
    values = {}

    def value(there):
        if there not in values:
            gone = torch.zeros(1, len(q.ids), dtype=torch.bool)
            gone[0, [p for p in players if p not in there]] = True
            values[there] = float(q.without(gone, absent))
        return values[there]

    scores = torch.zeros(len(q.ids), dtype=torch.float64)
    orders = list(permutations(players))
    for order in orders:
        for i, p in enumerate(order):
            scores[p] += value(frozenset(order[: i + 1])) - value(frozenset(order[:i]))
    return (scores / len(orders)).float()


@pytest.mark.parametrize("absent", ["mask", "remove"])
@pytest.mark.parametrize(("method", "samples"), [("permutation", 60), ("shap", 100)])
def test_shapley_values_are_exact_where_all_coalitions_fit(method, samples, absent):
    q = question_of(model_of())
    found = explain(q, method, samples=samples, absent=absent)
    torch.testing.assert_close(found.scores, exact_shapley(q, absent), atol=1e-5, rtol=1e-4)
    assert found.error < 1e-5


@pytest.mark.parametrize("method", ["permutation", "shap"])
def test_sampled_shapley_values_are_near_and_repeat_for_a_seed(method):
    q = question_of(model_of(), words=9)
    options = {"permutation": {"samples": 150}, "shap": {"samples": 400}}[method]
    one, same, other = (explain(q, method, **options, seed=s) for s in (1, 1, 2))
    whole = explain(q, "shap", samples=512)
    assert torch.equal(one.scores, same.scores)
    assert not torch.equal(one.scores, other.scores)
    assert (one.scores - whole.scores).abs().max() < 0.2 * whole.scores.abs().max()
    assert one.error < 1e-5


def test_a_token_that_is_removed_is_not_in_the_packing():
    q = question_of(model_of())
    gone = torch.zeros(1, 7, dtype=torch.bool)
    gone[0, [2, 3]] = True
    short = torch.tensor([[2, 10, 13, 14, 3]])
    with torch.no_grad():
        expected = q.model(short).logits[0, 1].double()
    torch.testing.assert_close(q.without(gone, "remove")[0], expected, atol=1e-6, rtol=1e-5)


def linear(model, weight):
    """A target that is linear in the word embeddings."""

    def score(model, given, rows):
        x = given.get("inputs_embeds")
        x = model.bert.embeddings.word(given["input_ids"]) if x is None else x
        S = int(given["cu_seqlens"][1])
        return (x.view(-1, S, x.shape[-1]) * weight).sum((1, 2))

    return Target("linear", score, ())


@pytest.mark.parametrize("baseline", ["mask", "pad", "zero"])
@pytest.mark.parametrize("steps", [1, 7])
def test_integrated_gradients_of_a_linear_model_are_exact(baseline, steps):
    model = model_of()
    weight = torch.randn(7, 24)
    q = question_of(model, linear(model, weight))
    found = explain(q, "integrated", steps=steps, baseline=baseline)
    table = model.bert.embeddings.word.weight.detach()
    blank = {"mask": table[4], "pad": table[0], "zero": torch.zeros(24)}[baseline]
    expected = ((table[q.ids] - blank) * weight).sum(-1).masked_fill(q.fixed, 0.0)
    torch.testing.assert_close(found.scores, expected, atol=1e-5, rtol=1e-5)
    assert found.error < 1e-4


def test_gradients_are_those_of_autograd_and_leave_no_trace():
    model = model_of().train()
    q = question_of(model)
    found = explain(q, "gradient")
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    model.eval()
    x = model.bert.embeddings.word(q.ids).detach().requires_grad_()
    model(inputs_embeds=x[None], token_type_ids=q.types[None]).logits[0, 1].backward()
    expected = (x * x.grad).sum(-1).detach().masked_fill(q.fixed, 0.0)
    torch.testing.assert_close(found.scores, expected, atol=1e-5, rtol=1e-4)


def test_smoothgrad_is_the_gradient_without_noise_and_repeats_for_a_seed():
    q = question_of(model_of())
    plain = explain(q, "gradient").scores
    torch.testing.assert_close(explain(q, "smooth", samples=2, noise=0.0).scores, plain)
    one, same, other = (explain(q, "smooth", samples=3, seed=s).scores for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)


def test_many_steps_are_the_same_in_several_batches(monkeypatch):
    q = question_of(model_of())
    whole = explain(q, "integrated", steps=20)
    monkeypatch.setattr("fastbert.interpret.question.MOST_TOKENS", 50)
    parts = explain(q, "integrated", steps=20)
    torch.testing.assert_close(whole.scores, parts.scores, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_every_form(form, method):
    q = question_of(model_of(form=form))
    options = {"samples": 8} if method in ("smooth", "permutation", "shap") else {}
    # DistilBERT's head has a ReLU, whose kink the points of the integral must resolve
    options |= {"steps": 200} if method == "integrated" else {}
    found = explain(q, method, **options)
    assert found.scores.shape == (7,)
    assert found.scores.dtype == torch.float32
    assert torch.isfinite(found.scores).all()
    assert found.scores[q.fixed].abs().sum() == 0.0
    assert found.scores[~q.fixed].abs().sum() > 0.0
    with torch.no_grad():
        logits = q.model(q.ids[None]).logits
    assert found.value == pytest.approx(float(logits[0, 1]), abs=1e-5)
    if method == "integrated":
        assert found.error < 0.01


def test_every_target_is_the_model_s_own_output():
    ids = torch.tensor([[2, *range(10, 15), 3]])
    with torch.no_grad():
        tagger = model_of(BertForTokenClassification)
        q = question_of(tagger, tag_target(tagger, 3, 2, probability=True))
        assert float(q.scores()) == pytest.approx(float(tagger(ids).logits[0, 3].softmax(-1)[2]))
        answers = model_of(BertForQuestionAnswering)
        output = answers(ids)
        start, end = float(output.start_logits[0, 2]), float(output.end_logits[0, 4])
        for given, expected in (((2, None), start), ((None, 4), end), ((2, 4), start + end)):
            q = question_of(answers, answer_target(*given))
            assert float(q.scores()) == pytest.approx(expected, abs=1e-5)
        masked = model_of(BertForMaskedLM)
        q = question_of(masked, word_target(masked, 2, 11, "x"))
        assert float(q.scores()) == pytest.approx(float(masked(ids).logits[0, 2, 11]), abs=1e-5)
        encoder = model_of(BertModel)
        q = question_of(encoder, similarity_target(ids[0], (3, 4)), lengths=(3, 4))
        a, b = (encoder(t).last_hidden_state.mean(1) for t in (ids[:, :3], ids[:, 3:]))
        assert float(q.scores()) == pytest.approx(float(torch.cosine_similarity(a, b)), abs=1e-5)
    assert explain(q, "integrated", steps=100).error < 0.01
    assert explain(q, "permutation", samples=60, absent="remove").error < 1e-4
    assert explain(q, "gradient-rollout").scores.abs().sum() > 0


def test_the_place_of_a_target_moves_with_the_tokens_before_it():
    tagger = model_of(BertForTokenClassification)
    q = question_of(tagger, tag_target(tagger, 4, 1))
    gone = torch.zeros(1, 7, dtype=torch.bool)
    gone[0, 1] = True
    with torch.no_grad():
        expected = tagger(torch.tensor([[2, 11, 12, 13, 14, 3]])).logits[0, 3, 1].double()
    torch.testing.assert_close(q.without(gone, "remove")[0], expected, atol=1e-6, rtol=1e-5)


def test_int8_weights_have_shapley_values_and_no_gradients():
    model = fastbert.quantize(model_of(), replace=True)
    q = question_of(model)
    for method in ("permutation", "rollout"):
        assert torch.isfinite(explain(q, method).scores).all()
    for wrong in (model, fastbert.quantize(model_of())):
        for method in ("gradient", "integrated", "smooth", "gradient-rollout"):
            with pytest.raises(ValueError, match="records no gradient, it"):
                explain(question_of(wrong), method)


def test_a_frozen_model_has_gradients_and_is_frozen_afterwards():
    plain, frozen = (
        explain(question_of(m), "integrated") for m in (model_of(), fastbert.freeze(model_of()))
    )
    torch.testing.assert_close(plain.scores, frozen.scores)
    model = fastbert.freeze(model_of())
    explain(question_of(model), "rollout")
    assert model.bert.frozen is not None


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda m: class_target(m, 3), "the target 3 is no class"),
        (lambda m: question_of(m, words=31), "has 33 tokens and the model takes 32"),
        (lambda m: question_of(m, words=0), "no word to explain"),
        (lambda m: question_of(m, words=5, ids=torch.full((7,), 40)), "token 40"),
        (lambda m: explain(question_of(m), "lrp"), "choose gradient"),
        (lambda m: explain(question_of(m), "integrated", baseline="cls"), "choose mask"),
        (lambda m: explain(question_of(m), "integrated", steps=0), "steps is 0"),
        (lambda m: explain(question_of(m), "permutation", samples=0), "samples is 0"),
        (lambda m: explain(question_of(m), "shap", absent="zero"), "choose mask or remove"),
        # fewer than the unknowns of its linear model, whose scores would add up all the same
        (lambda m: explain(question_of(m, words=9), "shap", samples=15), "two a token, 18"),
        (lambda m: answer_target(None, None), "start and end"),
    ],
)
def test_bad_input_gets_a_sentence(wrong, words):
    with pytest.raises(ValueError, match=words):
        wrong(model_of())


def test_probabilities_are_read_as_the_model_s_problem_says():
    for problem, scale in (
        ("single_label_classification", lambda x: x.softmax(-1)),
        ("multi_label_classification", torch.sigmoid),
        ("regression", lambda x: x),
    ):
        model = model_of(problem_type=problem)
        q = question_of(model, class_target(model, 1, probability=True))
        with torch.no_grad():
            expected = float(scale(model(q.ids[None]).logits)[0, 1])
        assert float(q.scores()) == pytest.approx(expected, abs=1e-6)


def test_each_of_two_texts_is_compared_with_the_other_as_it_is():
    """Else two texts whose words are all gone would be alike, and words that they share would speak against it."""
    encoder = model_of(BertModel)
    q = question_of(
        encoder, similarity_target(torch.tensor([2, *range(10, 15), 3]), (3, 4)), lengths=(3, 4)
    )
    with torch.no_grad():
        b = encoder(q.ids[None, 3:]).last_hidden_state.mean(1)

    def score(model, given, rows):
        hidden = model(**given).last_hidden_state
        a = torch.stack([x.mean(0) for x in hidden.split(given["cu_seqlens"].diff().tolist())])
        return torch.cosine_similarity(a, b)

    ids = q.ids[:3]
    alone = question_of(
        encoder, Target("cosine", score, ()), ids=ids, types=ids * 0, fixed=q.fixed[:3]
    )
    for method, options in (("shap", {"absent": "remove"}), ("integrated", {"steps": 30})):
        found, one = (explain(each, method, **options) for each in (q, alone))
        torch.testing.assert_close(found.scores[:3], one.scores, atol=1e-5, rtol=1e-3)
