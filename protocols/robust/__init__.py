"""Means that withstand parties that poison: sums in random groups, and a median over the groups' means."""
