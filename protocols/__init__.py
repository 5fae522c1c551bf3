"""Who learns what: secure sums of integer vectors, and the messages they need."""
