"""The coordinator of sites: the server of a federation whose parties are at their own machines."""
