"""The Triton backend, installed as `fastbert.kernels`: one module per op, shared maths in `_math`."""
