"""What it shows: budgets, attacks, costs, the comparison and its report."""

from __future__ import annotations

from choral.audits.comparison import Comparison, compare
from choral.audits.prices import PriceSettings, read_prices
from choral.audits.report import ReportError
from choral.audits.run_audit import Audit, audit

__all__ = ["Audit", "Comparison", "PriceSettings", "ReportError", "audit", "compare", "read_prices"]
