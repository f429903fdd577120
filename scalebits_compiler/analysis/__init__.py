"""Analyses of IR modules that several stages use."""
