"""From a model to artifacts: options, stages, budgets, checkpoints."""
