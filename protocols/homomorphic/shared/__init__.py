"""Sums under a key that the parties share, by Microsoft SEAL: BFV for integers, CKKS for floats."""
