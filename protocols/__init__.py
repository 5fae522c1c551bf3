"""Who learns what: secure sums of integer vectors, and the messages they need."""

from __future__ import annotations

from choral.protocols.plain import Plain
from choral.protocols.seam import SecureSum, SumResult, SumRound, SumSession, SumSpec

__all__ = ["Plain", "SecureSum", "SumResult", "SumRound", "SumSession", "SumSpec"]
