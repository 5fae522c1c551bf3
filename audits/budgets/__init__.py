"""Ledgers recomputed by several accountants: what each data holder spent, against what was promised."""
