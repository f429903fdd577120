"""Bit-widths of blocks under a budget."""
