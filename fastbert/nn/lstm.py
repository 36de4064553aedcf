"""Drop-in for torch.nn.LSTM on packed tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from fastbert import functional as F
from fastbert.files import quoted
from fastbert.nn.drop_in import log_stock, why_not_fused
from fastbert.nn.exports import replaces
from fastbert.nn.packing import Packing
from fastbert.ops._check import cu_seqlens_valid
from fastbert.ops.context import autocast_dtype

States = tuple[Tensor, Tensor]

# dtypes of the kernel
_DTYPES = (torch.float32, torch.bfloat16)


class _Permuted(torch.autograd.Function):
    """The rows of x in another order. The gradient of index_select would add rows one by one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(order, back)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        order, back = ctx.saved_tensors
        return _Permuted.apply(dy, back, order), None, None


def _sequences(batch_sizes: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Lengths (B,) of a PackedSequence of `tokens` rows, and its rows (T,), sequence after sequence; int64 on the CPU.

    Raises ValueError for batch_sizes that no sequences have.
    """
    if bool((batch_sizes.diff() > 0).any()) or int(batch_sizes.sum()) > tokens:
        raise ValueError(
            f"batch_sizes {str(batch_sizes.tolist())[:100]} of the PackedSequence grow, or count more than its "
            f"{tokens} rows: make it with pack_sequence or pack_padded_sequence"
        )
    number = torch.arange(int(batch_sizes[0]))[:, None]
    there = number < batch_sizes  # (B, S)
    first = batch_sizes.cumsum(0) - batch_sizes
    return there.sum(1), (first + number)[there]


def _is_pair(hx: Any) -> bool:
    """Whether hx can be read as (h_0, c_0); torch also takes a tensor of both."""
    if isinstance(hx, (tuple, list)):
        return len(hx) == 2 and all(isinstance(t, Tensor) for t in hx)
    return isinstance(hx, Tensor) and len(hx) == 2


class LSTM(nn.LSTM):
    """torch.nn.LSTM, with the recurrence of all sequences in one kernel and nothing computed at padding.

    Constructor arguments, parameters, state-dict keys, initial values, inputs and outputs are those of torch.nn.LSTM:
    a padded batch (S, B, C) or, with batch_first, (B, S, C), one sequence (S, C), or a PackedSequence. Packed tokens
    (T, C) come with `cu_seqlens` (B + 1,) int32 and `max_seqlen`, as BertModel takes them; outputs are then packed too,
    with zeros past cu_seqlens[-1], and an empty sequence keeps its initial state.

    float32 and bfloat16 tensors on the CPU run the op `lstm`; everything else runs torch's own code, and the log says
    why. proj_size is refused.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if proj_size:
            raise ValueError(
                f"proj_size is {proj_size}: fastbert.nn.LSTM has no projection, leave it 0 or use torch.nn.LSTM"
            )
        if not isinstance(bidirectional, bool):
            raise TypeError(f"bidirectional is {quoted(bidirectional)}: pass True or False")
        super().__init__(
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
        )

    def __prepare_scriptable__(self) -> nn.LSTM:
        """What torch.jit.script compiles: torch's own module with the same parameters."""
        twin = nn.LSTM.__new__(nn.LSTM)
        twin.__dict__ = self.__dict__
        return twin

    @replaces(nn.LSTM, own=("cu_seqlens", "max_seqlen"))
    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: States | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> tuple[Any, States]:
        data = input.data if isinstance(input, PackedSequence) else input
        if not isinstance(data, Tensor):
            raise TypeError(
                f"the input is a {type(input).__name__}: pass a tensor or PackedSequence"
            )
        if hx is not None and not _is_pair(hx):
            raise TypeError(f"hx is {type(hx).__name__}: pass the two tensors (h_0, c_0)")
        reason = self._why_not_ours(data)
        if reason is not None:
            log_stock(self, reason)
        if cu_seqlens is not None:
            packing = Packing.given(cu_seqlens, max_seqlen)
            x = self._packed(input, hx, packing)
            # rows past the end are not read: NaN there would reach the gradients of the weights
            tail = max(0, x.shape[0] - int(cu_seqlens[-1]))
            x = x[: x.shape[0] - tail]
            run = self._layers if reason is None and len(x) else self._stock_packed
            y, states = run(x, packing, hx)
            return nn.functional.pad(y, (0, 0, 0, tail)) if tail else y, states
        if max_seqlen is not None:
            raise TypeError(f"max_seqlen is {max_seqlen} without cu_seqlens: pass both, or neither")
        if reason is not None:
            return super().forward(input, hx)
        if isinstance(input, PackedSequence):
            return self._of_sequence(input, hx)
        return self._of_padded(input, hx)

    def _why_not_ours(self, x: Tensor) -> str | None:
        """Why the op cannot serve this input."""
        if reason := why_not_fused(x):
            return reason
        if x.device.type != "cpu":
            return f"the input is on {x.device}, where torch's own kernel is fused"
        dtype = autocast_dtype("cpu") or x.dtype
        if dtype not in _DTYPES or x.dtype == torch.float64:
            return f"the input is {x.dtype}: the kernel takes float32 and bfloat16"
        if x.dim() not in (2, 3) or x.numel() == 0:
            return f"the input has shape {tuple(x.shape)}"
        return None

    def _packed(self, x: Any, hx: States | None, packing: Packing) -> Tensor:
        """The packed tokens x; refuses other inputs, and states of other shapes."""
        if not isinstance(x, Tensor) or x.dim() != 2:
            what = f"of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"the input is {what}: pass packed tokens (T, C) with cu_seqlens")
        self.check_input(x, packing.cu_seqlens)
        if hx is not None:
            self._check_states(hx, packing.batch)
        return x

    def _check_states(self, hx: States, batch: int) -> None:
        expected = (self.num_layers * (1 + self.bidirectional), batch, self.hidden_size)
        for name, state in zip(("h_0", "c_0"), hx, strict=True):
            if tuple(state.shape) != expected:
                raise ValueError(
                    f"{name} has shape {tuple(state.shape)}: pass (layers * directions, B, H) = {expected}"
                )

    def _of_padded(self, x: Tensor, hx: States | None) -> tuple[Tensor, States]:
        """(S, B, C), (B, S, C) with batch_first, or (S, C)."""
        alone = x.dim() == 2
        if alone:
            if hx is not None and any(t.dim() != 2 for t in hx):
                return super().forward(x, hx)  # torch.nn's own error
            hx = None if hx is None else (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
        rows = x if alone or self.batch_first else x.transpose(0, 1)
        B, S = (1, x.shape[0]) if alone else rows.shape[:2]
        self.check_input(x[None] if alone else x, None)
        if hx is not None:
            self._check_states(hx, B)
        packing = Packing.full(B, S, x.device)
        y, states = self._layers(rows.reshape(B * S, -1), packing, hx)
        if alone:
            return y, (states[0].squeeze(1), states[1].squeeze(1))
        y = y.view(B, S, -1)
        return y if self.batch_first else y.transpose(0, 1).contiguous(), states

    def _of_sequence(self, x: PackedSequence, hx: States | None) -> tuple[PackedSequence, States]:
        """A PackedSequence, to one of the same order."""
        self.check_input(x.data, x.batch_sizes)
        if hx is not None:
            self._check_states(hx, int(x.batch_sizes[0]))
            hx = self.permute_hidden(hx, x.sorted_indices)
        lengths, rows = _sequences(x.batch_sizes, x.data.shape[0])
        back = torch.empty_like(rows)
        back[rows] = torch.arange(rows.shape[0])
        bounds = nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        packing = Packing(bounds, x.batch_sizes.shape[0])
        y, states = self._layers(_Permuted.apply(x.data, rows, back), packing, hx)
        out = _Permuted.apply(y, back, rows)
        return (
            PackedSequence(out, x.batch_sizes, x.sorted_indices, x.unsorted_indices),
            self.permute_hidden(states, x.unsorted_indices),
        )

    def _layers(self, x: Tensor, packing: Packing, hx: States | None) -> tuple[Tensor, States]:
        """Packed tokens (T, C) through all layers: y (T, D H), final h and c (layers D, B, H)."""
        D, H, cu = 1 + self.bidirectional, self.hidden_size, packing.cu_seqlens.long()
        # the rows of (T D, H) that hold each direction's last step of every sequence
        ends = torch.stack([cu[1:] - 1, cu[:-1]][:D], 0)
        last = (ends * D + torch.arange(D)[:, None]).clamp(0, x.shape[0] * D - 1).flatten()
        some = (cu.diff() > 0)[:, None]
        final: tuple[list[Tensor], list[Tensor]] = ([], [])
        for layer in range(self.num_layers):
            gates, weights = self._gates(x, layer)
            h0, c0 = (None, None) if hx is None else (t[layer * D : layer * D + D] for t in hx)
            x, cells = F.lstm(
                gates,
                weights,
                packing.cu_seqlens,
                packing.max_seqlen,
                h0,
                c0,
                return_cells=True,
            )
            for known, rows, first in zip(final, (x, cells), (h0, c0), strict=True):
                state = rows.reshape(-1, H).index_select(0, last).view(D, -1, H).to(x.dtype)
                known.append(torch.where(some, state, 0.0 if first is None else first.to(x.dtype)))
            if layer < self.num_layers - 1:
                x = nn.functional.dropout(x, self.dropout, self.training)
        return x, (torch.cat(final[0]), torch.cat(final[1]))

    def _gates(self, x: Tensor, layer: int) -> tuple[Tensor, list[Tensor]]:
        """x W_ih^T + b_ih + b_hh (T, D 4 H) of a layer, all directions in one product, and each direction's W_hh."""
        D = 1 + self.bidirectional
        parts = [
            [getattr(self, name) for name in names]
            for names in self._all_weights[layer * D : layer * D + D]
        ]
        weight = parts[0][0] if D == 1 else torch.cat([p[0] for p in parts])
        biases = [p[2] + p[3] for p in parts] if self.bias else []
        bias = torch.cat(biases) if len(biases) > 1 else (biases or [None])[0]
        return F.linear(x, weight, bias), [p[1] for p in parts]

    def _stock_packed(
        self, x: Tensor, packing: Packing, hx: States | None
    ) -> tuple[Tensor, States]:
        """`_layers` by torch's own code, which takes no empty sequence and no packed tokens in our order."""
        D, H = 1 + self.bidirectional, self.hidden_size
        cu_seqlens = packing.cu_seqlens.cpu()
        cu_seqlens_valid(cu_seqlens, x.shape[0], packing.max_seqlen)
        lengths = cu_seqlens.diff()
        here = lengths.nonzero().squeeze(1).to(x.device)
        zeros = x.new_zeros(self.num_layers * D, packing.batch, H)
        h0, c0 = (zeros, zeros.clone()) if hx is None else hx
        if not len(here):
            return x.new_zeros(0, D * H) + x.sum(), (h0, c0)
        lengths = lengths[lengths > 0]
        sequence = pack_padded_sequence(
            packing.spread(x)[here], lengths, batch_first=True, enforce_sorted=False
        )
        y, (h, c) = super().forward(sequence, (h0[:, here].contiguous(), c0[:, here].contiguous()))
        padded, _ = pad_packed_sequence(y, batch_first=True)
        token = torch.arange(padded.shape[1]) < lengths[:, None]
        rows = padded[token.to(x.device)]
        return rows, (h0.to(h.dtype).index_copy(1, here, h), c0.to(c.dtype).index_copy(1, here, c))
