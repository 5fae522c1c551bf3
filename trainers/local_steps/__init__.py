"""What one party computes in a round: its own loop on the resident model, or the same as formulas."""
