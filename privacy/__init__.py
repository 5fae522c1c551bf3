"""What noise costs: budgets, accounting, mechanisms, and the torch wrapper.

`choral.privacy.accounting.record_level` needs no torch; the names below are fetched when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from choral.lazy import exports

if TYPE_CHECKING:
    from choral.privacy.accounting.budget import Budget, budget
    from choral.privacy.accounting.events import (
        ClientRelease,
        CorrelatedGaussian,
        Part,
        Plan,
        PoissonSampledGaussian,
        Search,
    )
    from choral.privacy.client_level.client import ClientGuard, ClientPrivacy, ClientRound
    from choral.privacy.correlated.training_loop import CorrelatedPrivacy
    from choral.privacy.dpsgd.clipping import AdaptiveClip, PerLayerClip
    from choral.privacy.dpsgd.engine import Guard, Privacy
    from choral.privacy.dpsgd.private_search import Found, private_search
    from choral.privacy.errors import (
        AccountingError,
        BudgetExceededError,
        EncodingError,
        LedgerError,
        PrivacyError,
        TooFewClientsError,
        UnsupportedLoaderError,
        UnsupportedModelError,
    )
    from choral.privacy.fixed_point import FixedPoint
    from choral.privacy.ledgers.ledger import Ledger
    from choral.privacy.ledgers.spent import Spent
    from choral.privacy.per_sample.layer_replacement import replace_layers
    from choral.privacy.per_sample.model import unwrap

_HOME = {
    "AccountingError": "choral.privacy.errors",
    "AdaptiveClip": "choral.privacy.dpsgd.clipping",
    "Budget": "choral.privacy.accounting.budget",
    "BudgetExceededError": "choral.privacy.errors",
    "ClientGuard": "choral.privacy.client_level.client",
    "ClientPrivacy": "choral.privacy.client_level.client",
    "ClientRelease": "choral.privacy.accounting.events",
    "ClientRound": "choral.privacy.client_level.client",
    "CorrelatedGaussian": "choral.privacy.accounting.events",
    "CorrelatedPrivacy": "choral.privacy.correlated.training_loop",
    "EncodingError": "choral.privacy.errors",
    "FixedPoint": "choral.privacy.fixed_point",
    "Found": "choral.privacy.dpsgd.private_search",
    "Guard": "choral.privacy.dpsgd.engine",
    "Ledger": "choral.privacy.ledgers.ledger",
    "LedgerError": "choral.privacy.errors",
    "PoissonSampledGaussian": "choral.privacy.accounting.events",
    "Part": "choral.privacy.accounting.events",
    "PerLayerClip": "choral.privacy.dpsgd.clipping",
    "Plan": "choral.privacy.accounting.events",
    "Privacy": "choral.privacy.dpsgd.engine",
    "PrivacyError": "choral.privacy.errors",
    "Search": "choral.privacy.accounting.events",
    "Spent": "choral.privacy.ledgers.spent",
    "TooFewClientsError": "choral.privacy.errors",
    "UnsupportedLoaderError": "choral.privacy.errors",
    "UnsupportedModelError": "choral.privacy.errors",
    "budget": "choral.privacy.accounting.budget",
    "private_search": "choral.privacy.dpsgd.private_search",
    "replace_layers": "choral.privacy.per_sample.layer_replacement",
    "unwrap": "choral.privacy.per_sample.model",
}

__all__ = [
    "AccountingError",
    "AdaptiveClip",
    "Budget",
    "BudgetExceededError",
    "ClientGuard",
    "ClientPrivacy",
    "ClientRelease",
    "ClientRound",
    "CorrelatedGaussian",
    "CorrelatedPrivacy",
    "EncodingError",
    "FixedPoint",
    "Found",
    "Guard",
    "Ledger",
    "LedgerError",
    "Part",
    "PerLayerClip",
    "Plan",
    "PoissonSampledGaussian",
    "Privacy",
    "PrivacyError",
    "Search",
    "Spent",
    "TooFewClientsError",
    "UnsupportedLoaderError",
    "UnsupportedModelError",
    "budget",
    "private_search",
    "replace_layers",
    "unwrap",
]

__getattr__, __dir__ = exports(__name__, _HOME)
