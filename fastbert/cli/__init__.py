"""The `fastbert` command."""

from fastbert.cli.app import main, run_app

__all__ = ["main", "run_app"]
