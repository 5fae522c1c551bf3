"""What the parties of a training agree on, by whose code it is run, and how far a party has come under it."""
