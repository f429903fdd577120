"""Writes artifacts: the folder, its tensors, its sizes."""
