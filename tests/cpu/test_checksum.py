"""Checksums of weights, which find writes that PyTorch does not count."""

import pytest
import torch

from fastbert.backend import cpu

if cpu.native is None:
    pytest.skip(str(cpu.unavailable), allow_module_level=True)


@pytest.mark.parametrize("step", [0, 1, 7])
@pytest.mark.parametrize("isa", cpu.native.isas())
def test_a_checksum_depends_on_every_number(isa, step):
    """Sizes around a vector's, and two threads' chunks; `step` 0 reads all, 1 one number of a row."""
    before = cpu.native.isa()
    cpu.native.use_isa(isa)
    try:
        for rows, columns in ((1, 1), (1, 70), (5, 3), (9, 131), (300, 260)):
            x = torch.randn(rows, columns)
            block = torch.tensor([x.data_ptr(), rows, 4 * columns])
            assert_every_number_counts(x, block, step if rows > 1 else 0)
    finally:
        cpu.native.use_isa(before)


def assert_every_number_counts(x, block, step):
    def found():
        return cpu.native.checksum(block.data_ptr(), 1, 0, step, 2)

    first = found()
    assert first == cpu.native.checksum(block.data_ptr(), 1, 0, step, 1)
    for row in range(0, x.shape[0], 1 if x.numel() < 2000 else 37):
        seen = []
        for column in range(0, x.shape[1], 1 if x.numel() < 2000 else 13):
            kept = x[row, column].item()
            x[row, column] = kept + 1.0
            seen.append(found() != first)
            x[row, column] = kept
        if step == 0:
            assert all(seen)
        elif x.numel() < 2000:
            assert sum(seen) == (row % step == 0)
    assert found() == first
