"""A training that is over or was interrupted, as Python holds it; :mod:`choral.trainers.run_folder.folder` reads it."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import msgspec
import torch

from choral.errors import ConfigError
from choral.privacy import Spent
from choral.trainers.run_folder import views
from choral.trainers.run_folder.folder import (
    BEST,
    LAST,
    as_read_back,
    checked_json,
    history_lines,
    ledger_file,
    read_best,
    read_history,
    read_info,
    read_weights,
    replace_file,
    weights_bytes,
)
from choral.trainers.run_folder.info import RoundRecord, RunFolderError, RunInfo, best_of

if TYPE_CHECKING:
    from torch import nn

    from choral.trainers.run_folder.export import Exported


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished or interrupted training. ``state`` is the model's state dict after the last history entry.

    ledgers: of a run without a folder, by data owner: the lines of what would be its ledger files, for audits.
    best: the state dict after round `best_round`, the best by the evaluation's first metric; empty where a run of an
        earlier version kept none.
    architecture: the model that was trained, where the run was made in this process; `model` is a copy of it.
    """

    info: RunInfo
    history: tuple[RoundRecord, ...]
    state: Mapping[str, torch.Tensor]
    folder: Path | None = None
    ledgers: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    best: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)
    architecture: nn.Module | None = field(default=None, repr=False, compare=False)

    def __repr__(self) -> str:
        return views.in_short(self)

    def _repr_html_(self) -> str:
        return views.as_html(self)

    @property
    def model(self) -> nn.Module:
        """A copy of the trained model, in eval mode, on the CPU. Raises: ConfigError for a run read from a folder."""
        if self.architecture is None:
            raise ConfigError(
                "a run folder holds weights, and no code to make the model",
                hint="model = build(dataset)[0]; model.load_state_dict(run.state)",
            )
        model = copy.deepcopy(self.architecture).cpu()
        model.load_state_dict(self.state)
        return model.eval()

    def history_frame(self) -> Any:
        """The history as a data frame. See :func:`choral.trainers.run_folder.views.history_frame`."""
        return views.history_frame(self)

    def plot(self, metric: str | None = None, axes: Any = None) -> Any:
        """Draw a metric over the rounds. See :func:`choral.trainers.run_folder.views.plot`."""
        return views.plot(self, metric, axes)

    @property
    def finished(self) -> bool:
        return bool(self.history) and (self.history[-1].round >= self.info.rounds or bool(self.info.ended))

    @property
    def best_round(self) -> int:
        """The round that was best by the evaluation's first metric, the earliest of equals."""
        return best_of(self.history)

    @property
    def metrics(self) -> dict[str, float]:
        """The latest evaluation."""
        return dict(self.history[-1].metrics) if self.history else {}

    @property
    def spent(self) -> Spent | None:
        """The worst data owner's cost, or None without privacy."""
        return max(self.info.spent.values(), key=lambda spent: spent.epsilon, default=None)

    def save(self, folder: str | Path) -> Path:
        """Write the run as a folder; its ledgers, too, unless they are in files already, which stay where they are.

        Raises: RunFolderError if the folder already holds a run.
        """
        folder = Path(folder)
        if (folder / "run.json").exists():
            raise RunFolderError(f"{folder} already holds a run", hint="choose another folder")
        info, lines = checked_json(as_read_back(self.info)), history_lines(self.history)
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / "history.jsonl", lines)
        replace_file(folder / LAST, weights_bytes(self.state, self.history[-1].round if self.history else 0))
        if self.best:
            replace_file(folder / BEST, weights_bytes(self.best, self.best_round))
        for name, content in self.ledgers.items():
            (folder / "ledger").mkdir(exist_ok=True)
            replace_file(ledger_file(folder / "ledger", name), content)
        replace_file(folder / "run.json", msgspec.json.format(info, indent=1))
        return folder

    def export(self, model: nn.Module, example_inputs: Sequence[torch.Tensor], path: str | Path) -> Exported:
        """Write the trained model for inference, as ``.pt2`` or ``.onnx``, checked for equal outputs.

        model: of the run's architecture, such as ``build(dataset)[0]``; its own weights do not matter.
        See :func:`choral.trainers.run_folder.export.export` for arguments and errors.
        """
        from choral.trainers.run_folder.export import export

        return export(model, self.state, example_inputs, path)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read a run folder back.

        Raises: RunFolderError naming the file that is missing, damaged or of another version.
        """
        folder = Path(folder)
        info = read_info(folder)
        state, last = read_weights(folder)
        history = read_history(folder, last)
        return cls(info=info, history=history, state=state, folder=folder, best=read_best(folder, best_of(history)))


def value_bound_for(run: Run, margin: float = 4.0) -> float:
    """A ``value_bound`` for runs like this one, a dry run with ``Plain`` on public data: the power of two from `margin`
    times the largest coordinate that a party sent.

    Raises: ConfigError for a run that shows none (another secure sum, a transcript, client-level privacy).
    """
    seen = [entry.largest for entry in run.history if entry.largest is not None]
    if not seen:
        raise ConfigError(
            "the run does not show how large its updates were",
            hint="train on public data with secure_sum=Plain(), and without transcript or ClientPrivacy",
        )
    return 2.0 ** math.ceil(math.log2(max(margin * max(seen), 2.0**-20)))
