"""Numbers in words, the same in terminal and HTML."""

from __future__ import annotations

MINUS = "−"
_PERCENT = ("accuracy",)


def is_percent(metric: str) -> bool:
    """Accuracies are shares and are shown in percent; other metrics as they are."""
    return metric in _PERCENT


def score(value: float, metric: str) -> str:
    return f"{100 * value:.1f} %" if is_percent(metric) else f"{value:.4g}".replace("-", MINUS)


def plus_minus(half_width: float | None, metric: str) -> str:
    """`` ± 0.8``, or nothing where one seed gives no interval."""
    if half_width is None:
        return ""
    return f" ± {100 * half_width:.1f}" if is_percent(metric) else f" ± {half_width:.2g}"


def signed(value: float, metric: str) -> str:
    """A difference, always with its sign."""
    text = f"{100 * value:+.1f}" if is_percent(metric) else f"{value:+.3g}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", MINUS)


def amount(count: float | None) -> str:
    """Bytes in decimal units (1 MB is 10^6 bytes)."""
    if count is None:
        return "-"
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.95 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: float) -> str:
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    if seconds < 3599.5:
        return f"{round(seconds) // 60} min {round(seconds) % 60:02d} s"
    return f"{seconds / 3600:.1f} h"
