"""The command line (layer L4): argparse only; the work is done below."""
