"""Test tools in the package: error budget, poison, parity checks, timing, peaks, compiled kernels, test data."""
