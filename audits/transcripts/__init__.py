"""What the server saw, held against what the secure sum promises."""
