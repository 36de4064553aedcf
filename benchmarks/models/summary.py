"""From samples to rows: agreement, the best peer, ratios, shares of the machine's peak."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.models.works import OUR_FP32, OURS, PEERS, STOCK, Work, flops
from benchmarks.peers.driver import Outcome
from fastbert.files import write_text
from fastbert.machine import machine_info

# the least cosine that counts; peers in int8 round activations to 8 bits
COSINE = {"fp32": 0.9999, "bf16": 0.9999, "int8": 0.9}
# relative difference of the loss without dropout
LOSS = {"fp32": 1e-4, "bf16": 1e-2}

# facts that must be the same for all rows of a table
MEASURED = ("cpu", "cores", "threads", "instructions")


def read(out: Path) -> dict[str, Any]:
    """The results in a file, {} where there is none; a file of another kind ends the program and is left alone."""
    try:
        results: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    except (OSError, ValueError) as error:
        raise SystemExit(f"{out} can't be read: {error}; move it or choose another --out") from None
    if results and not (isinstance(results, dict) and {"machine", "rows"} <= results.keys()):
        raise SystemExit(f"{out} holds no results of this benchmark: choose another --out")
    return results


def earlier(out: Path, facts: dict[str, Any], **empty: Any) -> dict[str, Any]:
    """The results so far, or `empty` where the file has none of this machine in this form; `facts` describe it now.

    A file of another kind ends the program and is left alone.
    """
    results = read(out)
    same = results and all(results["machine"][k] == facts[k] for k in MEASURED)
    if results and not (same and empty.keys() <= results.keys()):
        print(f"{out} is from another machine or an older form: its rows are dropped")
        results = {}
    return empty | results | {"machine": facts}


def by_work(
    works: Iterable[str], out: Path, measure: Callable[[str], dict[str, Any]]
) -> dict[str, Any]:
    """The results in `out` with a new row of every work, which is written as soon as it is measured.

    An OSError or ValueError of `measure` ends the program with the work's name; rows before it stay.
    """
    facts = machine_info()
    results = earlier(out, facts, rows={})
    for name in works:
        try:
            row = measure(name)
        except (OSError, ValueError) as error:
            raise SystemExit(f"{name}: {error}") from None
        results["rows"][name] = {**row, "date": facts["date"]}
        write_text(out, json.dumps(results, indent=1) + "\n")
    return results


def percentiles(values: Any) -> dict[str, float]:
    """Median, p20 and p80."""
    p20, median, p80 = np.percentile(values, [20, 50, 80]).tolist()
    return {"median": median, "p20": p20, "p80": p80}


def agreement(check: dict[str, Any], inputs: Path) -> dict[str, float]:
    """The agreement with transformers in fp32: cosine over the real tokens, or the loss's relative difference."""
    if "loss" in check:
        truth = json.loads((inputs / "reference.json").read_text())["loss"]
        return {"loss_difference": abs(check["loss"] - truth) / truth}
    mask = np.load(inputs / "batch0.npz")["attention_mask"] == 1
    truth = np.load(inputs / "reference.npy")[mask].ravel().astype(np.float64)
    found = at_tokens(np.load(check["file"]), mask).ravel().astype(np.float64)
    cosine = float(found @ truth / np.linalg.norm(found) / np.linalg.norm(truth))
    return {"cosine": cosine}


def at_tokens(states: Any, mask: Any) -> Any:
    """Hidden states at the real tokens, (T, C), of a padded batch's (B, S, C) or of packed tokens' (T, C)."""
    return states[mask] if states.shape[:2] == mask.shape else states


def agrees(result: dict[str, Any], precision: str) -> bool:
    """Whether a result is close enough to count; NaN never is."""
    if "cosine" in result:
        return result["cosine"] >= COSINE[precision]
    return result["loss_difference"] <= LOSS[precision]


def best_peer(
    results: dict[str, dict[str, Any]], precision: str, padded: bool = False
) -> str | None:
    """The fastest peer that counts and agrees. `padded` leaves out the peers that remove padding."""
    packing = {peer.name for peer in PEERS if peer.packs}
    fit = [
        name
        for name, result in results.items()
        if name != OURS
        and not (padded and name in packing)
        and "seconds" in result
        and result["counted"]
        and agrees(result["agreement"], precision)
    ]
    return min(fit, key=lambda name: results[name]["seconds"]["median"], default=None)


def ratio(peer: list[float], ours: list[float]) -> dict[str, float]:
    """The ratio of times in each round: within a round the machine's speed hardly changes."""
    return percentiles(np.array(peer) / np.array(ours))


