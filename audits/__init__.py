"""What it shows: budgets, attacks, costs, the comparison and its report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from choral.audits.comparison import Comparison, compare
from choral.audits.prices import PriceSettings, read_prices
from choral.audits.report import ReportError
from choral.audits.run_audit import Audit, audit
from choral.lazy import exports

if TYPE_CHECKING:
    from choral.audits.client_audit import audit_clients
    from choral.audits.inversion import inversion_audit
    from choral.audits.membership import confidences, lira_offline, lira_online, logit_gap, loss_threshold, rmia
    from choral.audits.probing import probe
    from choral.audits.score_files import read_scores
    from choral.audits.scores import audit_scores, audit_training, canaries_needed
    from choral.audits.shadow import train_shadows

_HOME = {
    "audit_clients": "choral.audits.client_audit",
    "audit_scores": "choral.audits.scores",
    "audit_training": "choral.audits.scores",
    "canaries_needed": "choral.audits.scores",
    "confidences": "choral.audits.membership",
    "inversion_audit": "choral.audits.inversion",
    "lira_offline": "choral.audits.membership",
    "lira_online": "choral.audits.membership",
    "logit_gap": "choral.audits.membership",
    "loss_threshold": "choral.audits.membership",
    "probe": "choral.audits.probing",
    "read_scores": "choral.audits.score_files",
    "rmia": "choral.audits.membership",
    "train_shadows": "choral.audits.shadow",
}

__all__ = [
    "Audit",
    "Comparison",
    "PriceSettings",
    "ReportError",
    "audit",
    "audit_clients",
    "audit_scores",
    "audit_training",
    "canaries_needed",
    "compare",
    "confidences",
    "inversion_audit",
    "lira_offline",
    "lira_online",
    "logit_gap",
    "loss_threshold",
    "probe",
    "read_prices",
    "read_scores",
    "rmia",
    "train_shadows",
]

__getattr__, __dir__ = exports(__name__, _HOME)
