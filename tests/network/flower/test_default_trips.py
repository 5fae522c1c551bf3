"""How many trips a sum takes where the job file does not say: two over Flower, where that costs no honest vector."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from site_federation import Federation, toml_of, write_directory

from choral.cli.command_line import main
from choral.jobs.engines.default_trips import with_trips
from choral.jobs.settings import PrivacySettings, ServeSettings, Settings, SumSettings
from choral.network import Offer
from choral.protocols import Masked, SumSpec
from choral.protocols.masking.ahead.messages import AheadSetup
from choral.trainers.task.settings import AlgorithmSettings

NAMES = [f"p{place}" for place in range(80)]


def trips_of(parties: int, engine: Any = "flower", **changed: Any) -> int | None:
    return with_trips(Settings(**{"secure_sum": SumSettings()} | changed), NAMES[:parties], engine).secure_sum.trips


@pytest.mark.parametrize(
    ("parties", "trips"), [(2, 2), (3, 2), (4, 2), (5, 2), (6, 2), (7, 4), (10, 4), (30, 4), (65, 4)]
)
def test_by_the_number_of_sites(parties: int, trips: int) -> None:
    """Of ten, three that may be corrupt and three dropouts leave seven in four trips, and five at worst in two."""
    assert trips_of(parties) == trips
    assert trips_of(parties, "nvflare") == trips_of(parties, "none") == 4


def test_a_smallest_sum_that_is_asked_for_gives_more_sites_two() -> None:
    """With that, no session of fewer has a smaller one than in four trips; more dropouts leave too few for it."""
    stated = SumSettings(corrupt=2, dropouts=1, min_survivors=8)
    assert trips_of(10, secure_sum=stated) == 2
    assert trips_of(10, secure_sum=replace(stated, dropouts=2)) == 4


@pytest.mark.parametrize("parties", [3, 6, 9, 10, 12, 20, 40])
@pytest.mark.parametrize("given", [{}, {"corrupt": 1}, {"corrupt": 2, "dropouts": 1}, {"min_survivors": 3}])
def test_two_are_taken_only_where_no_sum_is_smaller(parties: int, given: dict[str, int]) -> None:
    """By the formula of the page, written down again here."""
    if trips_of(parties, secure_sum=SumSettings(**given)) == 4:
        return
    spec = SumSpec(parties=tuple(NAMES[:parties]), length=1, bound=1)
    four = Masked(**given).setup(spec, session=bytes(16))  # type: ignore[arg-type]
    two = Masked(trips=2, **given).setup(spec, session=bytes(16))  # type: ignore[arg-type]
    assert isinstance(two, AheadSetup)
    corrupt, threshold, asked = two.corrupt, two.threshold, two.min_survivors
    honest = min(
        there - corrupt - (there - corrupt) * (there - asked) // (threshold - corrupt)
        for there in range(asked, parties + 1)
    )
    assert honest >= max(2, four.min_survivors - four.corrupt)
    assert asked <= parties - two.dropouts


STATED: dict[str, dict[str, Any]] = {
    "two": {"secure_sum": SumSettings(trips=2)},
    "three": {"secure_sum": SumSettings(trips=3)},
    "four": {"secure_sum": SumSettings(trips=4)},
    "a split key": {"secure_sum": SumSettings(kind="homomorphic")},
}


@pytest.mark.parametrize("what", STATED)
def test_what_is_said_is_what_is_taken(what: str) -> None:
    settings = Settings(**STATED[what])
    assert with_trips(settings, NAMES[:3], "flower") == settings


FOUR: dict[str, dict[str, Any]] = {
    "noise of clients": {"privacy": PrivacySettings(epsilon=2.0, unit="client")},
    "each client's own noise": {"privacy": PrivacySettings(epsilon=2.0, unit="client", noise="local")},
    "noise of records in shares": {
        "privacy": PrivacySettings(epsilon=2.0), "algorithm": AlgorithmSettings(kind="fedsgd", batch_size=20),
    },
    "rounds that begin without some sites": {"serve": ServeSettings(quorum=4)},
    "a server that only looks": {"secure_sum": SumSettings(server="semi-honest")},
    "a sum that two trips cannot have": {"secure_sum": SumSettings(corrupt=1, dropouts=2, min_survivors=3)},
}  # fmt: skip


@pytest.mark.parametrize("what", FOUR)
def test_four_where_noise_rests_on_the_survivors_or_the_floor_does_not_suffice(what: str) -> None:
    assert trips_of(5, **FOUR[what]) == 4


def test_noise_of_each_site_does_not() -> None:
    assert trips_of(3, privacy=PrivacySettings(epsilon=2.0)) == 2


def test_the_offer_that_is_written_ahead_is_that_of_the_engine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    federation = Federation(tmp_path)
    job, path = tmp_path / "ahead.toml", tmp_path / "ahead.offer"
    settings = federation.settings()
    job.write_text(toml_of(replace(settings, serve=replace(settings.serve, identity=tmp_path / "hub" / "hub.crt"))))
    words = ["serve", str(job), "--directory", str(write_directory(federation))]

    def offered(*more: str) -> Any:
        assert main([*words, "--offer", str(path), *more]) == 0
        return Offer.read(path.read_bytes()).secure_sum.get("trips", 4)

    assert (offered(), offered("--engine", "nvflare"), offered("--engine", "flower")) == (4, 4, 2)
    assert offered("--engine", "flower", "--secure-sum.trips", "4") == 4
    assert main([*words, "--out", str(tmp_path / "run"), "--engine", "flower"]) == 2
    assert "an engine's jobs are started by the engine" in capsys.readouterr().err
