"""What it shows: budgets, attacks, costs, the comparison and its report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from choral.audits.comparison.comparison import Comparison, compare
from choral.audits.costs.prices import PriceSettings, read_prices
from choral.audits.findings.schema import ReportError
from choral.audits.run.run_audit import Audit, audit
from choral.lazy import exports

if TYPE_CHECKING:
    from choral.audits.attacks.client_canaries import audit_clients
    from choral.audits.attacks.inversion import inversion_audit
    from choral.audits.attacks.membership import confidences, lira_offline, lira_online, logit_gap, loss_threshold, rmia
    from choral.audits.attacks.probing import probe
    from choral.audits.attacks.score_audit import audit_scores, audit_training, canaries_needed
    from choral.audits.attacks.score_files import read_scores
    from choral.audits.attacks.shadow_models import train_shadows

_HOME = {
    "audit_clients": "choral.audits.attacks.client_canaries",
    "audit_scores": "choral.audits.attacks.score_audit",
    "audit_training": "choral.audits.attacks.score_audit",
    "canaries_needed": "choral.audits.attacks.score_audit",
    "confidences": "choral.audits.attacks.membership",
    "inversion_audit": "choral.audits.attacks.inversion",
    "lira_offline": "choral.audits.attacks.membership",
    "lira_online": "choral.audits.attacks.membership",
    "logit_gap": "choral.audits.attacks.membership",
    "loss_threshold": "choral.audits.attacks.membership",
    "probe": "choral.audits.attacks.probing",
    "read_scores": "choral.audits.attacks.score_files",
    "rmia": "choral.audits.attacks.membership",
    "train_shadows": "choral.audits.attacks.shadow_models",
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
