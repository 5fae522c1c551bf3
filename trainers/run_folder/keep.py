"""What is kept of a run, and where."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from choral.errors import ConfigError
from choral.progress import progress
from choral.trainers.run_folder.info import RoundRecord
from choral.trainers.run_folder.transcript import Detail
from choral.trainers.task import arguments

OnRound = Callable[[RoundRecord], None]


@dataclass(frozen=True, kw_only=True)
class Keep:
    """out, resume: keep the run in a folder as it goes, and continue it there. config: settings to record in it.
    tuning: the ``record`` of :func:`choral.trainers.centralized.tuning`, if that chose the settings: kept in run.json,
        and billed.
    ledgers: a folder of ledgers for the life of the data, one for each data owner, by name: what all runs that name it
        have spent counts, and a run that would pass its promise is refused. A copy of each, as it was when the run
        ended, is put into ``out``. By default each run has ledgers of its own, in ``out``.
    transcript: record what the server sees in ``out``, for the audit: "digests" of the messages, the "messages", or a
        "rehearsal", which also writes down **every party's update in the clear** and is for harmless data only.
    on_round: called with each completed round; several in a tuple. `choral.callbacks` has some.
    progress: say how far the training is: a bar on a terminal and in a notebook, lines in a log.

    Raises: ConfigError for a value of another type, and for resume or a transcript without a folder.
    """

    out: str | Path | None = None
    resume: bool = False
    config: Mapping[str, Any] | None = None
    tuning: Mapping[str, Any] | None = None
    ledgers: str | Path | None = None
    transcript: Detail | None = None
    on_round: OnRound | tuple[OnRound, ...] | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        if self.out is not None:
            arguments.instance(self.out, "out", (str, Path), "the path of a folder")
            if self.out == "":
                raise ConfigError("out is empty, expected the path of a folder", hint="None keeps the run in memory")
        if self.ledgers is not None:
            arguments.instance(self.ledgers, "ledgers", (str, Path), "the path of a folder")
            if self.ledgers == "" or Path(self.ledgers).is_file():
                raise ConfigError(f"ledgers is {str(self.ledgers)!r}, expected a folder", hint="it holds NAME.jsonl")
        arguments.flag(self.resume, "resume")
        if self.resume and self.out is None:
            raise ConfigError("resume needs the folder of the run", hint="give out=FOLDER")
        for name in ("config", "tuning"):
            if getattr(self, name) is not None:
                arguments.instance(getattr(self, name), name, Mapping, "a dict of settings")
        if self.transcript is not None:
            arguments.one_of(self.transcript, "transcript", get_args(Detail))
        if self.transcript is not None and self.out is None:
            raise ConfigError("a transcript is kept in the run's folder", hint="give out=FOLDER")
        for each in self.on_round if isinstance(self.on_round, tuple) else (self.on_round,):
            arguments.optional_function(each, "on_round", "entry")
        arguments.flag(self.progress, "progress")

    @contextmanager
    def telling(self, rounds: int, label: str) -> Iterator[OnRound]:
        """Yield what is to be called with each completed round of a training of `rounds`."""
        chosen = self.on_round if isinstance(self.on_round, tuple) else (self.on_round,)

        def tell(entry: RoundRecord) -> None:
            tick(label, entry)
            for each in chosen:
                if each is not None:
                    each(entry)

        with progress(rounds, rounds, quiet=not self.progress) as tick:
            yield tell

    @property
    def folder(self) -> Path | None:
        return None if self.out is None else Path(self.out)
