"""A federation whose parties are elsewhere: what a session has in their place."""
