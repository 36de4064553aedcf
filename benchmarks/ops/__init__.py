"""Every op against stock PyTorch, run by pytest."""
