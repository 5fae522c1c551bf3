"""Who may collude is counted among all parties that are pinned, never in a roster that the server has made."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pytest
from flat_arguments import federate
from msgspec.structs import replace
from scipy import stats

from choral.protocols import Homomorphic, Masked, Policy, SumSpec
from choral.protocols.crypto.keys import ed25519_public
from choral.protocols.errors import PolicyError, SpecError, TooFewSurvivorsError
from choral.protocols.masking import messages, signing
from choral.protocols.masking.parameters import InfeasibleError, choose, colluding, counted, least_threshold
from choral.protocols.masking.party import join
from choral.protocols.masking.policy import check_setup

Make = Callable[..., Any]
IDENTITIES = {f"p{place}": place.to_bytes(32, "little") for place in range(100)}
DIRECTORY = {name: ed25519_public(identity) for name, identity in IDENTITIES.items()}
TERMS = Policy(directory=DIRECTORY, corrupt=0.1)
"""A hundred parties are pinned, of whom ten may collude."""


def joins(setup: messages.SumSetup, policy: Policy = TERMS) -> Any:
    return join(
        messages.encode(setup), name="p0", identity=IDENTITIES["p0"], policy=policy, randomness=lambda size: bytes(size)
    )


def setups(n: int) -> Iterator[messages.SumSetup]:
    """Every setup that a server may make of ``n`` parties on a complete graph, whatever it says of the roster."""
    said: list[dict[str, Any]] = [
        {},
        {"cohort": "chosen", "directory": 100},
        {"cohort": "random", "directory": 100},
        {"cohort": "chosen", "directory": n},
        {"cohort": "everyone", "directory": 100},
    ]
    for corrupt, threshold, smallest in product(range(n), range(2, n + 1), range(2, n + 1)):
        for how in said:
            yield messages.SumSetup(
                session=bytes(16),
                roster=tuple(f"p{place}" for place in range(n)),
                length=1,
                bound=1,
                modulus_bits=8,
                neighbours=n - 1,
                threshold=threshold,
                min_survivors=smallest,
                corrupt=corrupt,
                dropouts=0,
                server="malicious",
                **how,
            )


@pytest.mark.parametrize("n", range(3, 13))
def test_no_roster_of_all_colluders_and_one_honest_party_is_joined(n: int) -> None:
    """The sum would be the victim's vector. Twelve are enough for two honest ones, in one setup alone."""
    taken = []
    for setup in setups(n):
        try:
            TERMS.check(setup, "p0")
        except PolicyError:
            continue
        taken.append((setup.corrupt, setup.threshold, setup.min_survivors, setup.cohort))
    assert taken == ([(10, 12, 12, "chosen")] if n == 12 else [])


@pytest.mark.parametrize("n", range(3, 12))
def test_what_is_chosen_for_a_small_roster_of_many_parties_is_refused_where_it_is_made(n: int) -> None:
    roster = tuple(f"p{place}" for place in range(n))
    old = choose(n, corrupt=counted(0.1, n), dropouts=0, server="malicious")  # as if the fraction were of the roster
    setup = messages.SumSetup(
        session=bytes(16),
        roster=roster,
        length=1,
        bound=1,
        modulus_bits=8,
        neighbours=n - 1,
        threshold=old.threshold,
        min_survivors=max(old.threshold, old.corrupt + 2),
        corrupt=old.corrupt,
        dropouts=0,
        server="malicious",
    )
    with pytest.raises(PolicyError, match="out of"):
        joins(setup)
    for kind in (Masked(corrupt=0.1), Masked(), Homomorphic(corrupt=0.1)):
        with pytest.raises(InfeasibleError, match="the server may have put them all into a roster") as caught:
            kind.open(SumSpec(parties=roster, length=1, bound=1, directory=100))
        assert 'cohort="random"' in caught.value.hint


