"""DP-SGD for one data holder: the engine, Poisson batches, clipping, the private optimizer, private search."""
