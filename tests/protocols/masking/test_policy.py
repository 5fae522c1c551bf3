"""What a party accepts: each term weaker than its policy, or inconsistent, is refused before anything is sent."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
from msgspec.structs import replace

from choral.protocols import Masked, SumSpec
from choral.protocols.crypto.keys import ed25519_public, x25519_shared
from choral.protocols.crypto.mask_stream import expand
from choral.protocols.crypto.modular_integers import lift, unpack
from choral.protocols.crypto.shamir import Combiner
from choral.protocols.errors import MessageError, PolicyError, SpecError, TooFewSurvivorsError
from choral.protocols.masking import messages, signing
from choral.protocols.masking.party import join
from choral.protocols.masking.policy import Policy, check_setup

Make = Callable[..., Any]


def joined(net: Any, **changes: Any) -> Any:
    raw = messages.encode(replace(net.setup, **changes))
    return join(raw, name="p0", identity=net.identities["p0"], policy=net.policy, randomness=net.random["p0"])


def test_a_threshold_of_one_is_no_message_and_two_is_below_the_policy(network: Make) -> None:
    net = network(6, corrupt=1, policy={"minimum_threshold": 4})
    joined(net)
    with pytest.raises(MessageError, match="the server"):
        joined(net, threshold=1)
    with pytest.raises(PolicyError, match="malicious server asks for 2t") as caught:
        joined(net, threshold=2)
    assert caught.value.blame == "the server"
    with pytest.raises(PolicyError, match="threshold of at least 4"):
        joined(network(6, corrupt=0, server="semi-honest", policy={"minimum_threshold": 4, "server": "semi-honest"}))


def test_a_sybil_in_the_roster_and_in_the_directory(network: Make) -> None:
    net = network(4)
    with pytest.raises(PolicyError, match="'sybil', whose key is not pinned"):
        joined(net, roster=("p0", "p1", "p2", "sybil"))
    with pytest.raises(SpecError, match="the same key"):
        Policy(directory={**net.directory, "sybil": net.directory["p1"]}, corrupt=0)


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
    joined(net)
    with pytest.raises(PolicyError, match=complaint):
        joined(net, **changes)


@pytest.mark.parametrize(
    ("terms", "field", "last", "refused"),
    [
        ({"corrupt": 0}, "threshold", 3, 2),  # 2t > 4
        ({"corrupt": 0}, "threshold", 4, 5),  # of 4 holders
        ({"corrupt": 1}, "threshold", 3, 2),  # 2t > 4 + 1
        ({"corrupt": 0, "server": "semi-honest", "threshold": 2, "min_survivors": 4}, "corrupt", 1, 2),  # t > corrupt
        ({"corrupt": 1, "server": "semi-honest", "threshold": 2}, "min_survivors", 3, 2),  # corrupt + 2
        ({"corrupt": 0, "threshold": 4}, "min_survivors", 4, 3),  # the threshold
        ({}, "min_survivors", 4, 5),  # of 4 parties
        ({}, "dropouts", 3, 4),
        ({}, "modulus_bits", 13, 12),  # 2 * 4 * 1000 < 2^13
        ({}, "bound", 1023, 1024),
        ({"cohort": "chosen"}, "directory", 4, 3),
        ({"directory": 4}, "cohort", "chosen", "everyone"),
        ({}, "neighbours", 3, 4),
    ],
    ids=str,
)
def test_the_last_value_that_is_safe_is_taken_and_the_next_refused(
    network: Make, terms: dict[str, Any], field: str, last: Any, refused: Any
) -> None:
    setup = replace(network(4).setup, **{"min_survivors": 4, "threshold": 3} | terms)
    check_setup(replace(setup, **{field: last}))
    with pytest.raises(PolicyError):
        check_setup(replace(setup, **{field: refused}))


def test_only_the_modulus_agreed_beforehand_may_wrap(network: Make) -> None:
    narrow = replace(network(4).setup, modulus_bits=12)
    check_setup(narrow, wraps_at=12)
    for wraps_at in (None, 11, 13):
        with pytest.raises(PolicyError, match="can wrap in 12 bits"):
            check_setup(narrow, wraps_at=wraps_at)


@pytest.mark.parametrize(
    ("terms", "field", "last", "refused"),
    [
        ({"minimum_cohort": 4}, "min_survivors", 4, 3),
        ({"minimum_threshold": 4}, "threshold", 4, 3),
        ({"corrupt": 1}, "corrupt", 1, 0),
        ({"corrupt": 0.25}, "corrupt", 1, 0),
        ({"maximum_length": 7}, "length", 7, 8),
        ({"maximum_bound": 7}, "bound", 7, 8),
        ({"maximum_modulus_bits": 20}, "modulus_bits", 20, 21),
    ],
    ids=str,
)
def test_the_last_value_that_a_party_accepts(
    network: Make, terms: dict[str, Any], field: str, last: int, refused: int
) -> None:
    net = network(4, corrupt=1)
    policy = Policy(directory=net.directory, **{"corrupt": 0, **terms})
    setup = replace(net.setup, bound=5, length=3, threshold=4 if field == "threshold" else 3, min_survivors=4)
    policy.check(replace(setup, **{field: last}), "p0")
    with pytest.raises(PolicyError, match=f"at (least|most) {last}, the setup says {refused}"):
        policy.check(replace(setup, **{field: refused}), "p0")


def test_a_graph_of_one_neighbour_or_of_odd_by_odd_does_not_exist(network: Make) -> None:
    setup = replace(network(9).setup, server="semi-honest", threshold=2, min_survivors=9, security_bits=1)
    for neighbours in (1, 3, 5, 7, 9):
        with pytest.raises(PolicyError, match="no graph has 9 parties"):
            check_setup(replace(setup, neighbours=neighbours))
    for neighbours in (2, 4, 6, 8):
        check_setup(replace(setup, neighbours=neighbours, correctness_bits=1))


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


def test_a_sparse_graph_that_a_malicious_server_could_cut() -> None:
    """The published (k, t) for 1,000 parties, .1 and .1, leaves 36.6 bits: fine for who asks for 36."""
    names = tuple(f"p{place}" for place in range(1000))
    good = Masked().setup(SumSpec(parties=names, length=1, bound=1), session=bytes(16))
    check_setup(good)
    published = replace(good, neighbours=96, threshold=67)
    with pytest.raises(PolicyError, match=r"with probability 2\^-36\.., not 2\^-40"):
        check_setup(published)
    check_setup(replace(published, security_bits=36))
    directory = {name: place.to_bytes(32, "little") for place, name in enumerate(names)}
    with pytest.raises(PolicyError, match="security in bits of at least 40, the setup says 36"):
        Policy(directory=directory, corrupt=0.1).check(replace(published, security_bits=36), "p0")
    Policy(directory=directory, corrupt=0.1, security_bits=36).check(replace(published, security_bits=36), "p0")
    Policy(directory=directory, corrupt=0.1).check(good, "p0")
    for bits in (0, 129):
        with pytest.raises(SpecError, match="<= 128"):
            Policy(directory=directory, corrupt=0.1, security_bits=bits)


def test_claims_of_a_setup_are_computed_again() -> None:
    names = tuple(f"p{place}" for place in range(1000))
    good = Masked().setup(SumSpec(parties=names, length=1, bound=1), session=bytes(16))
    with pytest.raises(PolicyError, match="not 2\\^-128"):
        check_setup(replace(good, security_bits=128))
    with pytest.raises(PolicyError, match="a round would fail"):
        check_setup(replace(good, correctness_bits=21))
    with pytest.raises(PolicyError, match="a round would fail"):
        check_setup(replace(good, dropouts=101 + 10))
    thin = replace(good, server="semi-honest", corrupt=20, dropouts=0, neighbours=20, threshold=12)
    check_setup(thin)
    with pytest.raises(PolicyError, match="cut the graph"):  # semi-honest: colluders and dropouts do it by chance
        check_setup(replace(thin, dropouts=450))


def test_an_odd_graph_whose_halves_and_opposites_make_a_threshold(network: Make) -> None:
    """k = 3: next, next and opposite. With t = 2 two opposite arcs can agree on a set without anyone corrupt."""
    net = network(8, neighbours=3, threshold=3)
    joined(net)
    with pytest.raises(PolicyError, match="cut the graph"):
        joined(net, threshold=2)


def test_parties_that_encode_values_in_another_way_do_not_join(network: Make) -> None:
    net = network(4, encoding="step 1/100", policy={"encoding": "step 1/100"})
    joined(net)
    for other in ("step 1/10", ""):
        with pytest.raises(PolicyError, match="another encoding"):
            joined(net, encoding=other)
    with pytest.raises(PolicyError, match="another encoding"):
        joined(network(4, encoding="anything"))  # a party that was told of no encoding takes none


@pytest.mark.parametrize("n", [65, 100, 333, 1000])
@pytest.mark.parametrize("corrupt", [0, 0.05, 0.1, 0.2])
@pytest.mark.parametrize("server", ["semi-honest", "malicious"])
def test_what_is_chosen_for_the_user_is_accepted(n: int, corrupt: float, server: Any) -> None:
    spec = SumSpec(parties=tuple(map(str, range(n))), length=1, bound=1)
    check_setup(Masked(corrupt=corrupt, dropouts=0.1, server=server).setup(spec, session=bytes(16)))


def test_an_identity_that_is_not_the_pinned_one(network: Make) -> None:
    net = network(3)
    with pytest.raises(SpecError, match="not the one"):
        join(messages.encode(net.setup), name="p0", identity=b"x" * 32, policy=net.policy, randomness=net.random["p0"])
    assert ed25519_public(b"x" * 32) not in net.directory.values()


def test_a_policy_that_protects_nobody(network: Make) -> None:
    directory = network(3).directory
    for weak in ({"minimum_cohort": 1}, {"minimum_threshold": 1}):
        with pytest.raises(SpecError, match="expected 2 <= "):
            Policy(directory=directory, corrupt=0, **weak)
    for corrupt in (-1, -0.1, 1.0, 2.5, float("nan"), True):
        with pytest.raises(SpecError, match="a count"):
            Policy(directory=directory, corrupt=corrupt)
    with pytest.raises(SpecError, match="32 bytes"):
        Policy(directory={**directory, "p9": b"short"}, corrupt=0)


def test_a_cohort_below_the_minimum(network: Make) -> None:
    net = network(6, corrupt=1, policy={"minimum_cohort": 6})
    with pytest.raises(PolicyError, match="smallest sum of at least 6"):
        joined(net)
    joined(net, min_survivors=6)


def reveals_of(net: Any, states: dict[str, Any], view: list[int], colluders: set[int]) -> dict[int, Any]:
    """Show ``view`` as the survivors to its honest members, the colluders signing it too: what the honest reveal."""
    session = net.session.terms.session
    bitmap = messages.to_bitmap(view, len(net.names))
    raw = messages.encode(messages.Survivors(session[:16], 1, bitmap))
    signatures, confirmed = {}, {}
    for party in view:
        name = f"p{party}"
        if party in colluders:
            signed = signing.confirm(session, 1, party, bitmap)
            signatures[party] = signing.sign(net.identities[name], signed)
        else:
            confirmed[party], confirm = states[name].confirm(raw)
            signatures[party] = messages.to_server(confirm, sender=name, limit=999).signature
    answers = {}
    for party, state in confirmed.items():
        entries = tuple(messages.Confirmation(peer, signatures[peer]) for peer in view if peer != party)
        answer = state.unmask(messages.encode(messages.Confirmations(session[:16], 1, entries)))
        answers[party] = messages.to_server(answer, sender=f"p{party}", limit=99999)
    return answers


def read_p0(net: Any, colluders: set[int], first: list[int], second: list[int]) -> Any:
    """The server and its colluders show one half of the honest parties that p0 survived, the other that it dropped.

    With t shares of p0's seed and t of its mask key they take every mask off its vector, which is returned.
    """
    vectors = {name: [100 + place, 2, 3] for place, name in enumerate(net.names)}
    _, states = net.round(vectors, until="upload")
    # The colluders' states are their own: they may open them.
    held = {party: states[f"p{party}"]._content[0].held[0] for party in colluders}
    seeds, keys = ({p + 1: getattr(held[p], kind) for p in colluders} for kind in ("seed_share", "key_share"))
    for party, answer in reveals_of(net, states, sorted({*first, *colluders}), colluders).items():
        seeds[party + 1] = next(entry.share for entry in answer.seeds if entry.party == 0)
    for party, answer in reveals_of(net, states, sorted({*second, *colluders}), colluders).items():
        keys[party + 1] = next(entry.share for entry in answer.keys if entry.party == 0)
    sent = {(stage, name): raw for way, stage, name, raw in net.sent if way == "up"}
    threshold, bits, session = net.setup.threshold, net.setup.modulus_bits, net.session.terms.session

    def combined(shares: dict[int, bytes]) -> bytes:
        chosen = sorted(shares)[:threshold]
        return Combiner(chosen, threshold).combine([shares[index] for index in chosen])

    upload = messages.to_server(sent["upload", "p0"], sender="p0", limit=99999)
    seed, key = combined(seeds), combined(keys)
    vector = unpack(upload.vector[0], net.setup.length, bits)
    vector -= expand(seed, net.setup.length, vector.dtype)
    for peer in range(1, len(net.names)):
        mask = messages.to_server(sent["advertise", f"p{peer}"], sender=f"p{peer}", limit=999).mask
        pair = signing.pair_seed(x25519_shared(key, mask), session, 1, 0, peer)
        vector += expand(pair, net.setup.length, vector.dtype)
    return lift(vector, bits).tolist()


def test_a_server_that_assumes_fewer_colluders_than_the_party_is_refused(network: Make) -> None:
    """Seven parties, one colluder, t = 4: the server that set it up for none reads p0's vector to the last digit."""
    assert read_p0(network(7).open(), {6}, [0, 1, 2], [3, 4, 5]) == [100, 2, 3]
    with pytest.raises(TypeError, match="corrupt"):
        Policy(directory=network(7).directory)  # type: ignore[call-arg]
    for corrupt in (1, 0.1, 0.01):
        with pytest.raises(PolicyError, match="corrupt parties of at least 1, the setup says 0"):
            joined(network(7, policy={"corrupt": corrupt}))
    with pytest.raises(PolicyError, match="2t > 7 \\+ 1"):  # naming the colluder and keeping the threshold is no better
        joined(network(7, corrupt=1, policy={"corrupt": 0.1}), threshold=4)
    joined(network(7, corrupt=1, policy={"corrupt": 0.1}))


def test_colluders_up_to_the_stated_number_cannot_have_both_shares_and_one_more_can(network: Make) -> None:
    """n = 7, corrupt = 2, t = 5: two colluders fail however the five honest parties are split, three succeed."""
    for size in range(1, 5):
        for others in combinations(range(1, 5), size - 1):
            first = [0, *others]
            second = [party for party in range(5) if party not in first]
            net = network(7, corrupt=2).open()
            assert net.setup.threshold == 5
            with pytest.raises(TooFewSurvivorsError):
                read_p0(net, {5, 6}, first, second)
    assert read_p0(network(7, corrupt=2).open(), {4, 5, 6}, [0, 1], [2, 3]) == [100, 2, 3]