def test_two_views_of_the_survivors_do_not_open_a_vector_of_a_roster_with_all_colluders(network: Make) -> None:
    """Fifty of a hundred, the ten colluders among them. The server shows twenty honest parties that p0 survived, and
    twenty that it was dropped: with ten colluders it would need a threshold of 30 or less for both of p0's secrets.
    """
    roster = tuple(f"p{place}" for place in range(50))
    alone = Masked(corrupt=0.1).setup(SumSpec(parties=roster, length=3, bound=1000), session=bytes(16))
    assert (alone.threshold, alone.corrupt) == (28, 5)
    for said in ({}, {"cohort": "chosen", "directory": 100}):
        with pytest.raises(PolicyError, match=r"out of 50|corrupt parties of at least 10"):
            joins(replace(alone, **said), Policy(directory=DIRECTORY, corrupt=0.1, minimum_cohort=28))

    spec = SumSpec(parties=roster, length=3, bound=1000, directory=100)
    setup = Masked(corrupt=0.1).setup(spec, session=bytes(16))
    assert (setup.corrupt, setup.threshold, setup.cohort, setup.directory) == (10, 31, "chosen", 100)
    terms = {"corrupt": 0.1, "directory_size": 100}
    fields = ("neighbours", "threshold", "min_survivors", "corrupt", "dropouts", "cohort", "directory")
    net = network(50, policy=terms, **{name: getattr(setup, name) for name in fields}).open()
    assert not net.refused
    vectors = {name: [1, 2, 3] for name in net.names}
    _, states = net.round(vectors, until="upload")
    colluders, session = range(1, 11), net.session.terms.session
    for view in (range(11, 30), range(30, 50)):  # p0 is in the first, and sees what they see
        honest = [0, *view] if view.start == 11 else list(view)
        survivors = range(50) if view.start == 11 else range(1, 50)
        bitmap = messages.to_bitmap(survivors, 50)
        shown = messages.encode(messages.Survivors(session[:16], 1, bitmap))
        confirmed = {place: states[f"p{place}"].confirm(shown)[0] for place in honest}
        signatures = {
            place: signing.sign(net.identities[f"p{place}"], signing.confirm(session, 1, place, bitmap))
            for place in sorted([*honest, *colluders])
        }
        assert len(signatures) == 30
        for place in honest:
            entries = tuple(messages.Confirmation(*entry) for entry in signatures.items() if entry[0] != place)
            with pytest.raises(TooFewSurvivorsError, match="to agree on the survivors: 30 of the 31"):
                confirmed[place].unmask(messages.encode(messages.Confirmations(session[:16], 1, entries)))


def test_a_count_is_as_it_is_and_a_fraction_of_all() -> None:
    for how in ("everyone", "chosen", "random"):
        assert colluding(3, 1000, 40, how) == 3  # type: ignore[arg-type]
    assert colluding(0.1, 1000, 400, "chosen") == 100
    assert colluding(0.1, 1000, 40, "chosen") == 40  # all of them, which no threshold withstands
    assert colluding(1e-12, 1000, 40, "chosen") == 1  # rounded up, not away
    for roster, directory in ((1, 5), (6, 5)):
        with pytest.raises(SpecError, match="roster of 2 to 5"):
            colluding(0.1, directory, roster, "chosen")


@pytest.mark.parametrize(
    ("directory", "fraction", "roster"),
    [(1000, 0.1, 40), (1000, 0.1, 300), (100, 0.05, 20), (10**6, 0.1, 100), (20, 0.3, 10), (50, 0.1, 50)],
)
def test_a_draw_has_no_more_colluders_but_for_the_hypergeometric_tail(
    directory: int, fraction: float, roster: int
) -> None:
    """Against scipy's law: the count is the least whose tail is below 2^-40."""
    bad = round(directory * fraction)
    law = stats.hypergeom(directory, bad, roster)
    found = colluding(fraction, directory, roster, "random")
    assert law.sf(found) < 2**-40
    assert found == 0 or law.sf(found - 1) >= 2**-40
    assert found <= colluding(fraction, directory, roster, "chosen")


