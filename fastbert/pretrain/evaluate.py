"""Evaluation on held-out documents under one fixed mask.

One labelled token in ten is left visible, which lowers the loss over all labelled tokens. `mlm_loss_masked` and
`accuracy_masked` count only the places where the input is [MASK]. A GPT is judged by every next word, `lm_loss`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as tnf

from fastbert.data import Batch
from fastbert.train.metrics import wilson
from fastbert.train.session import autocast
from fastbert.train.world import World


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    mask_id: int,
    precision: str = "fp32",
    world: World | None = None,
    judged: Callable[[Batch, int], Tensor] | None = None,
) -> dict[str, float]:
    """Judge a pretraining model on packed batches: MLM or next-word loss, perplexity and accuracy, NSP accuracy.

    Loss and accuracy are means over labelled tokens, and once more over those whose input is `mask_id`. Processes share
    the batches. `judged` is `judge` bound to a model whose weights are spread over processes, which gathers them.
    """
    device, world = next(model.parameters()).device, world or World()
    judged = judged or partial(judge, model)
    # loss, right and count over labelled tokens; the same over [MASK]; pairs right and count
    sums = torch.zeros(8, dtype=torch.float64, device=device)
    training, number = model.training, -1
    model.eval()
    try:
        with torch.no_grad(), autocast(device, precision):
            for number, batch in enumerate(batches):
                if number % world.size == world.rank:
                    sums += judged(batch.to(device), mask_id)
            if 0 < (number + 1) % world.size <= world.rank:
                # this process has no batch left, but others may need its part of the weights: it repeats the last batch
                judged(batch.to(device), mask_id)
    finally:
        model.train(training)
    loss, right, n, masked_loss, masked_right, masked_n, pairs_right, pairs = world.totals(
        *sums.tolist()
    )
    if getattr(model, "causal", False):
        perplexity = math.exp(min(loss / n, 700.0))
        return {"lm_loss": loss / n, "perplexity": perplexity, "accuracy": right / n, "labelled": n}
    if masked_n == 0:
        raise ValueError("the held-out data has no masked token: hold out more of the documents")
    values = {
        "mlm_loss": loss / n,
        "perplexity": math.exp(min(loss / n, 700.0)),
        "accuracy": right / n,
        "mlm_loss_masked": masked_loss / masked_n,
        "accuracy_masked": masked_right / masked_n,
        "labelled": n,
        "masked": masked_n,
    }
    if pairs:
        low, high = wilson(int(pairs_right), int(pairs))
        values |= {"nsp_accuracy": pairs_right / pairs, "nsp_low": low, "nsp_high": high}
        values["pairs"] = pairs
    return values


def judged_loss(values: dict[str, float]) -> float:
    """The loss of an evaluation that a run is to lower: where [MASK], or of next words; infinite without either."""
    return values.get("lm_loss", values.get("mlm_loss_masked", math.inf))


def judge(model: Any, batch: Batch, mask_id: int) -> Tensor:
    """The eight sums of one batch: of loss, right and count, of these at [MASK], of pairs right and count."""
    rows, ids = batch["label_rows"], batch["input_ids"]
    encoded = model.bert(**batch.inputs)
    # only the labelled rows reach the decoder
    hidden = encoded.last_hidden_state.index_select(0, rows)  # (R, C)
    logits = model.mlm_head(hidden, model.bert.embeddings.word.weight).float()  # (R, V)
    # a GPT's rows are those before the labelled tokens
    labels = batch["labels"].index_select(0, rows + bool(getattr(model, "causal", False)))
    loss = tnf.cross_entropy(logits, labels, reduction="none").double()
    right = (logits.argmax(1) == labels).double()
    masked = (ids.index_select(0, rows) == mask_id).double()
    one = torch.ones_like(loss)
    terms = [loss, right, one, loss * masked, right * masked, masked]
    sums = [term.sum() for term in terms]
    answers = batch.get("next_sentence_label")
    if answers is None:
        return torch.stack([*sums, loss.new_zeros(()), loss.new_zeros(())])
    chosen = model.nsp_head(encoded.pooler_output).argmax(1)
    return torch.stack([*sums, (chosen == answers).double().sum(), one.new_tensor(len(answers))])
