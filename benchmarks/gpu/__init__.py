"""The GPU kernels: times on a GPU, compiled code and counted bytes without one."""
