"""Runs accelerate()'s tests with transformers 4: `python tests/accelerate/transformers4.py [PYTEST_ARG ...]`.

Each version has a virtual environment in build/transformers4 with the packages that differ from this environment's. It
finds this environment's packages after its own. An existing environment is used again.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# transformers -> the tokenizers that it needs; both need the packages below, for a hub client below 1
VERSIONS = {"4.48.3": "0.21.4", "4.57.6": "0.22.2"}
SHARED = (
    "huggingface_hub==0.36.2",
    "datasets==4.4.2",
    "sentence-transformers==5.2.3",
    "requests==2.34.2",
    "certifi==2026.10.19.post1",
    "charset_normalizer==3.5.3",
    "urllib3==2.8.0",
    "httpx==0.28.1",
    "httpcore==1.0.9",
    "sniffio==1.3.1",
)


def environment(version: str, pip_args: list[str]) -> Path:
    """The Python of the environment with this version of transformers, which is made if need be."""
    home = ROOT / "build" / "transformers4" / version
    python = home / "bin" / "python"
    wanted = [f"transformers=={version}", f"tokenizers=={VERSIONS[version]}", *SHARED]
    done = home / "installed.txt"
    if done.is_file() and done.read_text().split() == wanted:
        return python
    subprocess.run(
        [sys.executable, "-m", "venv", "--clear", "--without-pip", str(home)], check=True
    )
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, *pip_args, *wanted], check=True)
    # this environment's packages come after the new one's own
    (own,) = home.glob("lib/python*/site-packages")
    behind = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
    (own / "behind.pth").write_text(behind)
    done.write_text("\n".join(wanted))
    return python


def main(args: list[str]) -> int:
    """Run the tests with every version; --pip-args=... goes to pip, all other arguments to pytest."""
    pip_args = [a for a in args if a.startswith("--pip-args=")]
    given = shlex.split(pip_args[-1].partition("=")[2]) if pip_args else []
    tests = sorted(
        str(p.relative_to(ROOT)) for p in Path(__file__).parent.glob("test_accelerate*.py")
    )
    failed = []
    for version in VERSIONS:
        python = environment(version, given)
        command = [str(python), "-m", "pytest", *(a for a in args if a not in pip_args), *tests]
        print(f"transformers {version}", flush=True)
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            failed.append(version)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
