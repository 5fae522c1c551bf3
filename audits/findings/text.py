"""Numbers in words, the same in terminal and HTML."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import TYPE_CHECKING

from choral.metrics import is_falling

if TYPE_CHECKING:
    from choral.audits.findings.evidence import Bound
    from choral.audits.findings.schema import PartyMeasureName

MINUS = "−"
NBSP = "\u00a0"  # keeps a number and its unit on one line
OVERALL = {"holds": "no violation found", "violated": "violated", "unverified": "not verified"}  # of a whole audit
_PERCENT = ("accuracy", "test error")
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def is_percent(metric: str) -> bool:
    """Accuracies and errors are shares and are shown in percent; other metrics as they are."""
    return metric in _PERCENT


def is_gap(metric: str) -> bool:
    """How far something is from its least value, such as "objective gap": what counts is its order of magnitude."""
    return metric.split(" ")[-1] == "gap"


def score(value: float, metric: str) -> str:
    if is_percent(metric):
        return f"{100 * value:.1f}{NBSP}%"
    return f"{value:.{3 if is_gap(metric) else 4}g}".replace("-", MINUS)


def width(value: float, metric: str) -> str:
    """A spread: in percentage points for shares."""
    return f"{100 * value:.1f}" if is_percent(metric) else f"{value:.3g}"


def party_words(metric: str) -> tuple[tuple[PartyMeasureName, str], ...]:
    """The measures of how parties differ that are shown, with their headings."""
    return (
        ("worst", "Worst party"),
        ("tenth", "Ninetieth percentile" if is_falling(metric) else "Tenth percentile"),
        ("deviation", "Standard deviation"),
        ("range", "Greatest − least"),
    )


def cost(epsilon: float) -> str:
    """An epsilon to two decimals (below 0.1 four, or two digits), rounded up: it may not look smaller than it is."""
    if not math.isfinite(epsilon):
        return str(epsilon)
    exact = Decimal(repr(float(epsilon)))
    decimals = 2 if epsilon >= 0.1 or epsilon == 0 else max(4, 1 - exact.adjusted())
    return f"{exact.quantize(Decimal(1).scaleb(-decimals), ROUND_CEILING):f}"


def at_least(value: float, decimals: int | None = None) -> str:
    """A lower bound to three digits, or so many decimals, rounded down: it may not look larger than it is."""
    if not math.isfinite(value) or value <= 0:
        return f"{value:.3g}" if decimals is None else f"{value:.{decimals}f}"
    exact = Decimal(repr(float(value)))
    if decimals is not None:
        return f"{exact.quantize(Decimal(1).scaleb(-decimals), ROUND_FLOOR):f}"
    return f"{float(exact.quantize(Decimal(1).scaleb(exact.adjusted() - 2), ROUND_FLOOR)):.3g}"


def plus_minus(half_width: float | None, metric: str) -> str:
    """`` ± 0.8``, or nothing where one seed gives no interval."""
    if half_width is None:
        return ""
    return f" ± {100 * half_width:.1f}" if is_percent(metric) else f" ± {half_width:.2g}"


def signed(value: float, metric: str) -> str:
    """A difference, always with its sign."""
    text = f"{100 * value:+.1f}" if is_percent(metric) else f"{value:+.3g}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", MINUS)


def power(value: float) -> str:
    """A small number such as a delta: ``10⁻⁵`` or ``2.5 × 10⁻⁶``; others as they are."""
    if not 0 < value < 0.001:  # 0, infinity and everyday sizes
        return f"{value:.3g}"
    digits, exponent = f"{value:.1e}".split("e")
    raised = "10" + str(int(exponent)).translate(_RAISED)
    return raised if digits == "1.0" else f"{digits.removesuffix('.0')} × {raised}"


def amount(count: float | None) -> str:
    """Bytes in decimal units (1 MB is 10^6 bytes)."""
    if count is None:
        return "-"
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f}{NBSP}{unit}" if unit == "B" or count >= 99.95 else f"{count:.1f}{NBSP}{unit}"
        count /= 1000
    return f"{count:.1f}{NBSP}TB"


def duration(seconds: float) -> str:
    if 0 < seconds < 0.095:
        return f"{1000 * seconds:.0f}{NBSP}ms"
    if seconds < 59.95:
        return f"{seconds:.1f}{NBSP}s"
    if seconds < 3599.5:
        return f"{round(seconds) // 60}{NBSP}min {round(seconds) % 60:02d}{NBSP}s"
    return f"{seconds / 3600:.1f}{NBSP}h"


def money(usd: float) -> str:
    """US dollars to two significant digits: a modelled bill has no more."""
    if usd >= 1000:
        return f"{usd:,.0f}{NBSP}USD"
    if usd >= 0.1 or usd == 0:
        return f"{usd:.2f}{NBSP}USD"
    return f"{usd:.{1 - math.floor(math.log10(usd))}f}{NBSP}USD"


def energy(joules: float) -> str:
    """Joules in a unit of everyday size."""
    for size, unit in ((3.6e6, "kWh"), (1e3, "kJ")):
        if joules >= size:
            return f"{joules / size:.3g}{NBSP}{unit}"
    return f"{joules:.3g}{NBSP}J"


def refuting_words(bound: Bound) -> str:
    """What would have put a bound above the claim: "at least 196 of 200 right (AUC 0.97)"; "" if nothing could."""
    if bound.refuting is None:
        return ""
    counts, auc = bound.refuting.counts, bound.refuting.auc
    said = []
    if "right" in counts:
        said.append(f"{counts['right']:,} of {counts['guesses']:,} right")
    if "true_positives" in counts:
        members = bound.counts["true_positives"] + bound.counts["false_negatives"]
        said.append(f"{counts['true_positives']:,} of {members:,} true positives")
    if auc is not None:
        said.append(f"AUC {auc:.3f}" if auc < 0.9995 else "AUC 1")
    return ", ".join(said)


def would_have_refuted(bound: Bound) -> str:
    """The same as the end of a sentence."""
    words = refuting_words(bound)
    return f", and would have refuted it from {words}" if words else ""
