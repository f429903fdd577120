"""CUDA kernels: chosen by `spec`, written as Triton by `emit`, compiled by `aot`."""
