"""Client-level privacy: whole updates clipped, noise in shares inside the secure sum or added by the server."""
