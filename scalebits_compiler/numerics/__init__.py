"""Pure tensor functions (layer L0): they know no IR."""
