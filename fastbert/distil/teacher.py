"""The teacher: frozen inference on the training's own batches."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from fastbert.backend import chooser, cpu
from fastbert.data import Batch
from fastbert.distil.plan import Wanted
from fastbert.distil.signals import Recorded, Signals
from fastbert.runners.freeze import quantize, unfreeze


class Teacher:
    """A model in inference, which gives the targets. Its layers run on prepacked weights; with `int8`, in integers."""

    def __init__(self, model: Any, work: Any, wanted: Wanted, int8: bool) -> None:
        self.model = model.eval().requires_grad_(False)
        digest = hashlib.sha256()
        for weight in self.model.parameters():
            digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
        # of the weights: a run is resumed with the same ones only
        self.identity = digest.hexdigest()
        if int8:
            # refuses weights that can't be integers, and sets the bits of int8 modules
            unfreeze(quantize(self.model))
        self._work, self._wanted = work, wanted
        self._tap = Recorded(model.bert, wanted, 12 if int8 else None)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Signals:
        """The signals on a batch."""
        if self._wanted == Wanted():
            return Signals()
        encoder = self.model.bert
        before, encoder.frozen = encoder.frozen, self._tap
        try:
            return self._work.signals(self.model, batch, self._tap, self._wanted)
        finally:
            encoder.frozen = before


def check_int8(device: str) -> None:
    """Raise ValueError where a teacher can't compute in integers on this device."""
    if torch.device(device).type != "cpu" or not chooser.permits(cpu):
        raise ValueError(
            f"int8 is set and the teacher runs on {device}, backend {chooser.forced() or 'of each op'}: integers need "
            "a CPU and the backend cpu"
        )
