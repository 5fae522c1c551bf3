"""Sums under keys that nobody holds: each party encrypts under its own, and only the sum of the keys is learned."""
