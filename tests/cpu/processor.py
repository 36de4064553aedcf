"""The instruction sets of csrc/cpu that this machine has, read from Linux's /proc/cpuinfo."""

import re
from pathlib import Path

NEEDED = {
    "avx2": {"avx2", "fma", "bmi2"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "avx512_bf16": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"},
}


def instruction_sets() -> list[str]:
    """The names of those of x86-64, without the baseline."""
    flags = set(re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)[1].split())
    return [name for name, needed in NEEDED.items() if needed <= flags]
