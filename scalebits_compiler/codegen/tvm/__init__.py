"""CPU kernels: chosen by `spec`, written by `gemv`, `gemm` and `quantize`, built by `build`."""
