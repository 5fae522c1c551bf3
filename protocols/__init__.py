"""Who learns what: secure sums of integer vectors, and the messages they need."""

from __future__ import annotations

from choral.protocols.homomorphic import Homomorphic
from choral.protocols.masked import Masked
from choral.protocols.plain import Plain
from choral.protocols.policy import Policy
from choral.protocols.seam import SecureSum, SumResult, SumRound, SumSession, SumSpec

__all__ = ["Homomorphic", "Masked", "Plain", "Policy", "SecureSum", "SumResult", "SumRound", "SumSession", "SumSpec"]
