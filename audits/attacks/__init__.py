"""Attacks on trained models and on messages: canaries, membership inference, inversion, probes of a trainer."""
