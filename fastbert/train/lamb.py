"""LAMB (You et al. 2020): Adam whose update of a parameter tensor is as long as the tensor itself, times the rate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastbert.backend import chooser, cpu
from fastbert.files import quoted

# operations on lists of tensors: a kernel each on a GPU. Each overload is named: the search for one would read every
# row of a tensor as a number
aten = torch.ops.aten


class LAMB(torch.optim.Optimizer):
    """LAMB (You et al. 2020, arXiv 1904.00962, algorithm 2), for large batches.

    A parameter tensor p with the gradient g and the moments m (`exp_avg`) and v (`exp_avg_sq`) becomes, in step t,

        m = beta1 m + (1 - beta1) g,    v = beta2 v + (1 - beta2) g^2
        update = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay p
        p = p - lr ratio update,        ratio = |p| / |update|, or 1 where one of the norms is 0

    The ratio is 1 too in groups without weight decay, where biases and LayerNorm belong
    (`fastbert.train.optim.parameter_groups`), unless the group has `always_adapt`: as in timm's Lamb, and as
    `use_nvlamb` in NVIDIA's FusedLAMB. Gradients are not clipped here. Norms are of whole tensors, also of those that
    FSDP2 has sharded. Moments have their parameter's dtype, as torch.optim.AdamW's: keep weights in fp32, since v stops
    decaying in bf16. fp32 on a CPU runs two native passes over the memory, with the same bits for any number of
    threads; all else runs torch's operations.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        always_adapt: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "always_adapt": always_adapt})

    def __setstate__(self, state: dict[str, Any]) -> None:
        # the state of AdamW has the same moments
        for group in state.get("param_groups", []):
            group.setdefault("always_adapt", False)
            _check(group)
        super().__setstate__(state)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of any optimiser; refuses settings that are out of range."""
        _check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the parameters that have a gradient; returns what `closure` returns, which is called first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    kinds.setdefault((p.device, p.dtype), []).append(p)
            for params in kinds.values():
                self._step(params, group)
        return loss

    def _step(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Update parameters of one group, device and dtype."""
        beta1, beta2 = group["betas"]
        states = [self._state(p) for p in params]
        corrections = []
        for state in states:
            state["step"] += 1
            t = float(state["step"])
            corrections.append((1.0 / (1.0 - beta1**t), (1.0 - beta2**t) ** -0.5))
        parts = _Parts(
            [_local(p) for p in params],
            [_local(p.grad) for p in params],
            [_local(state["exp_avg"]) for state in states],
            [_local(state["exp_avg_sq"]) for state in states],
            corrections,
        )
        passes = (_Native if _is_native(parts) else _Plain)(parts, group)
        squares = passes.moments()
        rate = float(group["lr"])
        if group["weight_decay"] or group["always_adapt"]:
            norms = _over_processes(squares, params).sqrt()
            ratios = norms[:, 0] / norms[:, 1]
            rates = rate * torch.where((norms == 0).any(1), 1.0, ratios)
        else:
            rates = torch.full_like(squares[:, 0], rate)
        passes.update(rates)

    def _state(self, p: Tensor) -> dict[str, Any]:
        assert p.grad is not None
        if p.grad.is_sparse or p.is_complex():
            kind = "sparse gradients" if p.grad.is_sparse else "complex parameters"
            raise RuntimeError(
                f"LAMB takes no {kind}: give these parameters an optimiser that does"
            )
        state = self.state[p]
        if not state:
            state["step"] = torch.tensor(0.0)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return state


def _check(group: dict[str, Any]) -> None:
    """Refuse settings of a group that LAMB cannot take."""
    if missing := [name for name in ("lr", "betas", "eps", "weight_decay") if name not in group]:
        raise ValueError(
            f"a group of parameters has no {', '.join(missing)}: load a state of LAMB or AdamW"
        )
    for name in ("lr", "eps", "weight_decay"):
        if not group[name] >= 0.0:
            raise ValueError(f"{name} is {quoted(group[name])}: it must be at least 0")
    betas = tuple(group["betas"])
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas is {quoted(betas)}: pass two numbers in [0, 1)")
    for name in ("maximize", "amsgrad"):
        if group.get(name):
            raise ValueError(
                f"the state has {name}=True, which LAMB does not have: train with AdamW"
            )


@dataclass(frozen=True)
class _Parts:
    """What this process has of some parameters and of their gradients and moments."""

    p: list[Tensor]
    g: list[Tensor]
    m: list[Tensor]
    v: list[Tensor]
    # 1 / (1 - beta1^t) and 1 / sqrt(1 - beta2^t)
    corrections: list[tuple[float, float]]


