"""What is trained, and what all ways of training share: the user's functions, arithmetic, seeds, initial weights."""
