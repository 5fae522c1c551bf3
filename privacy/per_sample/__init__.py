"""Per-sample gradients: models that give them, ghost norms, layers that are replaced, calls that are refused."""
