"""The audit of one run: what it claims against what it left behind."""
