"""Keeps a run as it goes: history, weights and costs, in memory and (with a folder) on disk."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Self

import msgspec
import torch
from torch import nn

from choral.privacy import AdaptiveClip, Ledger, Privacy, Spent
from choral.trainers.run_folder import folder as folders
from choral.trainers.run_folder.algorithm_state import AlgorithmState, read_algorithm_state, write_algorithm_state
from choral.trainers.run_folder.info import RoundRecord, RunFolderError, RunInfo, Sealed, best_of
from choral.trainers.run_folder.resume import check_complete, check_same
from choral.trainers.run_folder.run import Run
from choral.trainers.task.flat_vector import Layout
from choral.trainers.task.per_party import PerParty
from choral.trainers.task.task import EvaluateParty


class Recorder:
    """One run's record; a context manager that holds the folder's lock.

    ``open`` refuses before any training; ``add`` is called once per completed round.
    On disk a round counts as complete when model.safetensors carries its number; what a killed process had written
    beyond that is dropped on resume.
    """

    def __init__(
        self,
        folder: Path | None,
        info: RunInfo,
        history: list[RoundRecord],
        state: dict[str, torch.Tensor],
        claim: BinaryIO | None = None,
        lasting: Path | None = None,
    ) -> None:
        self._folder, self._info, self._history, self._state, self._claim = folder, info, history, state, claim
        self._lasting = lasting
        self._model: nn.Module | None = None  # of the latest round
        self._ledgers: dict[str, Ledger] = {}
        self._best: dict[str, torch.Tensor] = {}  # of the best round, in a run without a folder

    @classmethod
    def open(cls, out: str | Path | None, info: RunInfo, *, resume: bool, ledgers: str | Path | None = None) -> Self:
        """ledgers: a folder of those that outlive the run.

        Raises: RunFolderError if another process writes to ``out``, if it holds anything and ``resume`` is off, or
        if its settings could not be read back; ConfigError if the run that it holds was started with other settings.
        """
        lasting = None if ledgers is None else Path(ledgers)
        if out is None:
            return cls(None, info, [], {}, lasting=lasting)
        folder, info = Path(out), folders.as_read_back(info)
        if not resume:
            folders.check_empty(folder)
        claim = folders.lock(folder)
        try:
            if resume and (folder / "model.safetensors").is_file():
                old = folders.read_info(folder)
                check_same(old, info)
                if info.rounds > old.rounds:  # what was said of its last round is of an earlier one now
                    old = msgspec.structs.replace(old, rounds=info.rounds, ended="", per_party=None)
                state, last = folders.read_weights(folder)
                return cls(folder, old, list(folders.read_history(folder, last)), state, claim, lasting)
            if not (folder / "run.json").is_file():
                folders.check_empty(folder)
            return cls(folder, info, [], {}, claim, lasting)
        except BaseException:
            claim.close()
            raise

    @property
    def fresh(self) -> bool:
        return not self._history

    @property
    def history(self) -> Sequence[RoundRecord]:
        """The rounds so far."""
        return self._history

    @property
    def completed(self) -> int:
        return self._history[-1].round if self._history else 0

    @property
    def spent(self) -> Mapping[str, Spent]:
        """The recorded cost per data owner; the ledgers are the truth."""
        return self._info.spent

    @property
    def sealed(self) -> Sealed | None:
        """How far the transcript went when the latest round was complete; None if none was recorded."""
        return self._info.transcript

    @property
    def ledger_folder(self) -> Path | None:
        """Where data owners' ledgers are; None, in memory. Those that outlive the run have a folder of their own."""
        if self._lasting is not None:
            self._lasting.mkdir(parents=True, exist_ok=True)
            return self._lasting
        return self._folder / "ledger" if self._folder else None

    def draws(self) -> int:
        """The run's secret from which cohorts are drawn, made by the operating system; kept for as long as its folder,
        so that a round that is retried after a resume selects those whom it had selected.
        """
        if self._folder is None:
            return secrets.randbits(256)
        path = self._folder / "cohorts.secret"
        if not path.is_file():
            if not self.fresh:
                raise RunFolderError(
                    f"{path} is missing, from which the cohorts were drawn", hint="restore it, or run in a new folder"
                )
            folders.replace_file(path, secrets.token_bytes(32), mode=0o600)
        found = path.read_bytes()
        if len(found) != 32:
            raise RunFolderError(f"{path} is damaged: expected 32 bytes", hint="run again in a new folder")
        return int.from_bytes(found, "little")

    def keep(self, ledgers: Mapping[str, Ledger]) -> None:
        """Let a run without a folder carry what its ledgers hold, by data owner; and one with a folder, where they
        outlive it, put copies there.
        """
        self._ledgers |= ledgers

    def copy_ledgers(self) -> None:
        """Of ledgers that outlive the run, put what they hold now into its folder, until it is sealed.

        Raises: LedgerError.
        """
        if self._folder is None or self._lasting is None or (self._folder / "manifest.json").exists():
            return
        (self._folder / "ledger").mkdir(exist_ok=True)
        for name, ledger in self._ledgers.items():
            if content := ledger.written():
                folders.replace_file(folders.ledger_file(self._folder / "ledger", name), content)

    def begin(self, info: RunInfo) -> None:
        """Write the folder's run.json, and drop what was written beyond the last complete round.

        Raises: ConfigError if a run that is resumed was started with another model or encoding.
        """
        if not self.fresh:
            check_complete(self._info, info)
            if self.completed >= info.rounds and self._folder and (self._folder / "manifest.json").is_file():
                return  # it is signed as it is; other arms or prices of the job are nothing to it
            info = msgspec.structs.replace(
                info,
                spent=self._info.spent,
                per_party=self._info.per_party,
                transcript=self._info.transcript,
                dropped=self._info.dropped,
            )
        self._info = info
        if self._folder:
            self._info = info = folders.as_read_back(info)
            folders.write_info(self._folder, info)
            (self._folder / "ledger").mkdir(exist_ok=True)
            if self.completed < info.rounds:  # what was signed is of fewer rounds than are to come
                (self._folder / "manifest.json").unlink(missing_ok=True)
            folders.replace_file(self._folder / "history.jsonl", folders.history_lines(self._history))

    def restore(self, model: nn.Module, layout: Layout, optimizer: torch.optim.Optimizer | None = None) -> torch.Tensor:
        """Put the recorded weights, if there are any, into ``model``; return its weights, float32, shape (d,).

        optimizer: its state is restored too where it lives through all rounds (centralized runs).
        """
        if self._state:
            model.load_state_dict(self._state)
            if optimizer and self._folder:
                folders.read_optimizer(self._folder, optimizer, self.completed)
        return layout.read()

    def algorithm_state(self) -> AlgorithmState:
        """What server and parties had kept after the last complete round. Raises: RunFolderError if it is damaged."""
        return (
            read_algorithm_state(self._folder, self.completed) if self._folder and self.completed else AlgorithmState()
        )

    def clips(self, privacy: object) -> dict[str, float]:
        """Where record-level adaptive clipping had come to, by data owner. Raises: RunFolderError if that is lost."""
        if not isinstance(privacy, Privacy) or not isinstance(privacy.max_grad_norm, AdaptiveClip) or not self._folder:
            return {}
        kept = self.algorithm_state().clips
        if self.completed and not kept:
            raise RunFolderError(
                f"where the clipping norms were after round {self.completed} is missing",
                hint=f"restore algorithm_state.{self.completed}.safetensors, or run again in a new folder;"
                " with AdaptiveClip and several processes there is none, and no resume",
            )
        return kept

    def add(
        self,
        entry: RoundRecord,
        model: nn.Module,
        spent: Mapping[str, Spent] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        algorithm_state: AlgorithmState | None = None,
        sealed: Sealed | None = None,
    ) -> None:
        """Record one completed round. The weights are written last: they make it complete."""
        info = msgspec.structs.replace(
            self._info,
            spent=dict(spent or {}),
            transcript=sealed or self._info.transcript,
            dropped=dict(Counter(name for past in (*self._history, entry) for name in past.dropped)),
        )
        if self._folder:  # before any of it is kept
            folders.checked_json(entry)
            folders.checked_json(info)
        self._info, self._model = info, model
        self._history.append(entry)
        self._state = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
        if self._folder:
            folders.append_round(self._folder, entry)
            folders.write_info(self._folder, self._info)
            if optimizer:
                folders.write_optimizer(self._folder, optimizer, entry.round)
            if algorithm_state is not None and (algorithm_state or algorithm_state.clips):
                write_algorithm_state(self._folder, algorithm_state, entry.round)
        if best_of(self._history) == entry.round:
            self._best = self._state
            if self._folder:
                folders.write_weights(self._folder, self._state, entry.round, folders.BEST)
        if self._folder:
            folders.write_weights(self._folder, self._state, entry.round)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.copy_ledgers()  # of a run that broke off, too
        finally:
            if self._claim:
                self._claim.close()

    def end(self, reason: str, spent: Mapping[str, Spent]) -> Run:
        """Close the run at its last complete round. spent: by the ledgers, the round that was cut short included."""
        if self._lasting is not None and self._info.ended:  # others have spent since
            return self.run()
        self._info = msgspec.structs.replace(self._info, ended=reason, spent=dict(spent))
        if self._folder:
            folders.write_info(self._folder, self._info)
        self.copy_ledgers()
        return self.run()

    def is_sealed(self, evaluate_party: EvaluateParty | None) -> bool:
        """Whether the run's manifest is there, and nothing of the run is to change."""
        awaits = evaluate_party is not None and self._info.per_party is None
        return not awaits and self._folder is not None and (self._folder / "manifest.json").is_file()

    def finish(self, per_party: PerParty | None) -> Run:
        """Record what the model after the last round is worth at each party, where that was asked for."""
        if per_party is not None and per_party != self._info.per_party:
            self._info = msgspec.structs.replace(self._info, per_party=per_party)
            if self._folder:
                (self._folder / "manifest.json").unlink(missing_ok=True)  # it is of run.json as it was
                folders.write_info(self._folder, self._info)
        self.copy_ledgers()
        return self.run()

    def run(self) -> Run:
        kept = self._ledgers if self._folder is None else {}
        ledgers = {name: content for name, ledger in kept.items() if (content := ledger.written())}
        history = tuple(self._history)
        best = folders.read_best(self._folder, best_of(history)) if self._folder else self._best
        return Run(
            info=self._info,
            history=history,
            state=self._state,
            folder=self._folder,
            ledgers=ledgers,
            best=best,
            architecture=self._model,
        )
