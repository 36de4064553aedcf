"""Scores of tokens: how much each one adds to what the model computes.

gradient: the gradient times the embedding. integrated: integrated gradients (Sundararajan et al. 2017). smooth:
SmoothGrad (Smilkov et al. 2017) times the embedding. permutation: Shapley values by sampled permutations (Strumbelj and
Kononenko 2014). shap: Kernel SHAP (Lundberg and Lee 2017). rollout, gradient-rollout: rollout.py. random: to compare.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations
from math import comb, factorial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastbert.files import quoted
from fastbert.interpret.question import Question, still, why_not_gradients
from fastbert.interpret.rollout import gradient_rollout, rollout

# token scores (S,), and where the method has one the sum that they must have
Scored = tuple[Tensor, float | None]
Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Attribution:
    """A text's tokens with their scores.

    `value` is the target's score of the text. `error` is |sum of the scores - expected| / |expected|, where expected is
    the value less that of the baseline, or of the text with all its words left out; None for methods without one.
    """

    tokens: tuple[str, ...]
    offsets: tuple[tuple[int, int], ...]  # characters in the text that the token is of
    owners: tuple[int, ...]  # the number of that text
    words: tuple[int | None, ...]
    scores: Tensor  # (S,) fp32
    target: str
    method: str
    value: float
    error: float | None
    texts: tuple[str, ...]

    def of_words(self) -> list[tuple[str, int, tuple[int, int], float]]:
        """(word, number of its text, its characters, the sum of its pieces' scores) in order, no special tokens."""
        found: list[tuple[str, int, tuple[int, int], float]] = []
        last: Any = None
        for word, owner, (start, end), score in zip(
            self.words, self.owners, self.offsets, self.scores.tolist(), strict=True
        ):
            if word is None:
                last = None
                continue
            if (owner, word) == last:
                start, score = found[-1][2][0], found[-1][3] + score
                found.pop()
            found.append((self.texts[owner][start:end], owner, (start, end), score))
            last = (owner, word)
        return found


# --- gradients ---


def gradient(q: Question) -> Scored:
    """The gradient times the embedding."""
    x = q.embeddings()
    return _times(q, x, next(q.gradients(x[None]))[2][0]), None


def smooth(q: Question, samples: int = 25, noise: float = 0.15, seed: int = 0) -> Scored:
    """The mean gradient under Gaussian noise, times the embedding; `noise` is a part of the embeddings' range."""
    _at_least("samples", samples, 1)
    x = q.embeddings()
    draw = torch.Generator().manual_seed(seed)
    drawn = torch.randn(samples, *x.shape, generator=draw).to(x)
    free = ~q.fixed[:, None].to(x.device)
    points = x + drawn * (noise * (x.max() - x.min())) * free
    total = torch.zeros_like(x, dtype=torch.float32)
    for _, _, g in q.gradients(points):
        total += g.float().sum(0)
    return _times(q, x, total / samples), None


def integrated(q: Question, steps: int = 50, baseline: str = "mask") -> Scored:
    """Gradients integrated on the line from the baseline to the text, at the points of Gauss and Legendre.

    All steps are sequences of one packed batch, or of several of at most MOST_TOKENS tokens. `baseline` replaces every
    token that is not fixed by [MASK], by [PAD] ("pad") or by zeros ("zero").
    """
    _at_least("steps", steps, 1)
    x, start = q.embeddings(), q.baseline(baseline)
    points, weights = on_the_line(steps)
    at = points.to(x)[:, None, None]
    w = weights.to(x.device, torch.float32)
    total = torch.zeros_like(x, dtype=torch.float32)
    for part, _, g in q.gradients(start + at * (x - start)):
        total += torch.einsum("n,nsc->sc", w[part], g.float())
    first, last = q.scores(torch.stack([start, x])).tolist()
    return _times(q, x - start, total), last - first


def on_the_line(steps: int) -> tuple[Tensor, Tensor]:
    """(steps,) fp64: the points of Gauss and Legendre between 0 and 1, and their weights."""
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    return torch.from_numpy((nodes + 1) / 2), torch.from_numpy(weights / 2)


def completeness_error(scores: Tensor, expected: float) -> float:
    """|sum of the scores - expected| / |expected|."""
    return abs(float(scores.double().sum()) - expected) / max(abs(expected), 1e-12)


def _times(q: Question, x: Tensor, g: Tensor) -> Tensor:
    return (x.float() * g.float()).sum(-1).cpu().masked_fill(q.fixed, 0.0)


# --- tokens left out ---


def permutation(q: Question, samples: int = 20, absent: str = "mask", seed: int = 0) -> Scored:
    """Shapley values: the mean of what a token adds to those before it, in `samples` orders and their reverses.

    Exact where `samples` is at least n! / 2. An absent token is [MASK], or with "remove" taken out of the packing.
    """
    _at_least("samples", samples, 1)
    n = len(q.players)
    if n <= 8 and 2 * samples >= factorial(n):
        orders = np.array(list(permutations(range(n))))
    else:
        draw = np.random.default_rng(seed)
        orders = np.array([draw.permutation(n) for _ in range(samples)])
        orders = np.concatenate([orders, orders[:, ::-1]])
    # masks[p, k] has the first k tokens of order p
    ranks = orders.argsort(1)
    masks = ranks[:, None, :] < np.arange(n + 1)[None, :, None]
    values = _values(q, masks.reshape(-1, n), absent).reshape(len(orders), n + 1)
    added = np.take_along_axis(np.diff(values, axis=1), ranks, 1)
    return _spread(q, added.mean(0)), float(values[0, -1] - values[0, 0])


def shap(q: Question, samples: int = 1000, absent: str = "mask", seed: int = 0) -> Scored:
    """Kernel SHAP: a linear model of the score in the tokens that are there, fitted to give Shapley's values.

    Exact where all 2^n - 2 coalitions are among the `samples`; else coalitions are drawn in pairs with their opposite.
    """
    _at_least("samples", samples, 2)
    n = len(q.players)
    masks, weights = _coalitions(n, samples, seed)
    if len(masks) < 2 * (n - 1):
        raise ValueError(
            f"samples is {samples} and the text has {n} tokens: shap needs at least two a token, {2 * n}"
        )
    ends = np.stack([np.zeros(n, bool), np.ones(n, bool)])
    values = _values(q, np.concatenate([ends, masks]), absent)
    base, total = values[0], values[1] - values[0]
    # the last token's score is what the others leave of the sum
    z = masks.astype(np.float64)
    y = values[2:] - base - z[:, -1] * total
    root = np.sqrt(weights)[:, None]
    rest = np.linalg.lstsq((z[:, :-1] - z[:, -1:]) * root, y * root[:, 0], rcond=None)[0]
    return _spread(q, np.append(rest, total - rest.sum())), float(total)


def _coalitions(n: int, samples: int, seed: int) -> tuple[Bools, Floats]:
    """Coalitions (M, n), neither empty nor whole, and their weights (M,)."""
    sizes = np.arange(1, n)
    if n <= 20 and 2**n - 2 <= samples:
        numbers = np.arange(1, 2**n - 1)
        masks = (numbers[:, None] >> np.arange(n) & 1).astype(bool)
        kernel = [0.0, *((n - 1) / (comb(n, s) * s * (n - s)) for s in range(1, n))]
        return masks, np.array([kernel[s] for s in masks.sum(1)])
    draw = np.random.default_rng(seed)
    odds = 1.0 / (sizes * (n - sizes))
    drawn = draw.choice(sizes, size=samples // 2, p=odds / odds.sum())
    masks = draw.random((len(drawn), n)).argsort(1).argsort(1) < drawn[:, None]
    masks = np.concatenate([masks, ~masks])
    return masks, np.ones(len(masks))


def _values(q: Question, masks: Bools, absent: str) -> Floats:
    """The scores (M,) with the tokens of each coalition (M, n) there; every different one is computed once."""
    different, place = np.unique(masks, axis=0, return_inverse=True)
    gone = torch.zeros(len(different), len(q.ids), dtype=torch.bool)
    gone[:, q.players] = torch.from_numpy(~different)
    return q.without(gone, absent).numpy()[place.reshape(-1)]


def _spread(q: Question, scores: Floats) -> Tensor:
    """Scores (n,) of the tokens that are explained as those of all tokens (S,)."""
    found = torch.zeros(len(q.ids))
    found[q.players] = torch.from_numpy(scores).float()
    return found


def random(q: Question, seed: int = 0) -> Scored:
    """Scores without meaning, which other methods are compared with."""
    return _spread(q, np.random.default_rng(seed).random(len(q.players))), None


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} is {value}: it must be at least {least}")


# --- all methods ---

METHODS: dict[str, Callable[..., Scored]] = {
    "gradient": gradient,
    "integrated": integrated,
    "smooth": smooth,
    "permutation": permutation,
    "shap": shap,
    "rollout": rollout,
    "gradient-rollout": gradient_rollout,
    "random": random,
}
_WITH_GRADIENTS = ("gradient", "integrated", "smooth", "gradient-rollout")


def explain(question: Question, method: str = "integrated", **options: Any) -> Attribution:
    """The scores of a question's tokens by a method of METHODS; `options` are the method's own."""
    q = question
    if method not in METHODS:
        known = [name for name in METHODS if name != "random"]
        raise ValueError(f"method is {quoted(method)}: choose {', '.join(known)}")
    if method in _WITH_GRADIENTS and (reason := why_not_gradients(q.model)):
        raise ValueError(
            f"the model records no gradient, {reason}: load it in floating point, or choose permutation, shap or "
            "rollout"
        )
    with still(q.model):
        scores, expected = METHODS[method](q, **options)
        value = float(q.scores())
    error = None if expected is None else completeness_error(scores, expected)
    S = len(q.ids)
    return Attribution(
        tuple(q.tokens),
        tuple(q.offsets) or ((0, 0),) * S,
        tuple(q.owners) or (0,) * S,
        tuple(q.words) or (None,) * S,
        scores.float(),
        q.target.name,
        method,
        value,
        error,
        q.texts,
    )
