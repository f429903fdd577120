"""Executes IR modules of any stage with torch; the definition of every op."""
