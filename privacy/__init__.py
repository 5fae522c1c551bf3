"""What noise costs: budgets, accounting, mechanisms, and the torch wrapper.

`choral.privacy.accounting` needs no torch; the names below are fetched when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from choral.lazy import exports

if TYPE_CHECKING:
    from choral.privacy.budgeting import Budget, budget
    from choral.privacy.client import ClientGuard, ClientPrivacy, ClientRound
    from choral.privacy.clipping import AdaptiveClip, PerLayerClip
    from choral.privacy.correlated import CorrelatedPrivacy
    from choral.privacy.encoding import FixedPoint
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
    from choral.privacy.events import ClientRelease, CorrelatedGaussian, Part, Plan, PoissonSampledGaussian, Search
    from choral.privacy.guard import Guard, Privacy
    from choral.privacy.layers import replace_layers
    from choral.privacy.ledger import Ledger
    from choral.privacy.model import unwrap
    from choral.privacy.search import Found, private_search
    from choral.privacy.spent import Spent

_HOME = {
    "AccountingError": "choral.privacy.errors",
    "AdaptiveClip": "choral.privacy.clipping",
    "Budget": "choral.privacy.budgeting",
    "BudgetExceededError": "choral.privacy.errors",
    "ClientGuard": "choral.privacy.client",
    "ClientPrivacy": "choral.privacy.client",
    "ClientRelease": "choral.privacy.events",
    "ClientRound": "choral.privacy.client",
    "CorrelatedGaussian": "choral.privacy.events",
    "CorrelatedPrivacy": "choral.privacy.correlated",
    "EncodingError": "choral.privacy.errors",
    "FixedPoint": "choral.privacy.encoding",
    "Found": "choral.privacy.search",
    "Guard": "choral.privacy.guard",
    "Ledger": "choral.privacy.ledger",
    "LedgerError": "choral.privacy.errors",
    "PoissonSampledGaussian": "choral.privacy.events",
    "Part": "choral.privacy.events",
    "PerLayerClip": "choral.privacy.clipping",
    "Plan": "choral.privacy.events",
    "Privacy": "choral.privacy.guard",
    "PrivacyError": "choral.privacy.errors",
    "Search": "choral.privacy.events",
    "Spent": "choral.privacy.spent",
    "TooFewClientsError": "choral.privacy.errors",
    "UnsupportedLoaderError": "choral.privacy.errors",
    "UnsupportedModelError": "choral.privacy.errors",
    "budget": "choral.privacy.budgeting",
    "private_search": "choral.privacy.search",
    "replace_layers": "choral.privacy.layers",
    "unwrap": "choral.privacy.model",
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
