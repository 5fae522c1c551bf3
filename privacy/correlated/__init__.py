"""The matrix mechanism: noise correlated over steps, its factorisation and its streams."""
