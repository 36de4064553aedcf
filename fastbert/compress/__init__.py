"""Smaller models that are faster: pruning to a speed-up that is measured."""
