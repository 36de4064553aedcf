"""Memory of large results: malloc keeps what the process frees, unless FASTBERT_KEEP_MEMORY is 0."""

import os
import platform
import subprocess
import sys

import pytest

from fastbert import cpu

pytestmark = pytest.mark.skipif(cpu.native is None, reason=f"no native module: {cpu.unavailable}")

# page faults of writing five results of 40 MB, each freed before the next
CODE = """
import resource
import torch
from fastbert.backend import cpu

def write():
    result = torch.empty(10_000_000)
    result.zero_()

cpu.fresh(torch.empty(0), 10_000_000).zero_()
# glibc before 2.38 reuses aligned memory of one size after seven blocks
for _ in range(10):
    write()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    write()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(keep: str) -> int:
    """Page faults of CODE in a process of its own."""
    variables = os.environ | {"FASTBERT_KEEP_MEMORY": keep}
    run = subprocess.run(
        [sys.executable, "-c", CODE], env=variables, capture_output=True, text=True, check=True
    )
    return int(run.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is set")
def test_freed_memory_is_written_again_without_page_faults():
    assert page_faults("1") < 100
    # without it each of the 5 results takes its 4 KB pages from the system again
    assert page_faults("0") > 5 * 40_000_000 // 4096 // 2
