"""The commands that are not `compile`, one module each; cli/ parses their arguments."""
