"""`make sanitize` can fail: it finds a write of one float behind either piece of the working memory."""

import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shlex.split(os.environ.get("CXX", "")) or [shutil.which("c++") or "c++"]
# two pieces of 5 floats; a piece is followed by a gap up to the next multiple of 64 bytes
PROGRAM = """
#include "scratch.h"
using namespace fastbert::FASTBERT_ISA;
int main(int count, char** words) {
  const Scratch rooms(2, 5);
  const int piece = words[1][0] - '0', at = words[2][0] - '0';
  (void)count;
  store1(rooms[piece] + at, 1.0f);
  return 0;
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """A program that writes float `argv[2]` of piece `argv[1]`, built as `make sanitize` builds."""
    folder = tmp_path_factory.mktemp("sanitize")
    (folder / "main.cpp").write_text(PROGRAM)
    command = [*COMPILER, "-std=c++17", "-fsanitize=address,undefined", "-Wno-psabi"]
    command += ["-fno-sanitize-recover=all", "-DFASTBERT_ISA=baseline", f"-I{ROOT / 'csrc/cpu'}"]
    sources = [folder / "main.cpp", ROOT / "csrc/cpu/runtime.cpp"]
    done = subprocess.run(
        [*command, *sources, "-o", folder / "main"], capture_output=True, text=True
    )
    if done.returncode != 0 and "asan" in done.stderr:
        pytest.skip(f"{COMPILER[0]} has no AddressSanitizer here")
    assert done.returncode == 0, done.stderr
    return folder / "main"


@pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason="needs a C++ compiler")
@pytest.mark.skipif("linux" not in sysconfig.get_platform(), reason="AddressSanitizer on Linux")
@pytest.mark.parametrize(
    ("piece", "at", "fails"), [(0, 4, False), (1, 4, False), (0, 5, True), (1, 5, True)]
)
def test_one_float_too_far_is_seen(program, piece, at, fails):
    env = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    run = subprocess.run([program, str(piece), str(at)], env=env, capture_output=True, text=True)
    assert ("AddressSanitizer" in run.stderr) == fails
    assert (run.returncode != 0) == fails
