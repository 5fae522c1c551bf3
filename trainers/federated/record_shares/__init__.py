"""Federated SGD with noise in shares: what is refused, the plan of a run, its ledgers, and its sums."""
