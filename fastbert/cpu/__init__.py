"""The native CPU backend: adapters from torch tensors to the raw-pointer kernels in csrc/cpu.

`unavailable` says why there is no native module (None when there is one); `native` is the module.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

# torch first: the native module then binds to the OpenMP runtime that torch has loaded, and the process has one
import torch

native: ModuleType | None
unavailable: str | None
try:
    native = import_module("fastbert._cpu")
except ImportError as error:
    native = None
    unavailable = (
        f"the native module fastbert._cpu is not usable ({error}): install fastbert with a C++ "
        "compiler at hand, `pip install .` in a checkout"
    )
else:
    unavailable = None

# suffix of the native functions per dtype of x
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
