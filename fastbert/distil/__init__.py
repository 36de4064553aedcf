"""Distillation: a small student learns from a larger teacher."""
