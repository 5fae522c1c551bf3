"""A Flower app in the shape of its quickstart for PyTorch, with secure sums."""
