"""Sums of ciphertexts: the server adds what it cannot read."""

from __future__ import annotations

from choral.protocols.homomorphic.front import Homomorphic

__all__ = ["Homomorphic"]
