"""The benchmarks, run as modules from the repository's root: `python -m benchmarks.report.readme`."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
