"""Smaller models: pruning to a speed-up that is measured, and vocabularies of the texts at hand."""
