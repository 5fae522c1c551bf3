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
    "AccountingError": "errors",
    "AdaptiveClip": "clipping",
    "Budget": "budgeting",
    "BudgetExceededError": "errors",
    "ClientGuard": "client",
    "ClientPrivacy": "client",
    "ClientRelease": "events",
    "ClientRound": "client",
    "CorrelatedGaussian": "events",
    "CorrelatedPrivacy": "correlated",
    "EncodingError": "errors",
    "FixedPoint": "encoding",
    "Found": "search",
    "Guard": "guard",
    "Ledger": "ledger",
    "LedgerError": "errors",
    "PoissonSampledGaussian": "events",
    "Part": "events",
    "PerLayerClip": "clipping",
    "Plan": "events",
    "Privacy": "guard",
    "PrivacyError": "errors",
    "Search": "events",
    "Spent": "spent",
    "TooFewClientsError": "errors",
    "UnsupportedLoaderError": "errors",
    "UnsupportedModelError": "errors",
    "budget": "budgeting",
    "private_search": "search",
    "replace_layers": "layers",
    "unwrap": "model",
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

__getattr__, __dir__ = exports(__name__, {name: f"choral.privacy.{home}" for name, home in _HOME.items()})
