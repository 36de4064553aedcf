"""Pretraining runs of equal time. The JSON of a benchmark gets the results of each run as soon as it is finished.

An arm is a recipe or a kind of model. The steps of all arms are timed in turns on a quiet machine, which gives the
number of steps that fit into the minutes. The runs themselves may then share the machine. A rerun of the benchmark
reads the JSON and makes the runs that it lacks, also in another checkout.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastbert.files import write_text
from fastbert.machine import machine_info
from fastbert.pretrain import PretrainConfig, pretrain
from fastbert.pretrain.build import build_model
from fastbert.pretrain.feed import Feed, shared_feed
from fastbert.pretrain.trainer import PretrainTrainer
from fastbert.testing.peaks import peaks
from fastbert.testing.timing import interleave
from fastbert.train.world import World


def read(out: Path) -> dict[str, Any]:
    """The results in a JSON, none where it is not there."""
    found: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {}
    return found


def keep(out: Path, **more: Any) -> dict[str, Any]:
    """The results in a JSON with these entries, which are written at once."""
    results = read(out) | more
    write_text(out, json.dumps(results, indent=1) + "\n")
    return results


def once(out: Path, group: str, name: str, make: Callable[[], Any]) -> Any:
    """The result of this name in a group of a JSON; where it is missing, `make` gives it and it is written at once."""
    kept = read(out).get(group, {})
    if name not in kept:
        found = make()
        # the file may have got others meanwhile
        kept = read(out).get(group, {}) | {name: found}
        keep(out, **{group: kept})
    return kept[name]


@dataclass(frozen=True)
class Arms:
    """The arms of a benchmark. `options` has its out, runs (a folder) and quick."""

    options: Namespace
    # of an arm's name and more settings
    settings: Callable[..., PretrainConfig]
    # arms that are timed later, perhaps on another machine, are timed beside this one and scaled by its two times
    base: str
    # of the timing
    threads: int
    # evaluations along a run
    points: int
    # a run's results, of its folder, its settings and the seconds of a batch
    judged: Callable[[Path, PretrainConfig, float], dict[str, Any]]

    def read(self) -> dict[str, Any]:
        """The results so far."""
        return {"seconds": {}, "peaks": [], "runs": {}} | read(self.options.out)

    def keep(self, **more: Any) -> dict[str, Any]:
        """The results with these entries, which are written at once."""
        return keep(self.options.out, **{**self.read(), **more})

    def feed(self, config: PretrainConfig) -> Feed:
        """The data of a configuration; all share the tokenizer and the shards in the folder of the runs."""
        runs = self.options.runs
        own = runs / "tokenizer" / "tokenizer.json"
        if own.is_file():
            config = replace(config, tokenizer=str(own))
        return shared_feed(config, runs, World(), resume=False, quiet=True)

    def seconds_a_batch(self, arms: Sequence[str]) -> dict[str, float]:
        """The time of a step of all batches / their number, of every arm, in turns; kept in the results."""
        kept = self.read()
        missing = [arm for arm in arms if arm not in kept["seconds"]]
        if not missing:
            return kept["seconds"]
        known = kept["seconds"].get(self.base)
        torch.set_num_threads(self.threads)
        trainers = {}
        for arm in missing if known is None else [self.base, *missing]:
            config = self.settings(arm, steps=1_000_000, batch_ramp=0.0)
            feed = self.feed(config)
            model = build_model(config, feed.tokenizer)
            trainers[arm] = PretrainTrainer(model, feed.batches, config)
        before = peaks(1.0)["fma_gflops_fp32"]
        work = {arm: trainer.train_step for arm, trainer in trainers.items()}
        found = interleave(work, rounds=2 if self.options.quick else 8, warmup=1)
        after = peaks(1.0)["fma_gflops_fp32"]
        print(f"FMA peak {before:.0f} GFLOP/s before and {after:.0f} after")
        here = {a: found[a].median / t.config.accumulate for a, t in trainers.items()}
        scale = 1.0 if known is None else known / here[self.base]
        kept["seconds"] |= {arm: here[arm] * scale for arm in missing}
        kept["peaks"] += [before, after]
        machine = machine_info() if known is None else {}
        self.keep(**machine, seconds=kept["seconds"], peaks=kept["peaks"])
        return kept["seconds"]

    def trained(self, arm: str, lr: float, minutes: float, seed: int) -> dict[str, Any]:
        """The results of a run, which is made once."""
        name = run_name(arm, lr, minutes, seed)

        def make() -> dict[str, Any]:
            out, config, batch = self._run(name, arm, lr, minutes, seed)
            return {"arm": arm, "minutes": minutes, **self.judged(out, config, batch)}

        found: dict[str, Any] = once(self.options.out, "runs", name, make)
        for checkpoint in (self.options.runs / name / "checkpoints").glob("*"):
            checkpoint.unlink()
        return found

    def model(self, arm: str, lr: float, minutes: float, seed: int) -> Path:
        """The folder of a run's model, which is trained again where another checkout has kept its results."""
        name = run_name(arm, lr, minutes, seed)
        if not (self.options.runs / name / "result.json").is_file():
            self._run(name, arm, lr, minutes, seed)
        return self.options.runs / name / "model"

    def _run(
        self, name: str, arm: str, lr: float, minutes: float, seed: int
    ) -> tuple[Path, PretrainConfig, float]:
        out = self.options.runs / name
        batch = self.seconds_a_batch([arm])[arm]
        config = self.settings(arm, lr=lr, seed=seed, steps=1)
        steps = max(round(60 * minutes / batch / config.batches_a_step), self.points)
        self.feed(config)
        config = replace(
            config,
            steps=steps,
            checkpoint_every=max(steps // self.points, 1),
            keep_last=self.points + 2,
            tokenizer=str(self.options.runs / "tokenizer" / "tokenizer.json"),
        )
        if config.eval_every:
            config = replace(config, eval_every=config.checkpoint_every)
        pretrain(config, out, resume=(out / "config.toml").is_file(), quiet=True)
        return out, config, batch


def run_name(arm: str, lr: float, minutes: float, seed: int) -> str:
    """The name of a run in the results and in the folder of the runs."""
    return f"{arm}-{lr:g}-{minutes:g}-{seed}".replace(" ", "_").replace("%", "pc")
