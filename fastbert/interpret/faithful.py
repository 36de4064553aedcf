"""Whether scores say what the model reads: words are taken away in their order, and weights are drawn anew."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastbert.interpret.attributions import explain
from fastbert.interpret.question import Question, still

# the parts of a text's tokens that DeYoung et al. (2020) take away
SHARES = (0.01, 0.05, 0.1, 0.2, 0.5)


@dataclass(frozen=True)
class Judged:
    """How a target's score falls, in its units; the scores of a faithful method have high, low and high values."""

    comprehensiveness: float  # without the tokens of the highest scores, the mean over SHARES
    sufficiency: float  # with these tokens alone
    area: float  # the mean fall while tokens go one by one, the highest score first


def judge(
    question: Question, scores: Tensor, absent: str = "mask", shares: Sequence[float] = SHARES
) -> Judged:
    """Judge token scores (S,) by the question's own target, best with probability=True.

    comprehensiveness = f(x) - f(x without the top tokens) and sufficiency = f(x) - f(the top tokens alone), DeYoung et
    al. 2020 (ERASER); area = mean over k of f(x) - f(x without the k top tokens), Samek et al. 2017. A token that goes
    is [MASK], or with "remove" taken out. Ties go in the order of the text.
    """
    players = question.players
    n = len(players)
    order = players[scores.float()[players].argsort(descending=True, stable=True)]
    rank = torch.full((len(question.ids),), n)
    rank[order] = torch.arange(n)
    top = torch.tensor([max(1, round(share * n)) for share in shares])
    cut = rank[None, :] < torch.arange(1, n + 1)[:, None]  # (n, S)
    left = (rank[None, :] >= top[:, None]) & ~question.fixed
    with still(question.model):
        values = question.without(torch.cat([cut, left]), absent)
        falls = question.scores() - values
    return Judged(float(falls[top - 1].mean()), float(falls[n:].mean()), float(falls[:n].mean()))


def randomised(model: Any, seed: int = 0) -> Any:
    """A copy of a model with its matrices and embeddings drawn anew; norms stay."""
    fresh = copy.deepcopy(model)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        fresh.bert.init_weights()
        if fresh.bert is not fresh:
            fresh.init_weights()
    return fresh


def sanity(question: Question, method: str, seed: int = 0, **options: Any) -> float:
    """Spearman's correlation of the scores' sizes with those of the `randomised` model (Adebayo et al. 2018).

    Near 0 the method explains the model; near 1 it would draw the same picture for any weights.
    """
    ranks = []
    for q in (question, question.with_model(randomised(question.model, seed))):
        sizes = explain(q, method, **options).scores[q.players].abs()
        # equal values share the mean of their ranks
        below = (sizes[None, :] < sizes[:, None]).sum(1)
        ranks.append(below + (sizes[None, :] == sizes[:, None]).sum(1) / 2)
    if len(ranks[0]) < 2:
        return float("nan")
    return float(torch.corrcoef(torch.stack(ranks).double())[0, 1])
