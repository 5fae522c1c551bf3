"""DP-SGD for one data owner: the engine, Poisson batches, clipping, the private optimizer, private search."""
