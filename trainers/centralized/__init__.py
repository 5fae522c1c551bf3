"""The baseline in the cloud: pooled training, data-parallel training, and the search for settings."""
