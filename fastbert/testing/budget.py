"""The error budget: how far a result may be from the truth, relative to the error of stock PyTorch in the same dtype.

    max |ours - truth| <= 2 max |eager - truth| + 4 eps max |truth|
    rms (ours - truth) <= 2 rms (eager - truth) +   eps rms truth

truth is the reference in fp64, eager the stock ops in the tested dtype, eps that of the dtype of ours. NaN and
infinities must be at the same positions. Where the dtype of eager is narrower than that of ours, with eps', the error
of eager counts as at least eps' / 8 of the value, about the mean error of one rounding: a single number, such as the
loss of a batch, may be exact by chance.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _rms(t: Tensor) -> float:
    return float(t.square().mean().sqrt())


def excess(ours: Tensor, truth: Tensor, eager: Tensor) -> str | None:
    """The sentence that says how `ours` breaks the budget, or None if it keeps it. All three have one shape."""
    if ours.shape != truth.shape:
        return f"shape {tuple(ours.shape)} where the reference has {tuple(truth.shape)}"
    if ours.numel() == 0:
        return None
    eps = torch.finfo(ours.dtype).eps
    a, t, e = (v.detach().to(torch.float64) for v in (ours, truth, eager))
    for kind, test in (("NaN", torch.isnan), ("inf", torch.isinf)):
        if not torch.equal(test(a), test(t)):
            return f"{int(test(a).sum())} {kind} where the reference has {int(test(t).sum())}"
    finite = torch.isfinite(t)
    a, t, e = a[finite], t[finite], e[finite]
    # values of eager that are not finite allow no error
    e = e.where(torch.isfinite(e), t)
    if t.numel() == 0:
        return None
    narrow = torch.finfo(eager.dtype).eps
    least = narrow / 8 if narrow > eps else 0.0
    largest, size = float(t.abs().max()), _rms(t)
    error = float((a - t).abs().max())
    allowed = 2 * max(float((e - t).abs().max()), least * largest) + 4 * eps * largest
    if error > allowed:
        where = int((a - t).abs().argmax())
        return f"max error {error:.3e} > {allowed:.3e} at finite element {where}: {a[where]} for {t[where]}"
    error, allowed = _rms(a - t), 2 * max(_rms(e - t), least * size) + eps * size
    return f"rms error {error:.3e} > {allowed:.3e}" if error > allowed else None


def assert_within_budget(name: str, ours: Tensor, truth: Tensor, eager: Tensor) -> None:
    """Raise AssertionError naming the tensor and the excess when `ours` breaks the budget."""
    message = excess(ours, truth, eager)
    assert message is None, f"{name}: {message}"
