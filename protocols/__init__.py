"""Who learns what: secure sums of integer vectors, and the messages they need."""

from __future__ import annotations

from choral.protocols.homomorphic import Homomorphic
from choral.protocols.interface import SecureSum, SumResult, SumRound, SumSession, SumSpec
from choral.protocols.masking.in_process import Masked
from choral.protocols.masking.policy import Policy
from choral.protocols.plain import Plain

__all__ = ["Homomorphic", "Masked", "Plain", "Policy", "SecureSum", "SumResult", "SumRound", "SumSession", "SumSpec"]
