"""What a party accepts: each term weaker than its policy, or inconsistent, is refused before anything is sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from msgspec.structs import replace

from choral.protocols import Masked, SumSpec
from choral.protocols import messages as wire
from choral.protocols import party as steps
from choral.protocols.errors import MessageError, PolicyError, SpecError
from choral.protocols.keys import ed25519_public
from choral.protocols.policy import Policy, check_setup

Make = Callable[..., Any]


def join(net: Any, **changes: Any) -> Any:
    raw = wire.encode(replace(net.setup, **changes))
    return steps.join(raw, name="p0", identity=net.identities["p0"], policy=net.policy, randomness=net.random["p0"])


def test_a_threshold_of_one_is_no_message_and_two_is_below_the_policy(network: Make) -> None:
    net = network(6, corrupt=1, policy={"minimum_threshold": 4})
    join(net)
    with pytest.raises(MessageError, match="the server"):
        join(net, threshold=1)
    with pytest.raises(PolicyError, match="malicious server asks for 2t") as caught:
        join(net, threshold=2)
    assert caught.value.blame == "the server"
    with pytest.raises(PolicyError, match="threshold of at least 4"):
        join(network(6, corrupt=0, server="semi-honest", policy={"minimum_threshold": 4, "server": "semi-honest"}))


def test_a_sybil_in_the_roster_and_in_the_directory(network: Make) -> None:
    net = network(4)
    with pytest.raises(PolicyError, match="'sybil', whose key is not pinned"):
        join(net, roster=("p0", "p1", "p2", "sybil"))
    with pytest.raises(SpecError, match="the same key"):
        Policy(directory={**net.directory, "sybil": net.directory["p1"]})


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"roster": ("p0", "p1", "p1", "p2")}, "a name twice"),
        ({"roster": ("p1", "p2", "p3"), "neighbours": 2}, "does not have 'p0'"),
        ({"modulus_bits": 12}, "can wrap"),
        ({"bound": 10**6}, "can wrap"),
        ({"neighbours": 4}, "no graph"),
        ({"neighbours": 1}, "no graph"),
        ({"threshold": 5, "min_survivors": 5}, "can never be met"),
        ({"min_survivors": 5}, "can never be made"),
        ({"min_survivors": 2}, "fewer than the threshold"),
        ({"corrupt": 2}, "corrupt ones"),
        ({"corrupt": 2, "min_survivors": 4}, "2t > 4 \\+ 2"),
        ({"dropouts": 4}, "nobody is left"),
        ({"server": "semi-honest", "threshold": 2, "corrupt": 2, "min_survivors": 4}, "may be corrupt"),
        ({"server": "semi-honest", "threshold": 2}, "semi-honest server only"),
        ({"modulus_bits": 40, "bound": 2**30}, "bound of at most"),
        ({"modulus_bits": 40}, "modulus bits of at most"),
        ({"length": 100}, "length of at most"),
        ({"corrupt": 0, "min_survivors": 3}, "corrupt parties of at least 1"),
    ],
    ids=str,
)
def test_terms_that_a_party_refuses(network: Make, changes: dict[str, Any], complaint: str) -> None:
    policy = {"corrupt": 1, "maximum_modulus_bits": 39, "maximum_bound": 2**20, "maximum_length": 99}
    if "maximum" in complaint or "bound of" in complaint:
        policy["maximum_modulus_bits"] = 64
    net = network(4, corrupt=1, policy=policy)
    join(net)
    with pytest.raises(PolicyError, match=complaint):
        join(net, **changes)


def test_a_sparse_graph_that_colluders_could_surround_somebody_in() -> None:
    names = tuple(f"p{place}" for place in range(100))
    good = Masked().setup(SumSpec(parties=names, length=1, bound=1), session=bytes(16))
    assert (good.neighbours, good.threshold, good.corrupt) == (32, 22, 10)
    check_setup(good)
    for changes in ({"corrupt": 20}, {"threshold": 17}, {"neighbours": 6, "threshold": 4}):
        with pytest.raises(PolicyError, match="surround some party"):
            check_setup(replace(good, **changes))
    weak = replace(good, server="semi-honest", threshold=6)
    with pytest.raises(PolicyError, match="surround some party"):
        check_setup(weak)
    check_setup(replace(weak, threshold=11))  # of the golden table


@pytest.mark.parametrize("n", [65, 100, 333, 1000])
@pytest.mark.parametrize("corrupt", [0, 0.05, 0.1, 0.2])
@pytest.mark.parametrize("server", ["semi-honest", "malicious"])
def test_what_is_chosen_for_the_user_is_accepted(n: int, corrupt: float, server: Any) -> None:
    spec = SumSpec(parties=tuple(map(str, range(n))), length=1, bound=1)
    check_setup(Masked(corrupt=corrupt, dropouts=0.1, server=server).setup(spec, session=bytes(16)))


def test_an_identity_that_is_not_the_pinned_one(network: Make) -> None:
    net = network(3)
    with pytest.raises(SpecError, match="not the one"):
        steps.join(
            wire.encode(net.setup), name="p0", identity=b"x" * 32, policy=net.policy, randomness=net.random["p0"]
        )
    assert ed25519_public(b"x" * 32) not in net.directory.values()


def test_a_policy_that_protects_nobody(network: Make) -> None:
    directory = network(3).directory
    for weak in ({"minimum_cohort": 1}, {"minimum_threshold": 1}):
        with pytest.raises(SpecError, match="at least 2"):
            Policy(directory=directory, **weak)
    with pytest.raises(SpecError, match="32 bytes"):
        Policy(directory={**directory, "p9": b"short"})


def test_a_cohort_below_the_minimum(network: Make) -> None:
    net = network(6, corrupt=1, policy={"minimum_cohort": 6})
    with pytest.raises(PolicyError, match="smallest sum of at least 6"):
        join(net)
    join(net, min_survivors=6)
