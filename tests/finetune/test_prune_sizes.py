"""Pruning: what a block's heads and columns cost, what is left of it, and the choice of sizes."""

import copy
import itertools

import numpy as np
import pytest
import torch
from tiny_tasks import batch, classifier

from fastbert.compress.importance import RIDGE, Statistics, order, refitted, statistics
from fastbert.compress.search import Search, cheapest


def test_statistics_are_those_of_single_tokens():
    model = classifier()
    # texts of one token each, so that the gradient by a block's bias is that by its output
    given = {**batch(), "cu_seqlens": torch.arange(7, dtype=torch.int32), "max_seqlen": 1}
    given["input_ids"] = given["input_ids"][:6]
    found = statistics(copy.deepcopy(model).requires_grad_(False), [given, given], lambda: None)
    for layer, pair in zip(model.bert.layers, found, strict=True):
        for last, seen in zip((layer.attention.out, layer.feed_forward.down), pair, strict=True):
            expected = 0
            for n in range(6):
                one = {"input_ids": given["input_ids"][None, n : n + 1]}
                loss = model(**one, labels=given["labels"][n : n + 1]).loss
                (g,) = torch.autograd.grad(loss, last.bias)
                expected = expected + torch.outer(g, g) / 6
            torch.testing.assert_close(seen.gradients, expected, rtol=1e-3, atol=1e-6)
            inputs = []
            handle = last.register_forward_pre_hook(lambda _, a, into=inputs: into.append(a[0]))
            model(**given)
            handle.remove()
            a = torch.cat([inputs[0], torch.ones(6, 1)], 1).detach()
            torch.testing.assert_close(seen.inputs, a.T @ a / 6)


def inputs_and_weight(K=12, C=5, seed=0):
    draw = torch.Generator().manual_seed(seed)
    h = torch.randn(200, K, generator=draw) + torch.rand(K, generator=draw)
    g = torch.randn(200, C, generator=draw) * torch.rand(C, generator=draw)
    a = torch.cat([h, torch.ones(200, 1)], 1)
    weight, bias = torch.randn(C, K, generator=draw), torch.randn(C, generator=draw)
    return Statistics(a.T @ a / 200, g.T @ g / 200), weight, bias


@pytest.mark.parametrize("sizes", [[*range(13)], [0, 1, 2, 3, 4], [0, 4, 8, 12]])
def test_estimates_are_those_of_the_refitted_block(sizes):
    seen, weight, bias = inputs_and_weight()
    found = order(weight, seen, sizes)
    count = sizes[-1]
    assert sorted(found.taken.tolist()) == [*range(count)]
    H = seen.inputs.double()
    H += RIDGE * H.diagonal()[:-1].mean() * torch.eye(13)
    for size, loss in zip(sizes, found.losses.tolist(), strict=True):
        kept = found.taken[count - size :].sort().values
        columns = (kept[:, None] * (12 // count) + torch.arange(12 // count)).flatten()
        w, b = refitted(weight, bias, seen.inputs, columns)
        E = torch.cat([weight, bias[:, None]], 1).double()
        E[:, columns] -= w
        E[:, -1] -= b
        expected = torch.trace(seen.gradients.double() @ E @ H @ E.T) / 2
        assert loss == pytest.approx(float(expected), rel=1e-4, abs=1e-6)
    # taken out first is the column without which the loss rises least
    if count == 12 and sizes[1] == 1:
        single = []
        for out in range(12):
            kept = torch.tensor([i for i in range(12) if i != out])
            w, b = refitted(weight, bias, seen.inputs, kept)
            E = torch.cat([weight, bias[:, None]], 1).double()
            E[:, kept] -= w
            E[:, -1] -= b
            single.append(float(torch.trace(seen.gradients.double() @ E @ H @ E.T)))
        assert int(found.taken[0]) == int(np.argmin(single))


def test_of_two_equal_columns_one_goes_first():
    seen, weight, _ = inputs_and_weight()
    # column 7 has the inputs of column 2
    pairs = torch.tensor([*range(7), 2, *range(8, 13)])
    seen = seen._replace(inputs=seen.inputs[pairs][:, pairs])
    found = order(weight * 10, seen, [*range(13)])
    assert int(found.taken[0]) in (2, 7)
    assert {2, 7} != {*found.taken[:2].tolist()}
    assert float(found.losses[-2]) < 0.05 * float(found.losses[-3])


def test_the_cheapest_choice_is_the_best_of_all():
    draw = np.random.default_rng(0)
    for _ in range(20):
        losses = [np.sort(draw.random(4))[::-1] for _ in range(4)]
        seconds = [np.sort(draw.random(4)) for _ in range(4)]
        budget = float(draw.uniform(0.5, 3.0))
        choices = [
            c
            for c in itertools.product(range(4), repeat=4)
            if sum(s[i] for s, i in zip(seconds, c, strict=True)) <= budget
        ]
        found = cheapest(losses, seconds, budget)
        if found is None:
            assert not choices
            continue

        def loss(choice, losses=losses):
            return sum(row[i] for row, i in zip(losses, choice, strict=True))

        taken = sum(s[i] for s, i in zip(seconds, found, strict=True))
        assert taken <= budget * 1.001
        assert not choices or loss(found) <= min(map(loss, choices)) + 1e-12


def test_a_search_by_the_actual_loss_finds_what_estimates_do_not_say():
    sizes = np.arange(5.0)
    estimates = [(4 - sizes) ** 2] * 4
    # the first block matters more, and the second less than it seems; the last two only together
    tried = []

    def loss(numbers):
        a, b, c, d = (4 - n for n in numbers)
        tried.append(tuple(numbers))
        return 3.0 * a + 0.1 * b + max(c, d)

    def run(tries, limit=60.0):
        tried.clear()
        return Search(estimates, [np.ones(4)], loss).run([sizes] * 4, 8.0, tries, limit)

    (first, _), (best, chosen) = run(1), run(60)
    assert first == pytest.approx(8.2)
    assert best == pytest.approx(2.4)
    assert sum(chosen) <= 8
    assert len(tried) == len({*tried}) <= 60
    assert loss(chosen) == best
    assert run(60) == (best, chosen)
    run(60, limit=0.0)
    assert len(tried) == 1
    assert Search(estimates, [np.ones(4)], loss).run([sizes + 3] * 4, 8.0, 9, 1.0) is None
