"""Judgements of scores against what they are defined as, and the sanity check on drawn weights."""

import pytest
import torch
from interpret_models import model_of, question_of

from fastbert.interpret import Target, class_target, explain, judge, randomised, sanity


def counting(weights):
    """A target that adds the weights of the tokens that are there."""
    table = torch.zeros(40, dtype=torch.float64)
    table[10:15] = torch.tensor(weights, dtype=torch.float64)

    def score(model, given, rows):
        lengths = given["cu_seqlens"].diff().tolist()
        return torch.stack([table[ids].sum() for ids in given["input_ids"].split(lengths)])

    return Target("count", score, ())


@pytest.mark.parametrize("absent", ["mask", "remove"])
def test_of_a_sum_they_are_plain_numbers(absent):
    weights = [1.0, 5.0, 2.0, 0.0, 4.0]
    q = question_of(model_of(), counting(weights))
    scores = torch.tensor([0.0, *weights, 0.0])
    # the falls are 5, 9, 11, 12, 12, and what one and two tokens alone leave out 7 and 3
    found = judge(q, scores, absent, shares=(0.2, 0.4))
    assert (found.comprehensiveness, found.sufficiency, found.area) == (7.0, 5.0, 9.8)
    worst = judge(q, -scores, absent, shares=(0.2, 0.4))
    assert (worst.comprehensiveness, worst.sufficiency, worst.area) == (0.5, 11.5, 4.6)


def test_shapley_values_beat_a_random_order():
    q = question_of(model_of(), words=6)
    best = judge(q, explain(q, "shap").scores)
    areas = [judge(q, explain(q, "random", seed=s).scores).area for s in range(20)]
    assert best.area > sum(areas) / 20


def test_randomised_weights_are_others_in_a_copy():
    model = model_of()
    before = {name: p.clone() for name, p in model.named_parameters()}
    fresh, same = randomised(model, 3), randomised(model, 3)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
        assert torch.equal(fresh.get_parameter(name), same.get_parameter(name))
        if p.dim() > 1:
            assert not torch.equal(fresh.get_parameter(name), p)


def test_the_sanity_check_tells_a_method_that_reads_no_weights():
    q = question_of(model_of(), words=25)
    assert sanity(q, "random") == pytest.approx(1.0)
    assert abs(sanity(q, "gradient")) < 0.6
    assert abs(sanity(question_of(q.model, class_target(q.model, 2), 25), "shap")) < 0.6
