"""A run and its folder: recorder, transcript, algorithm state, exported models, energy."""
