"""The machine's memory: global buffers, a shared window for each block and a local one for each lane, all checked.

Every byte has a state. An access outside the buffers of the launch, an unaligned one and a read of an unwritten byte
raise PtxError, as does a shared byte that two lanes touch, one of them writing, with no barrier between. Sectors,
wavefronts and distinct bytes are counted as a GPU of compute capability 8.0 would need them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

# a byte's state: legal to access; written by anything; read, or written, by this launch; a cp.async target
LEGAL, WRITTEN, READ, STORED, IN_FLIGHT = 1, 2, 4, 8, 16
# the first generic addresses of the two windows, above any address of a process
SHARED_WINDOW, LOCAL_WINDOW = 1 << 50, 1 << 51
SECTOR, BANKS = 32, 32
NONE, SEVERAL = -1, -2


class PtxError(RuntimeError):
    """An error of a kernel; `kind` is one word, `place` is (kernel, index of the instruction) where it is known."""

    def __init__(self, kind: str, message: str, place: tuple[str, int] | None = None) -> None:
        super().__init__(message if message.startswith(kind) else f"{kind}: {message}")
        self.kind, self.place = kind, place


@dataclass
class Buffer:
    """Global memory at [address, address + size): its bytes and their states, which a launch changes in place."""

    address: int
    bytes: Array
    state: Array
    name: str = ""


@dataclass
class Counts:
    """Counts of a launch: instructions of warps by class, bytes and transactions, products of tensor cores."""

    instructions: Counter[str] = field(default_factory=Counter)
    asked: Counter[str] = field(
        default_factory=Counter
    )  # bytes that global loads ("load") and stores ("store") request
    sectors: Counter[str] = field(
        default_factory=Counter
    )  # sectors of 32 bytes that these requests touch
    shared_accesses: int = 0  # wavefronts without any bank conflict
    shared_wavefronts: int = 0
    macs: int = 0  # multiply-adds of mma
    distinct: dict[str, tuple[int, int]] = field(
        default_factory=dict
    )  # buffer -> bytes (read, written)


class Lanes:
    """Every lane's block and warp, and the time of the last barrier that it passed."""

    def __init__(self, blocks: int, threads: int) -> None:
        count = blocks * threads
        self.threads = threads
        self.lane = np.arange(count)
        self.block = self.lane // threads
        # a warp belongs to one block
        per_block = -(-threads // 32)
        self.warp = self.block * per_block + self.lane % threads // 32
        self.in_warp = self.lane % threads % 32
        self.clock = 1
        self.block_sync = np.zeros(count, np.int64)
        self.warp_sync = np.zeros(count, np.int64)

    def never(self, mask: Array) -> None:
        """Mark lanes that only fill up a warp: they never run, so no barrier waits for them."""
        self.block_sync[mask] = self.warp_sync[mask] = np.iinfo(np.int64).max

    def pass_warp(self, mask: Array) -> None:
        """These lanes' earlier accesses come before later ones of their warps' lanes."""
        self.clock += 1
        self.warp_sync[mask] = self.clock

    def pass_block(self, mask: Array) -> None:
        """These lanes' earlier accesses come before later ones of their blocks' lanes."""
        self.pass_warp(mask)
        self.block_sync[mask] = self.clock

    def describe(self, lane: int) -> str:
        """The lane's block and thread, for an error."""
        return f"block {self.block[lane]} of the batch, thread {lane % self.threads}"


class Space:
    """A linear memory with a state for each byte; `where` names it in errors."""

    asynchronous = False  # whether cp.async writes here

    def __init__(self, where: str, size: int, state: int) -> None:
        self.where = where
        # accesses are aligned, so that no access crosses a multiple of 16 bytes
        self.size = -(-size // 16) * 16 + 16
        self.bytes = np.zeros(self.size, np.uint8)
        self.state = np.zeros(self.size, np.uint8)
        self.state[:size] = state

    def check(self, at: Array, width: int, reads: bool, lanes: Array, who: Lanes) -> Array:
        """The row numbers of accesses of `width` bytes at these offsets, after all checks."""
        self._all(at % width == 0, "misaligned", f"is no multiple of {width}", at, lanes, who)
        self._all((at >= 0) & (at + width <= self.size), "out-of-bounds", "", at, lanes, who)
        rows = at // width
        state = self.state.reshape(-1, width)[rows]
        low = np.bitwise_and.reduce(state, axis=1)
        self._all(low & LEGAL != 0, "out-of-bounds", "belongs to nothing", at, lanes, who)
        if self.asynchronous:
            high = np.bitwise_or.reduce(state, axis=1)
            said = "is touched before cp.async has been waited for"
            self._all(high & IN_FLIGHT == 0, "missing-wait", said, at, lanes, who)
        if reads:
            said = "is read and nobody wrote it"
            self._all(low & WRITTEN != 0, "uninitialised", said, at, lanes, who)
        return rows

    def _all(self, good: Array, kind: str, what: str, at: Array, lanes: Array, who: Lanes) -> None:
        if not good.all():
            i = int(np.argmin(good))
            raise PtxError(
                kind,
                f"{self.where} address {self.name(int(at[i]))} {what} ({who.describe(int(lanes[i]))}; "
                f"{int((~good).sum())} of {len(good)} lanes)",
            )

    def name(self, at: int) -> str:
        """An offset as errors show it."""
        return hex(at)

    def load(self, rows: Array, width: int) -> Array:
        """The bytes (lanes, width)."""
        return self.bytes.reshape(-1, width)[rows]

    def store(self, rows: Array, data: Array) -> None:
        """Write the bytes (lanes, width)."""
        width = data.shape[1]
        self.bytes.reshape(-1, width)[rows] = data
        state = self.state.reshape(-1, width)
        state[rows] = state[rows] & (255 - IN_FLIGHT) | (WRITTEN | STORED)


class Global(Space):
    """The buffers of a launch side by side; bytes between them are out of bounds."""

    def __init__(self, buffers: list[Buffer]) -> None:
        self.buffers = sorted(buffers, key=lambda b: b.address)
        starts, end = [], 256
        for b in self.buffers:
            # with the alignment of the buffer's address
            starts.append(end + b.address % 256)
            end = -(-(starts[-1] + len(b.bytes) + 16) // 256) * 256
        super().__init__("global", end, 0)
        self.bases = np.array([b.address for b in self.buffers] or [0], np.int64)
        self.shift = np.array(starts or [0], np.int64) - self.bases
        self.ends = np.array([b.address + len(b.bytes) for b in self.buffers] or [0], np.int64)
        for b, start in zip(self.buffers, starts, strict=True):
            self.bytes[start : start + len(b.bytes)] = b.bytes
            self.state[start : start + len(b.bytes)] = b.state & (LEGAL | WRITTEN)

    def offsets(self, addresses: Array) -> Array:
        """Where the addresses are in this memory; -16 for those in no buffer."""
        i = np.maximum(np.searchsorted(self.bases, addresses, side="right") - 1, 0)
        inside = (addresses >= self.bases[i]) & (addresses < self.ends[i])
        return np.where(inside, addresses + self.shift[i], -16)

    def name(self, at: int) -> str:
        """The nearest buffer and the place in it."""
        starts = self.bases + self.shift
        i = max(int(np.searchsorted(starts, at, side="right")) - 1, 0)
        buffer = self.buffers[i].name if self.buffers else ""
        return f"{buffer or 'buffer'} + {at - int(starts[i])}" if at >= 0 else "of no buffer"

    def give_back(self, counts: Counts) -> None:
        """Copy everything into the buffers, and count the bytes of each that were read and written."""
        for b, start in zip(self.buffers, self.bases + self.shift, strict=False):
            b.bytes[...] = self.bytes[start : start + len(b.bytes)]
            state = self.state[start : start + len(b.bytes)]
            b.state |= state & WRITTEN
            read, stored = (state & READ != 0).sum(), (state & STORED != 0).sum()
            before = counts.distinct.get(b.name, (0, 0))
            counts.distinct[b.name] = (before[0] + int(read), before[1] + int(stored))

    def was_read(self, rows: Array, width: int) -> None:
        """Record that these bytes were read."""
        self.state.reshape(-1, width)[rows] |= READ


class Shared(Space):
    """One window of `size` bytes per block, with the last reader, writer and atomic updater of every byte."""

    asynchronous = True

    def __init__(self, blocks: int, size: int) -> None:
        self.window = -(-size // 128) * 128
        super().__init__("shared", blocks * self.window, 0)
        self.state[: blocks * self.window].reshape(blocks, -1)[:, :size] = LEGAL
        # (lane, time) of the last access; for several lanes since the last barrier -3 - warp, or SEVERAL of many warps
        self.writer, self.reader, self.updater = np.full((3, self.size), NONE, np.int32)
        self.wrote, self.read, self.updated = np.zeros((3, self.size), np.int32)
        self.atomic = False

    def name(self, at: int) -> str:
        """The offset within the block's window."""
        return hex(at % self.window) if self.window else hex(at)

    def reads(self, rows: Array, width: int, lanes: Array, who: Lanes) -> None:
        """Record reads; reading a byte that another lane wrote since the last barrier is a race."""
        self._ordered(self.writer, self.wrote, rows, width, lanes, who, "reads what was written by")
        if self.atomic:
            self._ordered(
                self.updater, self.updated, rows, width, lanes, who, "reads, and updated by"
            )
        self._note(self.reader, self.read, rows, width, lanes, who)

    def updates(self, rows: Array, width: int, lanes: Array, who: Lanes) -> None:
        """Record atomics; they race with plain accesses and not with each other."""
        self.atomic = True
        for last, when in ((self.writer, self.wrote), (self.reader, self.read)):
            self._ordered(last, when, rows, width, lanes, who, "updates what was touched by")
        self._note(self.updater, self.updated, rows, width, lanes, who)

    def _note(
        self, names: Array, times: Array, rows: Array, width: int, lanes: Array, who: Lanes
    ) -> None:
        """Add lanes to those that have accessed bytes since the last barrier."""
        me = np.broadcast_to(lanes[:, None].astype(np.int32), (len(lanes), width))
        names, times = names.reshape(-1, width), times.reshape(-1, width)
        last = names[rows]
        kept = self._unordered(last, times[rows], lanes, who)
        me = np.where(kept, _both(last, me, who), me)
        names[rows] = me
        times[rows] = who.clock
        # several lanes of this instruction access the same byte: note their warp, then over it SEVERAL warps
        again = names[rows]
        differ = again != me
        if differ.any():
            joined = _both(again, me, who)
            for some in (differ & (joined != SEVERAL), differ & (joined == SEVERAL)):
                r, c = some.nonzero()
                names[rows[r], c] = joined[r, c]

    def writes(self, rows: Array, data: Array, lanes: Array, who: Lanes) -> None:
        """Record writes; writing a byte that another lane read or wrote since the last barrier is a race."""
        width = data.shape[1]
        self._ordered(
            self.writer, self.wrote, rows, width, lanes, who, "overwrites what was written by"
        )
        self._ordered(
            self.reader, self.read, rows, width, lanes, who, "overwrites what was read by"
        )
        if self.atomic:
            self._ordered(
                self.updater, self.updated, rows, width, lanes, who, "overwrites, updated by"
            )
        writer = self.writer.reshape(-1, width)
        writer[rows] = lanes[:, None]
        self.wrote.reshape(-1, width)[rows] = who.clock
        # lanes of one instruction may write the same value to one byte: Triton's replicated layouts do
        lost = writer[rows] != lanes[:, None]
        if lost.any():
            won = np.zeros((self.size // width, width), np.uint8)
            won[rows] = data
            bad = lost & (won[rows] != data)
            self._raise_if(bad, rows, width, lanes, who, writer[rows], "and at once")

    def _unordered(self, last: Array, when: Array, lanes: Array, who: Lanes) -> Array:
        """Whether no common barrier lies between each of these accesses and the lane's next access."""
        new = (last != NONE) & (last != lanes[:, None])
        new &= when >= self._passed(who.block_sync, last, lanes, who)
        if not new.any():
            return new
        warp = np.where(last >= 0, who.warp[np.maximum(last, 0)], -3 - last)
        same = (last != SEVERAL) & (warp == who.warp[lanes][:, None])
        return new & ~(same & (when < self._passed(who.warp_sync, last, lanes, who)))

    def _passed(self, sync: Array, last: Array, lanes: Array, who: Lanes) -> Array:
        """The time of the last barrier that a lane and the lanes of an earlier access have passed."""
        theirs = sync[np.maximum(last, 0)]
        if (last <= SEVERAL).any():
            warp = sync.reshape(-1, 32).min(1)[np.maximum(-3 - last, 0)]
            block = sync.reshape(-1, who.threads).min(1)[who.block[lanes]][:, None]
            theirs = np.where(last >= NONE, theirs, np.where(last == SEVERAL, block, warp))
        return np.minimum(sync[lanes][:, None], theirs)

    def _ordered(
        self, last: Array, when: Array, rows: Array, width: int, lanes: Array, who: Lanes, what: str
    ) -> None:
        before = last.reshape(-1, width)[rows]
        bad = self._unordered(before, when.reshape(-1, width)[rows], lanes, who)
        self._raise_if(bad, rows, width, lanes, who, before, what)

    def _raise_if(
        self, bad: Array, rows: Array, width: int, lanes: Array, who: Lanes, other: Array, what: str
    ) -> None:
        if bad.any():
            r, c = (int(i[0]) for i in bad.nonzero())
            lane = int(other[r, c])
            by = who.describe(lane) if lane >= 0 else "several threads"
            at = self.name(int(rows[r]) * width + c)
            raise PtxError(
                "race",
                f"{who.describe(int(lanes[r]))} {what} {by} since the last barrier, shared byte {at} "
                f"({int(bad.any(1).sum())} lanes)",
            )


def _both(one: Array, other: Array, who: Lanes) -> Array:
    """The code for two accesses' lanes: one lane, lanes of a warp (-3 - warp), or SEVERAL."""
    a, b = (np.where(x >= 0, -3 - who.warp[np.maximum(x, 0)], x) for x in (one, other))
    return np.where(one == other, one, np.where(a == b, a, SEVERAL)).astype(np.int32)


def sectors(offsets: Array, lanes: Array, who: Lanes) -> int:
    """Distinct sectors of each warp's request, summed."""
    keys = who.warp[lanes] * (1 << 40) + offsets // SECTOR
    return len(np.unique(keys))


def wavefronts(offsets: Array, width: int, lanes: Array, who: Lanes) -> tuple[int, int]:
    """(passes that the banks need, passes without conflicts) of one shared access of every warp.

    8 bytes a lane go through in half-warps, 16 in quarter-warps; lanes that want the same word share it.
    """
    share = 32 * 4 // max(width, 4)
    group = who.warp[lanes] * (32 // share) + who.in_warp[lanes] // share
    words = offsets[:, None] // 4 + np.arange(max(width // 4, 1))
    keys = np.unique(np.repeat(group, words.shape[1]) * (1 << 32) + words.ravel())
    groups, word = keys >> 32, keys & 0xFFFFFFFF
    per_bank = np.unique(groups * BANKS + word % BANKS, return_counts=True)
    most = np.zeros(int(groups.max()) + 1, np.int64)
    np.maximum.at(most, per_bank[0] // BANKS, per_bank[1])
    return int(most.sum()), int((most > 0).sum())
