"""Whole models and whole scripts against their peers."""
