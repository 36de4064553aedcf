"""Text from a GPT: the prompts in one packed call, then a token of every unfinished text at a time.

Keys and values of earlier tokens are kept. On a CPU all layers of a step are one native call on prepacked weights
(csrc/cpu/decode.cpp); elsewhere stock attention reads a padded grid of them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from operator import index
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as tnf

from fastbert import functional as F
from fastbert.backend import cpu
from fastbert.files import quoted
from fastbert.models.decoder import GPTForCausalLM
from fastbert.nn.base import evaluating
from fastbert.nn.packing import Packing
from fastbert.runners.frozen import Frozen

# tokens of which a sequence's memory is a multiple, and its columns of a head: kHeldStep of csrc/cpu/decode.h
_STEP = 32


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from its scores; raises ValueError for values that can't be.

    At `temperature` 0 it is the most probable one. Above, softmax(scores / temperature) is cut to the `top_k` most
    probable tokens, then to the fewest of the remaining that hold `top_p` of their probability.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        t, k, p = self.temperature, self.top_k, self.top_p
        if not isinstance(t, Real) or not 0.0 <= t < math.inf:
            raise ValueError(f"temperature is {quoted(t)}: it must be at least 0")
        if k is not None and (not isinstance(k, Integral) or isinstance(k, bool) or k < 1):
            raise ValueError(f"top_k is {quoted(k)}: it must be at least 1")
        if p is not None and (not isinstance(p, Real) or not 0.0 < p <= 1.0):
            raise ValueError(f"top_p is {quoted(p)}: it must be above 0 and at most 1")
        if t == 0.0 and (k is not None or p is not None):
            raise ValueError(
                "top_k or top_p is set and temperature is 0, which takes the most probable token: set temperature"
            )

    def pick(self, scores: Tensor, u: float) -> int:
        """The token at `u` in [0, 1) of the distribution of scores (V,); raises ValueError for scores of nan."""
        # nan counts as the highest score
        best = int(scores.argmax())
        if not math.isfinite(highest := float(scores[best])):
            raise ValueError(
                f"the highest score of a next token is {highest}: the model's weights are damaged, or too large for "
                "its dtype"
            )
        if self.temperature == 0.0:
            return best
        z = scores.double() / self.temperature
        ids = torch.arange(len(z), device=z.device)
        if self.top_k is not None and self.top_k < len(z):
            # all tokens as probable as the last one
            ids = (z >= z.topk(self.top_k).values[-1]).nonzero()[:, 0]
        z, order = z[ids].sort(descending=True, stable=True)
        shares = z.softmax(0)
        sums = shares.cumsum(0)
        if self.top_p is not None:
            sums = sums[: int((sums - shares < self.top_p).sum())]
        place = int(torch.searchsorted(sums, sums[-1] * u, right=True))
        return int(ids[order[min(place, len(sums) - 1)]])


class _Cache(Protocol):
    """The keys and values of unfinished texts."""

    def begin(self, ids: Tensor, packing: Packing) -> Tensor:
        """Read the prompts; scores (B, V) of the tokens that follow."""

    def step(self, ids: Tensor) -> Tensor:
        """Read one token a text (B,); scores (B, V) of the tokens that follow."""

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these texts alone."""


