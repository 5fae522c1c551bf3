"""Who computes what: local steps, federated algorithms, the cloud baseline, engines."""
