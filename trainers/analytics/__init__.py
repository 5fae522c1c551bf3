"""Statistics of all parties' records under the same secure sums, noise and ledgers as a training."""
