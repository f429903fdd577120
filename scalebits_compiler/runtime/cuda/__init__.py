"""Runs artifacts of the cuda target with torch and Triton; the only runtime code that needs torch.

Nothing outside imports it before such an artifact is run.
"""
