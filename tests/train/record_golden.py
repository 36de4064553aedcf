"""The ten losses in golden.json: `python tests/train/record_golden.py` writes them anew.

They depend on the whole path from text to weights: tokenizer, sentence pairs, masks, initial weights, dropout,
optimiser, schedule. A commit that changes any of these on purpose records them anew.
"""

import json
import sys
import tempfile
from pathlib import Path

FILE = Path(__file__).with_name("golden.json")
COMMAND = "python tests/train/record_golden.py"
SETTINGS = {
    "steps": 10,
    "eval_every": 0,
    "checkpoint_every": 0,
    "seed": 11,
    "dropout": 0.1,
    "precision": "fp32",
}


def ten_losses(folder):
    """Pretrain on the made-up corpus with the torch backend, fp32 and dropout; the losses of ten steps."""
    import tiny_run

    from fastbert.train import PretrainConfig, pretrain
    from fastbert.train.metrics import read_metrics

    corpus = tiny_run.write_corpus(folder / "corpus")
    config = PretrainConfig(**tiny_run.tiny_settings(corpus, **SETTINGS))
    pretrain(config, folder / "run", quiet=True)
    lines = read_metrics(folder / "run" / "metrics.jsonl")
    return [line["loss"] for line in lines if line["kind"] == "train"]


if __name__ == "__main__":
    sys.path.insert(0, str(FILE.parent.parent))
    from fastbert.machine import machine_info

    with tempfile.TemporaryDirectory() as folder:
        losses = ten_losses(Path(folder))
    facts = machine_info()
    made_on = {name: facts[name] for name in ("cpu", "instructions", "versions", "date")}
    FILE.write_text(
        json.dumps({"command": COMMAND, "made_on": made_on, "losses": losses}, indent=2) + "\n"
    )
    print(f"{FILE}: {losses}")
