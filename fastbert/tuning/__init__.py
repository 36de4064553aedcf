"""Which backend runs an op: `explain` prints it, `tune` measures which one is the fastest."""