def test_a_draw_is_taken_on_trust_only_by_who_says_so_and_is_stated() -> None:
    roster = tuple(f"p{place}" for place in range(40))
    spec = SumSpec(parties=roster, length=3, bound=10, directory=1000)
    drawn = Masked(cohort="random")
    session = drawn.open(spec)
    stated = session.statement
    assert (stated["cohort"], stated["directory"], stated["corrupt"], stated["threshold"]) == ("random", 1000, 21, 31)
    assert "semi-honest in the choice of the cohort" in stated["trust"]
    assert "semi-honest in the choice of the cohort" in Homomorphic(cohort="random").open(spec).statement["trust"]
    with pytest.raises(PolicyError, match="semi-honest in the choice of the cohort"):
        drawn.open(spec, policy=Policy(corrupt=0.1))
    with pytest.raises(PolicyError, match="corrupt parties of at least 100"):
        drawn.open(spec, policy=Policy(corrupt=100, cohort="random"))
    drawn.open(spec, policy=Policy(corrupt=0.1, cohort="random"))
    counted_out = Masked(corrupt=5).open(spec).statement
    assert (counted_out["cohort"], counted_out["corrupt"]) == ("chosen", 5)
    assert "may have put every one that colludes into it" in counted_out["trust"]
    everyone = Masked().open(SumSpec(parties=roster, length=3, bound=10)).statement
    assert (everyone["cohort"], everyone["directory"]) == ("everyone", 40)


@pytest.mark.parametrize("cohort", ["chosen", "random"])
@pytest.mark.parametrize("server", ["malicious", "semi-honest"])
def test_what_is_proposed_for_a_cohort_is_what_the_parties_accept_or_is_not_proposed(cohort: Any, server: Any) -> None:
    """Of every size up to 40, out of up to 1,000: never fewer colluders, nor a threshold that dropouts break."""
    made = 0
    for n, population in product(range(2, 41, 2), (2, 3, 10, 11, 40, 100, 1000)):
        if population < n:
            continue
        spec = SumSpec(parties=tuple(IDENTITIES)[:n], length=1, bound=1, directory=population)
        config = Masked(cohort=cohort, server=server)
        try:
            setup = config.setup(spec, session=bytes(16))
        except InfeasibleError:
            assert population > n
            assert least_threshold(n, colluding(0.1, population, n, cohort), server) > n - 1 or n < 5
            continue
        terms = dataclasses.replace(config.policy(spec), directory=DIRECTORY, directory_size=max(population, 100))
        if population >= 100:
            terms.check(setup, "p0")
        check_setup(setup)
        assert setup.threshold <= n - setup.dropouts
        assert setup.min_survivors <= n - setup.dropouts
        made += 1
    assert made > 30


def test_default_dropouts_leave_room_for_the_colluders_of_all() -> None:
    assert Masked().parameters(8).dropouts == 2
    assert Masked().parameters(8, 40).dropouts == 1  # four colluders need a threshold of seven
    assert Masked().parameters(5, 20).threshold == 4


def test_settings_say_how_a_cohort_is_made() -> None:
    from choral.jobs.settings import Arm, Settings, SumSettings
    from choral.jobs.training import secure_sum_of

    for kind, made in (("masked", Masked), ("homomorphic", Homomorphic)):
        chosen = SumSettings(kind=kind, cohort="random", corrupt=3)  # type: ignore[arg-type]
        found = secure_sum_of(Settings(secure_sum=chosen), Arm())
        assert found == made(cohort="random", corrupt=3)


def test_how_the_cohort_was_made_is_signed() -> None:
    from choral.protocols.masking.signing import setup_digest

    setup = Masked(corrupt=5).setup(
        SumSpec(parties=tuple(IDENTITIES)[:40], length=1, bound=1, directory=1000), session=bytes(16)
    )
    digests = {
        setup_digest(messages.encode(replace(setup, **changes)))
        for changes in ({}, {"cohort": "random"}, {"directory": 999}, {"cohort": "everyone", "directory": None})
    }
    assert len(digests) == 4


