"""Gradients and curvature at quantized weights, and the losses they are of."""
