"""The IR (layer L1): types, ops, module, printer, parser, verifier. Needs numpy and lark only."""