def test_parties_that_pin_other_numbers_do_not_join() -> None:
    setup = Masked(corrupt=5).setup(
        SumSpec(parties=tuple(IDENTITIES)[:40], length=1, bound=1, directory=100), session=bytes(16)
    )
    joins(setup, Policy(directory=DIRECTORY, corrupt=5))
    with pytest.raises(PolicyError, match="this party has pinned 101"):
        joins(setup, Policy(directory=DIRECTORY, directory_size=101, corrupt=5))
    with pytest.raises(PolicyError, match="'everyone'"):
        joins(replace(setup, cohort="everyone"), Policy(directory=DIRECTORY, corrupt=5))
    for wrong in ({"directory": 39}, {"directory": None}, {"cohort": "random", "directory": 2}):
        with pytest.raises(PolicyError, match="a roster of 40 parties out of"):
            check_setup(replace(setup, **wrong))
    with pytest.raises(SpecError, match="100 <= directory_size"):
        Policy(directory=DIRECTORY, directory_size=99, corrupt=5)


# ------------------------------------------------------------- the parties of a rehearsal have terms of their own


@dataclass(frozen=True, kw_only=True)
class Weakened(Masked):
    """A server whose setup is weaker than the settings that all were given."""

    changes: tuple[tuple[str, Any], ...] = ()

    def setup(self, spec: SumSpec, *, session: bytes) -> messages.SumSetup:
        return replace(super().setup(spec, session=session), **dict(self.changes))


SEVEN = SumSpec(parties=tuple("abcdefg"), length=3, bound=10, encoding="step 1")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"corrupt": 1}, "corrupt parties of at least 2"),
        ({"corrupt": 0, "threshold": 4}, "corrupt parties of at least 2"),
        ({"threshold": 4}, "malicious server asks for"),
        ({"min_survivors": 3, "threshold": 3}, "over fewer than the threshold|corrupt ones"),
        ({"server": "semi-honest"}, "semi-honest server only"),
        ({"bound": 11}, "bound of at most 10"),
        ({"length": 4}, "length of at most 3"),
        ({"modulus_bits": 9}, "modulus bits of at most 8"),
        ({"modulus_bits": 7}, "can wrap"),
        ({"encoding": "step 2"}, "another encoding"),
        ({"cohort": "random", "directory": 7}, "choice of the cohort"),
        ({"cohort": "chosen", "directory": 8}, "this party has pinned 7"),
    ],
    ids=str,
)
def test_a_setup_that_is_weaker_than_the_settings_is_refused_in_process_too(
    changes: dict[str, Any], complaint: str
) -> None:
    Weakened().open(SEVEN)
    with pytest.raises(PolicyError, match=complaint):
        Weakened(changes=tuple(changes.items())).open(SEVEN)


@pytest.mark.parametrize("kind", [Masked(), Homomorphic()], ids=["masked", "split"])
@pytest.mark.parametrize(
    ("terms", "complaint"),
    [
        ({"corrupt": 3}, "corrupt parties of at least 3"),
        ({"minimum_cohort": 6}, "smallest sum of at least 6"),
        ({"minimum_threshold": 6}, "threshold of at least 6"),
        ({"maximum_bound": 9}, "bound of at most 9"),
        ({"maximum_length": 2}, "length of at most 2"),
        ({"maximum_modulus_bits": 7}, "modulus bits of at most 7"),
        ({"encoding": "step 2"}, "another encoding"),
        ({"wraps_at": 3}, "modulus"),
        ({"directory_size": 70}, "this party has pinned 70"),
    ],
    ids=str,
)
def test_parties_hold_a_rehearsal_against_the_policy_that_is_given(
    kind: Any, terms: dict[str, Any], complaint: str
) -> None:
    own = {"corrupt": 2, "encoding": "step 1"}
    result = kind.open(SEVEN, policy=Policy(**own)).begin()
    for party in SEVEN.parties:
        result.submit(party, np.array([1, 2, 3]))
    assert result.finish().total.tolist() == [7, 14, 21]
    if "wraps_at" in terms and isinstance(kind, Masked):
        kind.open(SEVEN, policy=Policy(**own | terms))  # wider than it would have to be
        return
    with pytest.raises(PolicyError, match=complaint):
        kind.open(SEVEN, policy=Policy(**own | terms))


