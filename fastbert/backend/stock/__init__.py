"""The `torch` backend: the best stock ops, for whatever no kernel of ours fits or wins."""
