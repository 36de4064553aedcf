"""BERT's optimisers, AdamW, LAMB and Muon without decay on biases and norms; linear warm-up and decay to zero."""

from __future__ import annotations

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
            free = name in norms or name.rpartition(".")[2] == "bias"
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


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """The rate of optimiser step `step`, counted from 0: up over `warmup` steps, then down to 0 after `steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * max(steps - step, 0) / max(steps - warmup, 1)


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Give every group the same rate."""
    for group in optimiser.param_groups:
        group["lr"] = rate
