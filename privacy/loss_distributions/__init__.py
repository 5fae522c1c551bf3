"""Privacy loss distributions: of one step, as pairs that dominate it, and of many, by FFT with rigorous bounds."""
