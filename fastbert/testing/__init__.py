"""Shipped test tools: error budget, poison, sample inputs, parity checks, timing, machine info, test data."""
