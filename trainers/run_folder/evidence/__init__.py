"""Evidence that binds a run's files together: receipts of the parties, the run's manifest, and their signatures."""
