"""Ledgers recomputed by several accountants: what each data owner spent, against what was promised."""
