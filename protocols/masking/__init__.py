"""The masked sum: parties and server as pure steps on bytes, what parties accept, and who masks with whom."""
