"""CPU kernels: chosen by `spec`, written by `gemv` and its kin, compiled by `objects`."""
