"""BERT's optimisers, AdamW, LAMB and Muon without decay on biases and norms; schedules of the learning rate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.nn.blocks import QKVProjection, SelfAttention
from fastbert.nn.feed_forward import FeedForward, GatedFeedForward
from fastbert.train.lamb import LAMB
from fastbert.train.muon import Muon
from fastbert.train.settings import TrainingSettings


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trained parameters in two groups, decayed and not, with their names; a group may be empty."""
    # by module and not by name: a norm may be called anything
    norms = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm))
        for name, _ in module.named_parameters(recurse=False)
    }
    decayed: list[tuple[str, Tensor]] = []
    kept: list[tuple[str, Tensor]] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # a single number is a temperature
            free = name in norms or name.rpartition(".")[2] == "bias" or not parameter.dim()
            (kept if free else decayed).append((name, parameter))
    return [
        {
            "params": [parameter for _, parameter in group],
            "names": [name for name, _ in group],
            "weight_decay": decay,
        }
        for group, decay in ((decayed, weight_decay), (kept, 0.0))
    ]


def muon_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trained parameters in groups for Muon: the matrices of attention and feed-forward, then all others.

    The latter are the two groups of `parameter_groups`, without these matrices.
    """
    decayed, kept = parameter_groups(model, weight_decay)
    counts = _hidden_matrices(model)
    groups: dict[int, dict[str, Any]] = {}
    for parameter, name in zip(decayed["params"], decayed["names"], strict=True):
        count = counts.get(parameter, 0)
        empty = {"params": [], "names": [], "weight_decay": weight_decay, "matrices": count}
        group = groups.setdefault(count, empty)
        group["params"].append(parameter)
        group["names"].append(name)
    hidden = [groups[count] for count in sorted(groups, reverse=True)]
    return [*hidden, {**kept, "matrices": 0}]


def _hidden_matrices(model: nn.Module) -> dict[Tensor, int]:
    """The weights of attention and feed-forward, each with the number of matrices that it stacks by rows."""
    found: dict[Tensor, int] = {}
    for block in model.modules():
        if isinstance(block, (SelfAttention, FeedForward, GatedFeedForward)):
            for name, part in block.named_children():
                if isinstance(part, QKVProjection):
                    found[part.weight] = 3
                elif isinstance(part, nn.Linear):
                    gated = isinstance(block, GatedFeedForward) and name == "up"
                    found[part.weight] = 2 if gated else 1
    return found


def make_optimiser(model: nn.Module, config: TrainingSettings) -> torch.optim.Optimizer:
    """Fused AdamW (Loshchilov and Hutter 2019), LAMB (You et al. 2020) or Muon (Jordan et al. 2024) for a model."""
    common: dict[str, Any] = {
        "lr": config.lr,
        "betas": (config.beta1, config.beta2),
        "eps": config.epsilon,
    }
    muon = config.optimiser == "muon"
    groups = (muon_groups if muon else parameter_groups)(model, config.weight_decay)
    for group in groups:
        del group["names"]
    if muon:
        return Muon(groups, **common)
    if config.optimiser == "lamb":
        decayed, kept = groups
        # also where weight_decay is 0
        return LAMB([{**decayed, "always_adapt": True}, kept], **common)
    return torch.optim.AdamW(groups, fused=True, **common)


def learning_rate(step: int, config: TrainingSettings) -> float:
    """The rate of optimiser step `step`, counted from 0, of a run whose number of steps is known.

    It rises over the warm-up and falls to 0 after the last step: "linear" in a line; "wsd" (warm-up, stable, decay; Hu
    et al. 2024) in a line over its last steps; "one-cycle" (Smith and Topin 2018) by half a cosine, and it rises from a
    25th of the peak by half a cosine too.
    """
    assert config.steps is not None
    steps, warmup, peak = config.steps, config.warmup_steps, config.lr
    cycle = config.schedule == "one-cycle"
    if step < warmup:
        part = (step + 1) / warmup
        return peak * (0.04 + 0.96 * _half_cosine(part)) if cycle else peak * part
    length = steps - warmup
    if config.schedule == "wsd":
        length = min(config.decay_steps, length)
    part = min(max(steps - step, 0) / max(length, 1), 1.0)
    return peak * (_half_cosine(part) if cycle else part)


def _half_cosine(part: float) -> float:
    """From 0 at 0 to 1 at 1."""
    return 0.5 - 0.5 * math.cos(math.pi * part)


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Give every group the same rate."""
    for group in optimiser.param_groups:
        group["lr"] = rate
