"""Pure tensor functions, and the format of tensor files (layer L0): they know no IR."""