def fma_peak(peaks: dict[str, Any], precision: str) -> float | None:
    """GFLOP/s that shares refer to: multiply-adds on registers, the faster of before and after the row.

    In bf16 on a CPU without such instructions it is that of fp32. None for int8, and without the native module.
    """
    rates = [
        found.get(f"fma_gflops_{precision}", found.get("fma_gflops_fp32"))
        for found in peaks.values()
    ]
    known = [rate for rate in rates if rate is not None]
    return None if precision == "int8" else max(known, default=None)


def result_of(outcome: Outcome, work: Work, peer: Any, inputs: Path) -> dict[str, Any]:
    """One peer's entry: numbers, or the reason why there are none."""
    if outcome.reason:
        return {"reason": outcome.reason}
    result: dict[str, Any] = {
        "seconds": percentiles(outcome.samples),
        "samples": outcome.samples,
        "agreement": agreement(outcome.check, inputs),
        "counted": peer.counted,
    }
    if outcome.memory:
        result["memory"] = outcome.memory
    # the rate of a wrong result, or of another precision, would be meaningless
    counts = agrees(result["agreement"], work.precision)
    if work.kind == "infer" and work.precision != "int8" and counts:
        done = flops(list(work.lengths), peer.packs) / 1e9
        result["gflops"] = done / result["seconds"]["median"]
    return result


def row(
    work: Work, outcomes: dict[str, Outcome], inputs: Path, facts: dict[str, Any]
) -> dict[str, Any]:
    """A row of the JSON; `facts` are the run's date, its rounds and the peaks {"before", "after"} it.

    Where the work has a goal for saved bytes, `facts` also has the result of saved.against_stock.
    """
    peers = {peer.name: peer for peer in PEERS}
    results = {
        name: result_of(outcome, work, peers[name], inputs) for name, outcome in outcomes.items()
    }
    peak = fma_peak(facts["peaks"], work.precision)
    for result in results.values():
        if "gflops" in result and peak:
            result["of_peak"] = result["gflops"] / peak
    keys = ("kind", "fill", "precision", "title")
    made = {"work": work.name, **{key: getattr(work, key) for key in keys}, **facts}
    made["peak_gflops"] = peak
    made["fill_percent"] = round(100 * _fill(inputs))
    found, saved = compared(results, work.precision), facts.get("saved_bytes")
    found["saved_ratio"] = saved[OURS] / saved[STOCK] if saved else None
    return {**made, "results": results, **found, "goals": goals(work, results, found)}


def goals(work: Work, results: dict[str, Any], found: dict[str, Any]) -> list[dict[str, Any]]:
    """The work's goals: {"what", "goal", "value", "met"}; value is None where there is nothing to compare."""
    speed, padded, fp32 = (found[name] for name in ("ratio", "padded_ratio", "fp32_ratio"))
    memory = found["memory_ratio"]
    share = results.get(OURS, {}).get("of_peak")
    made = []
    for what, goal, value in (
        ("speed", work.goal, speed and speed["median"]),
        ("of padded", work.padded_goal, padded and padded["median"]),
        ("of fp32", work.fp32_goal, fp32 and fp32["median"]),
        ("of peak", work.peak_goal, share),
        ("memory", work.memory_goal, memory and memory["added"]),
        ("saved", work.saved_goal, found["saved_ratio"]),
    ):
        if goal is not None:
            less = what in ("memory", "saved")
            reached = value is not None and (value <= goal if less else value >= goal)
            made.append({"what": what, "goal": goal, "value": value, "met": reached})
    return made


def compared(results: dict[str, dict[str, Any]], precision: str) -> dict[str, Any]:
    """Best peer, ratios and memory against stock; a wrong result of ours is compared with nothing."""
    ours = results.get(OURS, {})
    best = best_peer(results, precision)
    names = {"ratio": best, "padded_ratio": best_peer(results, precision, padded=True)}
    names["fp32_ratio"] = OUR_FP32 if "seconds" in results.get(OUR_FP32, {}) else None
    made: dict[str, Any] = {"best_peer": best, **dict.fromkeys(names), "memory_ratio": None}
    if "seconds" not in ours or not agrees(ours["agreement"], precision):
        return made
    for name, peer in names.items():
        if peer is not None:
            made[name] = ratio(results[peer]["samples"], ours["samples"])
    stock = results.get(STOCK, {})
    if "memory" in ours and "memory" in stock:
        mine, theirs = ours["memory"], stock["memory"]
        added = (mine["peak"] - mine["before"]) / (theirs["peak"] - theirs["before"])
        made["memory_ratio"] = {"peak": mine["peak"] / theirs["peak"], "added": added}
    return made


def _fill(inputs: Path) -> float:
    masks = [np.load(file)["attention_mask"] for file in sorted(inputs.glob("batch*.npz"))]
    return sum(m.sum() for m in masks) / sum(m.size for m in masks)
