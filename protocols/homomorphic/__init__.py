"""Sums of ciphertexts: the server adds what it cannot read."""

from __future__ import annotations
