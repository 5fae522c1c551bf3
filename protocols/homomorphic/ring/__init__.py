"""The ring of the split-key sum: arithmetic, kernels for CPU and GPU, and its discrete Gaussian."""