class _Native:
    """The two passes of csrc/cpu/lamb.cpp."""

    def __init__(self, parts: _Parts, group: dict[str, Any]) -> None:
        self.parts = parts
        self.group = group
        rows = [
            [*(t.data_ptr() for t in row), row[0].numel()]
            for row in zip(parts.p, parts.g, parts.m, parts.v, strict=True)
        ]
        self.tensors = torch.tensor(rows, dtype=torch.int64)
        self.corrections = torch.tensor(parts.corrections, dtype=torch.float64)

    def moments(self) -> Tensor:
        """Move the moments; returns the squares of the norms of each parameter and of its update, (n, 2) fp64."""
        squares = torch.empty_like(self.corrections)
        beta1, beta2 = self.group["betas"]
        cpu.native.lamb_moments(
            self.tensors.data_ptr(),
            self.corrections.data_ptr(),
            squares.data_ptr(),
            len(squares),
            beta1,
            beta2,
            self.group["eps"],
            self.group["weight_decay"],
            torch.get_num_threads(),
        )
        return squares

    def update(self, rates: Tensor) -> None:
        """Subtract the updates times their rates (n,) fp64."""
        cpu.native.lamb_update(
            self.tensors.data_ptr(),
            self.corrections.data_ptr(),
            rates.data_ptr(),
            len(rates),
            self.group["eps"],
            self.group["weight_decay"],
            torch.get_num_threads(),
        )
        for p in self.parts.p:
            torch.autograd.graph.increment_version(p)


class _Plain:
    """The same two passes in torch's operations, in fp32 for narrower dtypes."""

    def __init__(self, parts: _Parts, group: dict[str, Any]) -> None:
        self.parts = parts
        self.group = group
        self.wide = torch.promote_types(parts.p[0].dtype, torch.float32)
        self.p, self.g, self.m, self.v = (
            [t.to(self.wide) for t in kind] for kind in (parts.p, parts.g, parts.m, parts.v)
        )

    def moments(self) -> Tensor:
        """Move the moments; returns the squares of the norms of each parameter and of its update, (n, 2)."""
        beta1, beta2 = self.group["betas"]
        aten._foreach_lerp_.Scalar(self.m, self.g, 1.0 - beta1)
        aten._foreach_lerp_.Scalar(self.v, aten._foreach_mul.List(self.g, self.g), 1.0 - beta2)
        self._narrow(self.parts.m, self.m)
        self._narrow(self.parts.v, self.v)
        of_m, of_v = (list(column) for column in zip(*self.parts.corrections, strict=True))
        roots = aten._foreach_sqrt.default(self.v)
        aten._foreach_mul_.ScalarList(roots, of_v)
        aten._foreach_add_.Scalar(roots, self.group["eps"])
        self.updates = aten._foreach_mul.ScalarList(self.m, of_m)
        aten._foreach_div_.List(self.updates, roots)
        aten._foreach_add_.List(self.updates, self.p, alpha=self.group["weight_decay"])
        # torch adds fp32 on a CPU one by one
        exact = torch.float64 if self.p[0].device.type == "cpu" else self.wide
        norms = [aten._foreach_norm.Scalar(t, dtype=exact) for t in (self.p, self.updates)]
        return torch.stack([torch.stack(column) for column in norms], 1).square()

    def update(self, rates: Tensor) -> None:
        """Subtract the updates times their rates (n,)."""
        aten._foreach_mul_.List(self.updates, list(rates.unbind()))
        aten._foreach_sub_.List(self.p, self.updates)
        self._narrow(self.parts.p, self.p)

    def _narrow(self, kept: list[Tensor], wide: list[Tensor]) -> None:
        if kept[0].dtype != self.wide:
            aten._foreach_copy_.default(kept, wide)


def _local(t: Any) -> Tensor:
    """The part of a tensor that this process has: all of it but of a DTensor."""
    return t.to_local() if hasattr(t, "to_local") else t


def _is_native(parts: _Parts) -> bool:
    if cpu.unavailable is not None or not chooser.permits(cpu):
        return False
    return all(
        t.device.type == "cpu"
        and t.dtype == torch.float32
        and t.is_contiguous()
        and t.shape == row[0].shape
        for row in zip(parts.p, parts.g, parts.m, parts.v, strict=True)
        for t in row
    )


def _over_processes(squares: Tensor, params: list[Any]) -> Tensor:
    """The squares (n, 2) with those of sharded parameters summed over the processes that hold their parts."""
    sharded: dict[Any, list[int]] = {}
    for i, p in enumerate(params):
        for dimension, placement in enumerate(getattr(p, "placements", ())):
            if placement.is_shard():
                sharded.setdefault((p.device_mesh, dimension), []).append(i)
    for (mesh, dimension), rows in sharded.items():
        part = squares[rows]
        dist.all_reduce(part, group=mesh.get_group(dimension))
        squares[rows] = part
    return squares
