"""One module per op: contract, choice of backend, registered op, autograd."""
