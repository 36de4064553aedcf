"""Muon (Jordan et al. 2024): momentum whose matrices are orthogonalised, and AdamW for all other parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from fastbert.backend import chooser, cpu
from fastbert.files import quoted

# operations on lists of tensors: a kernel each on a GPU. Each overload is named: the search for one would read every
# row of a tensor as a number
aten = torch.ops.aten

# of the polynomial a s + b s^3 + c s^5 of a singular value s, which five steps bring close to 1
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
# the most numbers of a parameter on a CPU that is updated together with others
_SMALL = 1 << 19
# the least norm by which a matrix is divided
LEAST_NORM = 1e-7


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) with the rates of AdamW (Liu et al. 2025, arXiv 2502.16982), and AdamW beside it.

    A matrix W (R, C) with the gradient G and the momentum M (`momentum_buffer`) becomes, in a step,

        M = momentum M + G,    O = orthogonal(G + momentum M)
        W = (1 - lr weight_decay) W - lr rms sqrt(max(R, C)) O

    `orthogonal` sets the singular values of a matrix to about 1 by five steps of Newton and Schulz's iteration. O times
    the root has a root mean square of about 1, and `rms` gives it that of AdamW's updates, whose lr then fits.

    A group's `matrices` says how many matrices each of its parameters stacks by rows: 3 for the fused weight of
    queries, keys and values. In a group with `matrices` 0 the step is AdamW's, with `betas` and `eps`: embeddings,
    norms, biases and heads belong there (`fastbert.train.optim.muon_groups`). Gradients are not clipped here. FSDP2's
    sharded matrices are gathered, and every process orthogonalises them whole. States have their parameter's dtype:
    keep weights in fp32. fp32 on a CPU runs native products, of which symmetric ones are computed by half, with the
    same bits for any number of threads. All else runs torch's products, on a GPU in bf16.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        rms: float = 0.2,
        matrices: int = 1,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "rms": rms}
        super().__init__(params, {**defaults, "matrices": matrices, "betas": betas, "eps": eps})

    def __setstate__(self, state: dict[str, Any]) -> None:
        for group in state.get("param_groups", []):
            _check(group)
        super().__setstate__(state)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of any optimiser; refuses settings that are out of range and parameters that are not matrices."""
        super().add_param_group(param_group)
        try:
            _check(self.param_groups[-1])
        except ValueError:
            del self.param_groups[-1]
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the parameters that have a gradient; returns what `closure` returns, which is called first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not group["matrices"]:
                self._adamw(params, group)
                continue
            for some in _together(params):
                self._muon(some, group)
        return loss

    def _adamw(self, params: list[Tensor], group: dict[str, Any]) -> None:
        states = [self._state(p, ("exp_avg", "exp_avg_sq")) for p in params]
        for p, state in zip(params, states, strict=True):
            # on the parameter's device, as fused AdamW wants it
            state.setdefault("step", torch.zeros((), dtype=torch.float32, device=p.device))
        beta1, beta2 = group["betas"]
        adamw(
            params,
            [p.grad for p in params if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _muon(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Update parameters of one group, device and dtype."""
        states = [self._state(p, ("momentum_buffer",)) for p in params]
        kept = [_local(p) for p in params], [_local(state["momentum_buffer"]) for state in states]
        wide = torch.promote_types(params[0].dtype, torch.float32)
        weights, buffers = ([t.to(wide) for t in kind] for kind in kept)
        gradients = [_local(p.grad).to(wide) for p in params]
        momentum, lr = group["momentum"], float(group["lr"])
        # No operation here multiplies and adds: torch rounds these once in its vectors and twice in the remainders,
        # whose places depend on the number of threads.
        aten._foreach_mul_.Scalar(buffers, momentum)
        aten._foreach_add_.List(buffers, gradients)
        updates = aten._foreach_mul.Scalar(buffers, momentum)
        aten._foreach_add_.List(updates, gradients)
        updates = _orthogonalised(params, updates, group["matrices"])
        sides = [max(p.shape[0] // group["matrices"], p.shape[1]) for p in params]
        aten._foreach_mul_.ScalarList(updates, [lr * group["rms"] * side**0.5 for side in sides])
        aten._foreach_mul_.Scalar(weights, 1.0 - lr * group["weight_decay"])
        aten._foreach_sub_.List(weights, updates)
        if params[0].dtype != wide:
            aten._foreach_copy_.default(kept[0], weights)
            aten._foreach_copy_.default(kept[1], buffers)

    def _state(self, p: Tensor, names: Sequence[str]) -> dict[str, Any]:
        assert p.grad is not None
        if p.grad.is_sparse or p.is_complex():
            kind = "sparse gradients" if p.grad.is_sparse else "complex parameters"
            raise RuntimeError(
                f"Muon takes no {kind}: give these parameters an optimiser that does"
            )
        state = self.state[p]
        for name in names:
            if name not in state:
                state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return state


def _check(group: dict[str, Any]) -> None:
    """Refuse settings and parameters of a group that Muon cannot take."""
    needed = ("lr", "momentum", "weight_decay", "rms", "matrices", "betas", "eps")
    if missing := [name for name in needed if name not in group]:
        raise ValueError(
            f"a group of parameters has no {', '.join(missing)}: load a state of fastbert's Muon"
        )
    for name in ("lr", "weight_decay", "rms", "eps"):
        if not group[name] >= 0.0:
            raise ValueError(f"{name} is {quoted(group[name])}: it must be at least 0")
    if not 0.0 <= group["momentum"] < 1.0:
        raise ValueError(f"momentum is {quoted(group['momentum'])}: it must be in [0, 1)")
    betas = tuple(group["betas"])
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas is {quoted(betas)}: pass two numbers in [0, 1)")
    count = group["matrices"]
    if type(count) is not int or count < 0:
        raise ValueError(
            f"matrices is {quoted(count)}: pass the number that a parameter stacks, 0 for AdamW"
        )
    for p in group["params"] if count else []:
        if p.dim() != 2 or p.shape[0] % count:
            wanted = "a matrix" if count == 1 else f"{count} matrices one above the other"
            raise ValueError(
                f"a parameter of shape {tuple(p.shape)} is not {wanted}, which its group has: put it into a group "
                "with matrices=0, for AdamW"
            )


def _together(params: list[Tensor]) -> list[list[Tensor]]:
    """The parameters by device and dtype; large ones on a CPU each by itself, whose passes find it in cache."""
    found: dict[Any, list[Tensor]] = {}
    for i, p in enumerate(params):
        alone = p.device.type == "cpu" and p.numel() > _SMALL
        found.setdefault((p.device, p.dtype, i if alone else None), []).append(p)
    return list(found.values())


def _local(t: Any) -> Tensor:
    """The part of a tensor that this process has: all of it but of a DTensor."""
    return t.to_local() if hasattr(t, "to_local") else t


def _orthogonalised(params: list[Any], updates: list[Tensor], matrices: int) -> list[Tensor]:
    """This process's parts of the orthogonalised updates; those of sharded parameters are gathered before."""
    sharded = [hasattr(p, "placements") for p in params]
    if not any(sharded):
        return orthogonalise(updates, matrices)
    from torch.distributed.tensor import DTensor, Replicate

    whole = []
    for p, update in zip(params, updates, strict=True):
        if hasattr(p, "placements"):
            spread = (p.device_mesh, p.placements)
            parts = DTensor.from_local(update, *spread, shape=p.shape, stride=p.stride())
            update = parts.full_tensor()
        whole.append(update)
    found = orthogonalise(whole, matrices)
    for i, p in enumerate(params):
        if sharded[i]:
            everywhere = [Replicate()] * p.device_mesh.ndim
            result = DTensor.from_local(found[i], p.device_mesh, everywhere)
            found[i] = result.redistribute(placements=p.placements).to_local()
    return found


def orthogonalise(updates: list[Tensor], matrices: int = 1) -> list[Tensor]:
    """The orthogonalised matrices of tensors of one device and dtype, each a stack of `matrices` (R, C) by rows."""
    views = [u.contiguous().view(matrices, u.shape[0] // matrices, u.shape[1]) for u in updates]
    found = list(views)
    shapes: dict[torch.Size, list[int]] = {}
    for i, view in enumerate(views):
        if view.numel():
            shapes.setdefault(view.shape[1:], []).append(i)
    for places in shapes.values():
        some = [views[i] for i in places]
        results = (_native if _is_native(some[0]) else _plain)(some)
        for i, result in zip(places, results, strict=True):
            found[i] = result
    return [t.view(u.shape) for t, u in zip(found, updates, strict=True)]


def _is_native(x: Tensor) -> bool:
    if cpu.unavailable is not None or not chooser.permits(cpu):
        return False
    return x.device.type == "cpu" and x.dtype == torch.float32


def _native(some: list[Tensor]) -> list[Tensor]:  # each (n, R, C)
    found = [torch.empty_like(x) for x in some]
    pairs = zip(some, found, strict=True)
    places = [(a.data_ptr(), b.data_ptr()) for x, out in pairs for a, b in zip(x, out, strict=True)]
    table = torch.tensor(places, dtype=torch.int64)
    rows, columns = some[0].shape[1:]
    a, b, c = COEFFICIENTS
    threads = torch.get_num_threads()
    cpu.native.muon_orthogonalise(
        table.data_ptr(), len(places), rows, columns, STEPS, a, b, c, threads
    )
    return found


def _plain(some: list[Tensor]) -> list[Tensor]:
    """In torch's operations, for tensors (n, R, C) of one shape at once; on a GPU in bf16, but fp64 stays fp64."""
    x = torch.cat(some)
    kind = x.dtype
    norms = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp_(min=LEAST_NORM)
    x = x / norms
    if x.device.type != "cpu" and kind != torch.float64:
        x = x.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return list((x.mT if tall else x).to(kind).contiguous().split(some[0].shape[0]))