def test_a_shared_key_and_a_plain_sum_meet_no_policy_that_asks_for_more() -> None:
    from choral.protocols import Plain

    shared = Homomorphic(key="shared")
    shared.open(SEVEN, policy=Policy(corrupt=0, server="semi-honest", encoding="step 1"))
    for terms in ({"corrupt": 1, "server": "semi-honest"}, {"corrupt": 0}):
        with pytest.raises(PolicyError, match="withstands no corrupt party"):
            shared.open(SEVEN, policy=Policy(encoding="step 1", **terms))  # type: ignore[arg-type]
    for terms in ({"minimum_cohort": 5}, {"maximum_bound": 9}, {"maximum_length": 2}, {"encoding": "step 2"}):
        with pytest.raises(PolicyError):
            shared.open(
                SEVEN,
                policy=Policy(**{"corrupt": 0, "server": "semi-honest", "encoding": "step 1"} | terms),  # type: ignore[arg-type]
            )
    with pytest.raises(PolicyError, match="every vector"):
        Plain().open(SEVEN, policy=Policy(corrupt=0))


def test_a_shared_key_setup_that_is_weaker_than_the_settings_is_refused_in_process_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from choral.protocols.homomorphic.shared import server
    from choral.protocols.homomorphic.shared.setup import key_setup

    setup = key_setup(SEVEN, min_survivors=4, session=bytes(16))
    shared = Homomorphic(key="shared", min_survivors=4)
    weaker = [replace(setup, min_survivors=3), replace(setup, encoding="step 2")]
    for spec in ({"bound": 11}, {"length": 4}):
        wider = SumSpec(**{"parties": SEVEN.parties, "length": 3, "bound": 10, "encoding": "step 1"} | spec)  # type: ignore[arg-type]
        weaker.append(key_setup(wider, min_survivors=4, session=bytes(16)))
    for proposed in (setup, *weaker):
        monkeypatch.setattr(server, "key_setup", lambda *_, proposed=proposed, **__: proposed)
        with nullcontext() if proposed is setup else pytest.raises(PolicyError):
            shared.open(SEVEN)


def test_federate_takes_the_terms_of_the_sites() -> None:
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    def build(dataset: Any) -> Any:
        model = torch.nn.Linear(2, 2)
        return model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(dataset, batch_size=4)

    def fit(model: Any, optimizer: Any, loader: Any) -> None:
        for points, labels in loader:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(points), labels).backward()
            optimizer.step()

    data = TensorDataset(torch.randn(8, 2), torch.arange(8) % 2)
    job: dict[str, Any] = {
        "build": build,
        "fit": fit,
        "evaluate": lambda model: 0.0,
        "parties": {name: TensorDataset(*data.tensors) for name in "abcdefg"},
        "rounds": 1,
    }
    masked = Masked(corrupt=1, dropouts=0)
    federate(**job, secure_sum=masked, policy=Policy(corrupt=1, minimum_cohort=4))
    for policy in (Policy(corrupt=2), Policy(corrupt=1, minimum_cohort=7), Policy(corrupt=1, encoding="step 1")):
        with pytest.raises(PolicyError):
            federate(**job, secure_sum=masked, policy=policy)
    with pytest.raises(PolicyError, match="every vector"):
        federate(**job, policy=Policy(corrupt=0))
    with pytest.raises(SpecError, match="expected a Policy"):
        federate(**job, secure_sum=masked, policy={"corrupt": 1})  # type: ignore[arg-type]
