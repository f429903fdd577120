"""Hugging Face model -> graph -> IR, and calibration text."""
