"""The coordinator in a ServerApp of Flower: its folder and its job file; and whole jobs of Choral over Flower.

    @app.main()
    def main(grid, context):
        serve(grid, "/srv/hub/visits.toml", out="/srv/hub/runs/visits")  # sites train by the code installed there

Folder and job file are on the machine that the ServerApp runs on, and no part of the app that Flower ships.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from choral.errors import ConfigError
from choral.jobs.engines.default_trips import said_of, with_trips
from choral.jobs.settings import Arm, Settings, read_settings
from choral.network.door.carrier import EngineCarrier
from choral.network.flower.grid import FlowerGrid
from choral.network.site.folder import SiteFolder
from choral.network.transport.certificates import CertifiedIdentity

if TYPE_CHECKING:
    from choral.network.coordinator.engine_rounds import EngineRounds
    from choral.trainers import Run

log = logging.getLogger("flwr")  # what Flower shows of a run


@dataclass(frozen=True, kw_only=True)
class Coordinator:
    """Who proposes a job, and to whom. keys: the sites' public keys, by name."""

    folder: Path
    settings: Settings
    identity: CertifiedIdentity
    keys: Mapping[str, bytes]

    @classmethod
    def read(cls, job: Path, folder: Path | None) -> Coordinator:
        """folder: as `choral site init` makes it, with the certificates of the sites; by default that of the job file.
        Training code lies in its tasks/.

        Raises: ConfigError; SiteError, CertificateError for a folder that cannot be used.
        """
        settings, hub = read_settings(job, Settings), SiteFolder.open(folder or job.parent)
        if not hub.parties:
            raise ConfigError(
                f"{hub.path} has no site in its directory", hint="choral site directory add FILE.crt --pin PIN"
            )
        named = replace(settings.serve, job=settings.serve.job or job.stem)
        return cls(
            folder=hub.path, settings=replace(settings, serve=named), identity=hub.identity, keys=dict(hub.parties)
        )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.keys)

    @property
    def patience(self) -> int:
        return self.settings.participation.patience

    def carrier(self, grid: FlowerGrid) -> EngineCarrier:
        return EngineCarrier(grid, self.identity, self.names)

    def in_trips(self) -> Settings:
        """The settings, with the trips of a sum over Flower; two that the job file does not ask for are said."""
        settings = with_trips(self.settings, self.names, "flower")
        if settings != self.settings and (said := said_of(settings)):
            say(said)
        return settings

    def rounds(
        self, grid: FlowerGrid, shapes: Mapping[str, tuple[int, ...]], *, rounds: int, strategy: str
    ) -> EngineRounds:
        """Of a federation whose parties train in Flower's own processes.

        Raises: ConfigError for settings that say what only code at the sites can keep.
        """
        from choral.jobs.sites.waits import waits_of
        from choral.jobs.training import secure_sum_of
        from choral.network.coordinator.engine_rounds import EngineJob, EngineRounds
        from choral.trainers import Encoding

        settings = self.in_trips()
        sites, chosen = settings.sites, settings.secure_sum
        if sites.records is None or sites.largest is None:
            raise ConfigError(
                "sites.records and sites.largest are not set: what sites count for is agreed on, and never counted",
                hint="[sites] records = 1200, largest = 400: of all sites together, and the most that one may have",
            )
        if settings.privacy.epsilon is not None or sites.metrics != "none":
            raise ConfigError(
                "a promise of privacy, or sums of the sites' evaluations, where a ClientApp of Flower trains",
                hint="choral.network.flower.serve has the sites train by code that is installed there, and keeps both",
            )
        job = EngineJob(
            job=settings.serve.job,
            task=settings.task,
            coordinator=self.identity.name,
            records=sites.records,
            largest=sites.largest,
            rounds=rounds,
            shapes=shapes,
            encoding=Encoding(value_bound=chosen.value_bound, value_bits=chosen.value_bits, weights=chosen.weights),
            secure_sum=secure_sum_of(settings, Arm()),
            engine={"engine": "flower", "strategy": strategy},
        )
        return EngineRounds(job, self.carrier(grid), self.keys, waits_of(settings), say)


def say(text: str) -> None:
    log.info("%s", text)


def serve(
    grid: Any, job: str | Path, *, out: str | Path, folder: str | Path | None = None, resume: bool = False
) -> Run:
    """Train as `choral serve` does, over Flower: by the code and data of the sites' processes, promises and all.

    grid: Flower's. job: the job file. folder: the coordinator's, by default that of the job file. out: the run's
    folder, elsewhere.

    Raises: as `choral serve`; SiteError, CertificateError for a folder that cannot be used.
    """
    from choral.jobs.serving import serve_by_engine

    coordinator = Coordinator.read(Path(job), None if folder is None else Path(folder))
    adapter = FlowerGrid(grid, coordinator.names)
    return serve_by_engine(adapter, coordinator.in_trips(), coordinator.folder, out=Path(out), resume=resume, say=say)
