"""The files of a site: how each is written, read and checked, whatever is done with what it says."""
