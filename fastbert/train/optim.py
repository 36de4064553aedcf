"""BERT's optimisers, AdamW and LAMB without decay on biases and norms; linear warm-up and decay to zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastbert.train.lamb import LAMB
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


def make_optimiser(model: nn.Module, config: TrainingSettings) -> torch.optim.Optimizer:
    """Fused AdamW (Loshchilov and Hutter 2019) or LAMB (You et al. 2020) on the two groups of `parameter_groups`."""
    decayed, kept = (
        {"params": g["params"], "weight_decay": g["weight_decay"]}
        for g in parameter_groups(model, config.weight_decay)
    )
    common: dict[str, Any] = {
        "lr": config.lr,
        "betas": (config.beta1, config.beta2),
        "eps": config.epsilon,
    }
    if config.optimiser == "lamb":
        # also where weight_decay is 0
        return LAMB([{**decayed, "always_adapt": True}, kept], **common)
    return torch.optim.AdamW([decayed, kept], fused=True, **common)


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """The rate of optimiser step `step`, counted from 0: up over `warmup` steps, then down to 0 after `steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * max(steps - step, 0) / max(steps - warmup, 1)


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Give every group the same rate."""
    for group in optimiser.param_groups:
        group["lr"] = rate