class _NativeCache:
    """The cache of the native call, in which every text has its own memory."""

    def __init__(self, model: GPTForCausalLM, frozen: Frozen, sizes: Sequence[int]) -> None:
        c = model.config
        self.model, self.frozen = model, frozen
        width = -(-c.head_size // _STEP) * _STEP
        each = 2 * c.num_hidden_layers * c.num_attention_heads * width
        capacities = [-(-size // _STEP) * _STEP for size in sizes]
        self.memory = [torch.empty(each * capacity) for capacity in capacities]
        # (B, 3): Held of csrc/cpu/decode.h
        rows = [[m.data_ptr(), n, 0] for m, n in zip(self.memory, capacities, strict=True)]
        self.held = torch.tensor(rows, dtype=torch.int64)
        self.head = _PackedHead(model, frozen)

    def begin(self, ids: Tensor, packing: Packing) -> Tensor:
        x = self.model.bert.embeddings(ids, packing.positions(len(ids)))
        lasts = packing.cu_seqlens[1:].long() - 1
        return self._run(x, packing, lasts, packing.cu_seqlens.diff())

    def step(self, ids: Tensor) -> Tensor:
        x = self.model.bert.embeddings(ids, self.held[:, 2].contiguous())
        bounds = torch.arange(len(ids) + 1, dtype=torch.int32)
        return self._run(x, Packing.given(bounds, 1), None, torch.ones(1))

    def _run(self, x: Tensor, packing: Packing, rows: Tensor | None, more: Tensor) -> Tensor:
        bert = self.model.bert
        none = [None] * len(bert.layers)
        y = bert.normed(self.frozen.encode(bert, x, packing, rows, none, self.held))
        self.held[:, 2] += more.long()
        return self.head(y)

    def keep(self, rows: Sequence[int]) -> None:
        self.memory = [self.memory[row] for row in rows]
        self.held = self.held[list(rows)]


class _PackedHead:
    """The decoder to the vocabulary on a prepacked copy of its weight."""

    def __init__(self, model: GPTForCausalLM, frozen: Frozen) -> None:
        self.model = model
        decoder, word = model.mlm_head.decoder, model.bert.embeddings.word
        weight = word.weight if decoder is None else decoder.weight
        whole = isinstance(weight, Tensor) and weight.dtype == torch.float32
        self.packed = frozen.table(weight) if whole else None
        self.size = weight.shape[0]

    def __call__(self, x: Tensor) -> Tensor:  # (B, C) -> (B, V)
        if self.packed is None:
            return _scores(self.model, x)
        kind, threads = cpu.DTYPES[torch.float32], torch.get_num_threads()
        y = x.new_empty(x.shape[0], self.size)
        x = x.contiguous()
        weight = (0, 0, 0, 1, self.packed.data_ptr(), 0)
        sizes = (x.shape[0], self.size, x.shape[1])
        cpu.native.linear_fwd(kind, kind, x.data_ptr(), *weight, y.data_ptr(), *sizes, threads)
        return y


class _GridCache:
    """The cache in stock PyTorch: a grid (B, H, size, D) of keys and one of values for every layer."""

    def __init__(self, model: GPTForCausalLM, sizes: Sequence[int]) -> None:
        self.model, self.size = model, max(sizes)
        self.grids: list[tuple[Tensor, Tensor]] = []
        self.tokens = torch.zeros(0)

    def begin(self, ids: Tensor, packing: Packing) -> Tensor:
        bert, cu_seqlens, longest = self.model.bert, packing.cu_seqlens, packing.max_seqlen
        x = bert.embeddings(ids, packing.positions(len(ids)))
        for layer, window in zip(bert.layers, self.model.config.windows, strict=True):

            def attend(qkv: Tensor, window: Any = window) -> Any:
                grid = packing.spread(qkv).permute(2, 0, 3, 1, 4)  # (3, B, H, S, D)
                room = tnf.pad(grid[1:], (0, 0, 0, self.size - longest))
                self.grids.append((room[0], room[1]))
                return F.attention(qkv, cu_seqlens, longest, window=window)

            x = _layer(layer, x, attend)
        self.tokens = cu_seqlens.diff().long()
        return _scores(self.model, bert.normed(x.index_select(0, cu_seqlens[1:].long() - 1)))

    def step(self, ids: Tensor) -> Tensor:
        bert, rows = self.model.bert, torch.arange(len(ids), device=ids.device)
        x = bert.embeddings(ids, self.tokens)
        size = int(self.tokens.max()) + 1
        seen = torch.arange(size, device=ids.device) <= self.tokens[:, None]
        for layer, (keys, values) in zip(bert.layers, self.grids, strict=True):

            def attend(qkv: Tensor, keys: Tensor = keys, values: Tensor = values) -> Tensor:
                q, k, v = qkv.unbind(1)  # each (B, H, D)
                keys[rows, :, self.tokens], values[rows, :, self.tokens] = k, v
                kept = keys[:, :, :size], values[:, :, :size]
                return tnf.scaled_dot_product_attention(
                    q[:, :, None], *kept, attn_mask=seen[:, None, None]
                )[:, :, 0]

            x = _layer(layer, x, attend)
        self.tokens = self.tokens + 1
        return _scores(self.model, bert.normed(x))

    def keep(self, rows: Sequence[int]) -> None:
        place = torch.tensor(rows, device=self.tokens.device)
        self.tokens = self.tokens[place]
        self.grids = [(keys[place], values[place]) for keys, values in self.grids]


def _layer(layer: Any, x: Tensor, attend: Any) -> Tensor:
    """A pre-norm layer in evaluation, whose attention `attend` computes from qkv (T, 3, H, D)."""
    y = attend(layer.attention.qkv(layer.attention_input(x)))
    x = x + layer.attention.out(y.flatten(1))
    return x + layer.feed_forward(layer.output_norm(x))


def _scores(model: GPTForCausalLM, x: Tensor) -> Tensor:
    """(B, C) -> (B, V)."""
    word: Any = model.bert.embeddings.word
    return model.mlm_head(x, word.weight if isinstance(word, torch.nn.Embedding) else word)


@torch.no_grad()
def generate(
    model: GPTForCausalLM,
    prompts: Sequence[Sequence[int] | Tensor],  # token ids of every prompt, of any lengths
    max_new_tokens: int = 32,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | Sequence[int] = 0,
    eos: int | Sequence[int] | None = None,
) -> list[Tensor]:
    """Continue prompts without padding them; returns the new tokens of each (n,) int64, with the `eos` that ended it.

    `Sampling` explains temperature, top_k and top_p. A draw depends on the seed, the prompt's tokens and the number of
    new tokens before it, and on nothing else in the batch: the same prompt with the same seed has the same text. Pass a
    seed per prompt for several texts of one. A text ends at a token of `eos`, or after max_new_tokens.

    On the CPU backend in fp32 a prompt's scores are bitwise those that it has alone, in int8 too. The weights are
    prepacked for the call; after `freeze` or `quantize` the copies are kept for the next one. Other backends
    and dtypes, and weights that freeze can't read, run stock attention on a padded grid of keys. Raises TypeError for
    another model, ValueError for an empty prompt, one too long for the model's positions, and settings that can't be,
    IndexError for ids outside the vocabulary.
    """
    if not isinstance(model, GPTForCausalLM):
        raise TypeError(f"model is a {type(model).__name__}: pass a GPTForCausalLM")
    sampling = Sampling(temperature, top_k, top_p)
    ids = _checked(model, prompts, max_new_tokens)
    if not ids:
        return []
    seeds = _seeds(seed, len(ids))
    given = [] if eos is None else _whole("eos", eos)
    ends = set(given) if isinstance(given, list) else {given}
    draws = [_Draws(s, prompt) for s, prompt in zip(seeds, ids, strict=True)]
    with evaluating(model):
        return _run(model, ids, max_new_tokens, sampling, draws, ends)


def _run(
    model: GPTForCausalLM,
    prompts: list[Tensor],
    count: int,
    sampling: Sampling,
    draws: list[_Draws],
    ends: set[int],
) -> list[Tensor]:
    device = model.device
    lengths = torch.tensor([len(p) for p in prompts])
    bounds = tnf.pad(lengths.cumsum(0), (1, 0)).int().to(device)
    packing = Packing.given(bounds, int(lengths.max()))
    cache = _cache(model, [len(p) + count - 1 for p in prompts])
    scores = cache.begin(torch.cat(prompts).to(device), packing)
    texts: list[list[int]] = [[] for _ in prompts]
    live = list(range(len(prompts)))
    for step in range(count):
        new = [sampling.pick(scores[r], draws[i](step)) for r, i in enumerate(live)]
        for i, token in zip(live, new, strict=True):
            texts[i].append(token)
        rows = [r for r, token in enumerate(new) if token not in ends]
        if not rows or step == count - 1:
            break
        if len(rows) < len(live):
            cache.keep(rows)
            live = [live[r] for r in rows]
        scores = cache.step(torch.tensor([new[r] for r in rows], device=device))
    return [torch.tensor(text, dtype=torch.int64) for text in texts]


def _cache(model: GPTForCausalLM, sizes: Sequence[int]) -> _Cache:
    """The native cache where the layers can run in the native call, else a grid."""
    frozen = Frozen() if model.bert.frozen is None else model.bert.frozen
    # an embedding as the layers will get it, whose dtype and device decide
    first = torch.zeros(1, dtype=torch.int64, device=model.device)
    x = model.bert.embeddings(first, first)
    if x.dtype == torch.float32 and frozen.serves(model.bert, x):
        return _NativeCache(model, frozen, sizes)
    return _GridCache(model, sizes)


class _Draws:
    """Uniform numbers in [0, 1) that depend on a seed, a prompt and a counter alone."""

    def __init__(self, seed: int, prompt: Tensor) -> None:
        self.key = hashlib.blake2b(seed.to_bytes(8, "little"), digest_size=8)
        self.key.update(prompt.numpy().astype("<i8").tobytes())

    def __call__(self, counter: int) -> float:
        own = self.key.copy()
        own.update(counter.to_bytes(8, "little"))
        return (int.from_bytes(own.digest(), "little") >> 11) * 2.0**-53


def _checked(
    model: GPTForCausalLM, prompts: Sequence[Sequence[int] | Tensor], count: int
) -> list[Tensor]:
    """Every prompt's ids as a tensor on the CPU."""
    c = model.config
    if not isinstance(count, Integral) or isinstance(count, bool) or count < 1:
        raise ValueError(
            f"max_new_tokens is {quoted(count)}: it must be a whole number of at least 1"
        )
    if c.layer_heads is not None:
        raise ValueError(
            "layer_heads is set and generate takes layers that have the same heads: save the model with "
            "save_pretrained(..., padded=True) and load that"
        )
    for i, p in enumerate(prompts, 1):
        if isinstance(p, str):
            raise TypeError(f"prompt {i} is a str: pass token ids, or call a fastbert.infer.Writer")
    found = [torch.as_tensor(p, device="cpu") for p in prompts]
    for i, p in enumerate(found, 1):
        if p.dim() != 1 or len(p) == 0:
            raise ValueError(
                f"prompt {i} has shape {tuple(p.shape)}: pass one list of token ids, with at least one"
            )
        if p.is_floating_point() or p.dtype == torch.bool:
            raise TypeError(f"prompt {i} is {p.dtype}: pass int64 token ids")
        if not 0 <= int(p.min()) <= int(p.max()) < c.vocab_size:
            raise IndexError(
                f"prompt {i} has ids from {int(p.min())} to {int(p.max())}, and the vocabulary {c.vocab_size} tokens: "
                "encode it with the model's own tokenizer"
            )
        # the last new token is not read
        if len(p) + count - 1 > c.max_length:
            raise ValueError(
                f"prompt {i} has {len(p)} tokens and max_new_tokens is {count}: the model has {c.max_length} "
                "positions, shorten one of them"
            )
    return [p.long() for p in found]


def _seeds(seed: int | Sequence[int], count: int) -> list[int]:
    given = _whole("seed", seed)
    seeds = given if isinstance(given, list) else [given] * count
    if len(seeds) != count:
        raise ValueError(f"there are {len(seeds)} seeds and {count} prompts: pass one each, or one")
    for s in seeds:
        if not 0 <= s < 1 << 63:
            raise ValueError(f"seed is {quoted(s)}: it must be a whole number from 0 to 2^63 - 1")
    return seeds


def _whole(name: str, value: Any) -> int | list[int]:
    """A whole number, or several, of Python, numpy or torch."""
    try:
        return index(value)
    except TypeError:
        pass
    try:
        return [index(v) for v in value]
    except TypeError:
        raise ValueError(
            f"{name} is {quoted(value)}: it must be a whole number, or a list of them"
        ) from None
