"""Ways of training side by side: what may be compared, and what the comparison checks."""
