"""How a run looks in Python and in notebooks: a line, a small table, its history as a data frame, its curves."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

import msgspec

from choral.errors import ConfigError

if TYPE_CHECKING:
    from choral.trainers.run_folder.run import Run


def in_short(run: Run) -> str:
    """One line, without weights."""
    last = run.history[-1].round if run.history else 0
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in run.metrics.items())
    spent = f", {run.spent.in_words}" if run.spent else ""
    where = f", folder {str(run.folder)!r}" if run.folder else ", in memory"
    return f"<Run {run.info.kind}: {last} of {run.info.rounds} rounds, {metrics}{spent}{where}>"


def as_html(run: Run) -> str:
    """What a notebook shows: a row for each thing that one asks of a run."""
    said: dict[str, str] = {
        "training": f"{run.info.kind}, {run.history[-1].round if run.history else 0} of {run.info.rounds} rounds",
        **{name: f"{value:.4g}" for name, value in run.metrics.items()},
        "privacy": run.spent.in_words if run.spent else "none promised",
        "parties": str(run.info.party_count),
        "folder": str(run.folder) if run.folder else "none: the run is in memory",
    }
    rows = "".join(
        f"<tr><th style='text-align:left'>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>"
        for name, text in said.items()
    )
    return f"<table>{rows}</table>"


def history_frame(run: Run) -> Any:
    """A data frame of pandas, or else polars: a row for each round, a column for each metric and each cost.

    Raises: ConfigError where neither is installed.
    """
    rows = []
    for entry in run.history:
        plain = msgspec.to_builtins(entry)
        times = {f"seconds of {name.replace('_', ' ')}": value for name, value in (plain.pop("times") or {}).items()}
        flat = {name: value for name, value in plain.items() if not isinstance(value, dict | list)}
        rows.append({"round": entry.round, **entry.metrics, **flat, **times})
    try:
        import pandas

        return pandas.DataFrame(rows).set_index("round")
    except ImportError:
        pass
    try:
        import polars

        return polars.DataFrame(rows)
    except ImportError:
        raise ConfigError(
            "a data frame needs pandas or polars, and neither is installed", hint='pip install "choral[notebooks]"'
        ) from None


def plot(run: Run, metric: str | None = None, axes: Any = None) -> Any:
    """Draw a metric over the rounds; returns matplotlib's Axes. metric: by default the evaluation's first.

    Raises: ConfigError for a metric that the run has not, and without matplotlib.
    """
    names = list(run.metrics)
    metric = names[0] if metric is None and names else metric
    if metric not in names:
        raise ConfigError(f"the run has no metric {metric!r}", hint=f"it has {', '.join(names) or 'none'}")
    try:
        from matplotlib import pyplot
    except ImportError:
        raise ConfigError(
            "curves are drawn by matplotlib, which is not installed", hint='pip install "choral[notebooks]"'
        ) from None
    axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")[1] if axes is None else axes
    rounds = [entry.round for entry in run.history]
    axes.plot(rounds, [entry.metrics[metric] for entry in run.history], marker=".", label=run.info.kind)
    axes.set_xlabel("round")
    axes.set_ylabel(metric)
    return axes
