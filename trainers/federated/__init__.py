"""Federated training: rounds, codecs, who takes part, parties that are made when they are asked."""
