"""Noise nobody can replay: Gaussian from a cryptographic stream, integers drawn exactly, random rotation."""
