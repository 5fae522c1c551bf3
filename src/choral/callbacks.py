"""What may be called with each completed round: ``Keep(on_round=TensorBoard("logs"))``.

A callback is any function of one argument, a round's record (`choral.trainers.RoundRecord`). It runs in the process of
whoever trains, after the round is kept; what it raises stops the run, whose completed rounds stay. What it is given is
what history.jsonl holds: metrics of ``evaluate``, seconds, bytes, the worst data owner's epsilon. No promise covers a
metric that was computed from private records, wherever it is shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from choral.errors import ConfigError

if TYPE_CHECKING:
    from choral.trainers import RoundRecord


class TensorBoard:
    """Write each round's figures for TensorBoard (extra `choral[tensorboard]`). folder: of the event files.

    Raises: ConfigError without torch's writer, which needs the package tensorboard.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError(
                "TensorBoard files are written by tensorboard, which is not installed",
                hint='pip install "choral[tensorboard]"',
            ) from None
        self._writer: Any = SummaryWriter(str(folder))

    def __call__(self, entry: RoundRecord) -> None:
        for name, value in _figures(entry):
            self._writer.add_scalar(name, value, entry.round)
        self._writer.flush()


class MLflow:
    """Log each round's figures to MLflow's active run, or to one that this begins (extra `choral[mlflow]`).

    experiment, run_name: as ``mlflow.set_experiment`` and ``mlflow.start_run`` take them.
    Raises: ConfigError without mlflow.
    """

    def __init__(self, experiment: str | None = None, run_name: str | None = None) -> None:
        try:
            import mlflow
        except ImportError:
            raise ConfigError("MLflow's client is not installed", hint='pip install "choral[mlflow]"') from None
        self._mlflow: Any = mlflow
        if experiment is not None:
            mlflow.set_experiment(experiment)
        self._run = mlflow.active_run() or mlflow.start_run(run_name=run_name)

    def __call__(self, entry: RoundRecord) -> None:
        figures = {_plain(name): value for name, value in _figures(entry)}
        self._mlflow.log_metrics(figures, step=entry.round, run_id=self._run.info.run_id)


def _figures(entry: RoundRecord) -> Iterator[tuple[str, float]]:
    yield from entry.metrics.items()
    for name in ("epsilon", "clip", "seconds", "bytes_up", "bytes_down", "survivors"):
        if (value := getattr(entry, name)) is not None:
            yield f"choral/{name}", float(value)


def _plain(name: str) -> str:
    """MLflow's names have letters, digits and a few signs."""
    return "".join(sign if sign.isalnum() or sign in "_-. /" else "_" for sign in name)
