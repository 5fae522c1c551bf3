"""The errors of private training. Each says what was refused; nothing is spent and nothing released by a refusal."""

from __future__ import annotations

from choral.errors import ChoralError


class PrivacyError(ChoralError):
    """The privacy promise cannot be kept, so the operation was refused."""


class BudgetExceededError(PrivacyError):
    """The next release would cost more than the budget, or was never planned and paid for."""


class LedgerError(PrivacyError):
    """A ledger is damaged, edited, of another data owner, or cannot be written."""


class AccountingError(PrivacyError):
    """Two accountants disagree, or a calibration has no answer."""


class EncodingError(PrivacyError):
    """A value does not fit the agreed fixed-point range; it is never clipped or wrapped."""


class UnsupportedModelError(PrivacyError):
    """The model's per-sample gradients are undefined, missing or wrong."""


class UnsupportedLoaderError(PrivacyError):
    """The loader's batches cannot be replaced by Poisson samples without changing what was asked for."""


class TooFewClientsError(PrivacyError):
    """Fewer clients survived a round than its noise was sized for; their sum must not be opened."""
