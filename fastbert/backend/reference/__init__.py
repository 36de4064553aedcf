"""The specification: every op in plain PyTorch, forward and explicit backward; runs by name only."""
