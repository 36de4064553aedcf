"""Makes the peers' virtual environments: `python benchmarks/peers/install.py [PEER ...]`.

Each peer has its own, with the versions of PEER.txt beside this file and of constraints.txt, in $FASTBERT_CACHE/peers
(by default ~/.cache/fastbert/peers). An existing environment is left alone. Where one can't be made, the reason is
written beside it, and the benchmark shows it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shlex
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
CONSTRAINTS = HERE.parents[1] / "constraints.txt"
TIMEOUT_S = 1800
# installed without dependencies and imported beside this project's torch and Triton, which they would replace
ALONE = ("kernels",)


def environment(name: str) -> Path:
    """The folder of the peer's environment; other pins have another folder."""
    pins = (HERE / f"{name}.txt").read_bytes()
    cache = Path(os.environ.get("FASTBERT_CACHE") or "~/.cache/fastbert").expanduser()
    return cache / "peers" / f"{name}-{hashlib.sha256(pins).hexdigest()[:12]}"


def find(name: str) -> tuple[Path | None, str]:
    """The peer's Python, or None and the reason."""
    home = environment(name)
    if (home / "installed").is_file():
        return home / "bin" / "python", ""
    reason = home.with_suffix(".reason")
    if reason.is_file():
        return None, reason.read_text().strip()
    return None, f"not installed: run python benchmarks/peers/install.py {name}"


def install(name: str, pip_args: list[str]) -> str:
    """Make the environment unless it is there; returns the reason where that fails, else an empty string."""
    home = environment(name)
    if (home / "installed").is_file():
        return ""
    home.parent.mkdir(parents=True, exist_ok=True)
    python = str(home / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--quiet", "--no-input", "-c", str(CONSTRAINTS)]
    alone = ["--no-deps"] if name in ALONE else []
    for command in (
        [sys.executable, "-m", "venv", "--clear", str(home)],
        [*pip, *alone, *pip_args, "-r", str(HERE / f"{name}.txt")],
    ):
        failed = _run(command)
        if failed:
            home.with_suffix(".reason").write_text(f"can't be installed: {failed}\n")
            return failed
    (home / "installed").touch()
    home.with_suffix(".reason").unlink(missing_ok=True)
    return ""


def _run(command: list[str]) -> str:
    """Run a command; returns its last error line if it fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"{Path(command[0]).name} took more than {TIMEOUT_S} s"
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    last = (errors or done.stderr.strip().splitlines() or ["no message"])[-1]
    return last if done.returncode else ""


def main() -> int:
    """Install the named peers, or all; a failure is printed and recorded, and is no error of this command."""
    known = sorted(path.stem for path in HERE.glob("*.txt"))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peers", nargs="*", help=f"of {', '.join(known)}; all by default")
    parser.add_argument("--pip-args", default="", help="more arguments for pip install")
    options = parser.parse_args()
    for name in options.peers or known:
        if name not in known:
            parser.error(f"no peer is called {name}; known: {', '.join(known)}")
        failed = install(name, shlex.split(options.pip_args))
        print(f"{name}: {failed or environment(name)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
