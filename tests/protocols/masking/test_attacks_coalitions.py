"""The attack zoo, continued: colluders who use what they hold, unequal views, garbage packets, and more than one round.

A coalition here is the server with some parties, whose states it opens as their owners can.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import numpy as np
import pytest

from choral.protocols.crypto.keys import x25519_public, x25519_shared
from choral.protocols.crypto.mask_stream import expand
from choral.protocols.crypto.modular_integers import lift, unpack
from choral.protocols.crypto.shamir import Combiner
from choral.protocols.errors import (
    DisputedSharesError,
    FaultyPartyError,
    FaultyServerError,
    LateVectorError,
    ProtocolError,
    StateUsedError,
    TooFewSurvivorsError,
)
from choral.protocols.masking import messages, signing

Make = Callable[..., Any]
VECTORS = {f"p{place}": [place + 100, -place, 1] for place in range(12)}


def up(raw: bytes) -> Any:
    return messages.to_server(raw, sender="test", limit=1 << 30)


def down(raw: bytes) -> Any:
    return messages.to_party(raw, limit=1 << 30)


def with_(message: Any, **changes: Any) -> Any:
    return msgspec.structs.replace(message, **changes)


def sum_of(names: Any) -> Any:
    return np.sum([VECTORS[name] for name in names], axis=0)


def sent_up(net: Any, stage: str) -> dict[str, Any]:
    """The last message of each party at that stage."""
    return {name: up(raw) for way, at, name, raw in net.sent if (way, at) == ("up", stage)}


def ask(net: Any, states: Mapping[str, Any], views: Mapping[int, list[int]], colluders: tuple[int, ...]) -> Any:
    """Show each honest party its view, forward every signature that fits it, and colluders' signatures on anything.

    Gives the Unmask of each party that answered, and the errors of those that refused, by number.
    """
    n, session = len(net.names), net.session.terms.session
    bitmaps = {party: messages.to_bitmap(view, n) for party, view in views.items()}
    confirmed, signatures, answers, refused = {}, {}, {}, {}
    for party, bitmap in bitmaps.items():
        try:
            state, raw = states[f"p{party}"].confirm(
                messages.encode(messages.Survivors(session[:16], net.number, bitmap))
            )
        except ProtocolError as error:
            refused[party] = error
        else:
            confirmed[party], signatures[party] = state, up(raw).signature
    for party, state in confirmed.items():
        signers = {peer: signature for peer, signature in signatures.items() if bitmaps[peer] == bitmaps[party]}
        for peer in colluders:
            text = signing.confirm(session, net.number, peer, bitmaps[party])
            signers[peer] = signing.sign(net.identities[f"p{peer}"], text)
        around = [peer for peer in net.session.terms.graph[party] if peer in signers and peer in views[party]]
        entries = tuple(messages.Confirmation(peer, signers[peer]) for peer in around)
        try:
            answers[party] = up(
                state.unmask(messages.encode(messages.Confirmations(session[:16], net.number, entries)))
            )
        except ProtocolError as error:
            refused[party] = error
    return answers, refused


def pooled(net: Any, states: Any, answers: Mapping[int, Any], colluders: tuple[int, ...], victim: int) -> Any:
    """The shares of the victim's seed and of its key that the coalition has, by holder."""
    seeds, keys = {}, {}
    for party, answer in answers.items():
        seeds.update((party, entry.share) for entry in answer.seeds if entry.party == victim)
        keys.update((party, entry.share) for entry in answer.keys if entry.party == victim)
    for party in colluders:
        (state,) = states[f"p{party}"]._content
        if victim in state.held:
            seeds[party], keys[party] = state.held[victim].seed_share, state.held[victim].key_share
    return seeds, keys


def secret_of(net: Any, shares: Mapping[int, bytes]) -> bytes:
    holders = sorted(shares)[: net.setup.threshold]
    combiner = Combiner([holder + 1 for holder in holders], len(holders))
    return bytes(combiner.combine([shares[holder] for holder in holders]))


def unmasked(net: Any, victim: int, seed: bytes, key: bytes) -> Any:
    """What the coalition reads, were the two secrets the victim's."""
    session, bits, length = net.session.terms.session, net.setup.modulus_bits, net.setup.length
    vector = unpack(sent_up(net, "upload")[f"p{victim}"].vector[0], length, bits).copy()
    vector -= expand(seed, length, vector.dtype)
    for name, message in sent_up(net, "advertise").items():
        peer = net.names.index(name)
        if peer in net.session.terms.graph[victim]:
            pair = signing.pair_seed(x25519_shared(key, message.mask), session, net.number, victim, peer)
            mask = expand(pair, length, vector.dtype)
            vector = vector - mask if peer < victim else vector + mask
    return lift(vector, bits)


# ---------------------------------------------------------------- colluders at the threshold and below


@pytest.mark.parametrize("extra", [0, 1], ids=["as many as agreed", "one more"])
def test_a_split_view_with_colluders_that_use_their_shares(network: Make, extra: int) -> None:
    # n = 7, corrupt = 2, t = 5 is the least with 2t > n + corrupt: two colluders fail by one share, three read p0.
    net = network(7, corrupt=2, dropouts=2).open()
    assert net.setup.threshold == 5
    colluders = (6, 5, 4)[: 2 + extra]
    honest = [party for party in range(7) if party not in colluders]
    first = [*honest[: 5 - len(colluders)]]
    second = [party for party in honest if party not in first]
    _, states = net.round(VECTORS, until="upload")
    views = {party: sorted([*group, *colluders]) for group in (first, second) for party in group}
    answers, refused = ask(net, states, views, colluders)
    seeds, keys = pooled(net, states, answers, colluders, victim=0)
    if not extra:
        assert set(refused) == set(second)
        assert {type(error) for error in refused.values()} == {TooFewSurvivorsError}
        assert (len(seeds), len(keys)) == (5, 2)
        return
    assert (len(seeds), len(keys)) == (5, 5)
    np.testing.assert_array_equal(unmasked(net, 0, secret_of(net, seeds), secret_of(net, keys)), VECTORS["p0"])


def test_colluders_who_pool_their_shares_at_the_threshold_and_one_below(network: Make) -> None:
    net = network(7, corrupt=2, dropouts=2).open()
    _, states = net.round(VECTORS, until="upload")
    public = sent_up(net, "advertise")["p0"].mask
    for colluders, reads in (((1, 2, 3, 4, 5), True), ((1, 2, 3, 4), False)):
        seeds, keys = pooled(net, states, {}, colluders, victim=0)
        assert len(keys) == len(colluders)
        assert (x25519_public(secret_of(net, keys)) == public) == reads
        found = unmasked(net, 0, secret_of(net, seeds), secret_of(net, keys))
        assert (list(found) == VECTORS["p0"]) == reads


# ---------------------------------------------------------------- a malicious server on a sparse graph


def test_no_two_views_among_neighbours_give_both_shares_on_a_sparse_graph(network: Make) -> None:
    net = network(8, neighbours=4, threshold=4, min_survivors=4).open()  # 2t > k + 3: three colluding neighbours fail
    around = net.session.terms.graph[0]
    colluders = around[:3]
    everyone, without = list(range(8)), list(range(1, 8))
    for shown in itertools.product((everyone, without), repeat=2):
        _, states = net.round(VECTORS, until="upload")
        views = {party: everyone for party in range(8) if party not in colluders}
        views |= dict(zip((around[3], next(p for p in range(1, 8) if p not in around)), shown, strict=True))
        answers, refused = ask(net, states, views, colluders)
        seeds, keys = pooled(net, states, answers, colluders, victim=0)
        assert min(len(seeds), len(keys)) < net.setup.threshold
        if shown[0] is without:  # the one honest neighbour is told that p0 dropped; no group of four agrees around p0
            assert isinstance(refused[0], TooFewSurvivorsError)


@pytest.mark.parametrize("changes", [{"corrupt": 1}, {"neighbours": 4, "threshold": 3, "min_survivors": 3}])
def test_unequal_deliveries(network: Make, changes: dict[str, Any]) -> None:
    # p0 is not given its neighbour's packet, and so does not mask with it; the neighbour masks with p0.
    net = network(6, **changes).open()
    left_out = net.session.terms.graph[0][-1]

    def withhold(name: str, raw: bytes) -> bytes:
        message = down(raw)
        packets = tuple(packet for packet in message.packets if packet.party != left_out)
        return messages.encode(with_(message, packets=packets)) if name == "p0" else raw

    net.hooks["down", "share"] = withhold
    stage, states = net.round(VECTORS, until="upload")
    _, outbox = stage.close()
    with pytest.raises(FaultyServerError, match=f"p{left_out} survives but never shared"):
        states["p0"].confirm(outbox["p0"])
    assert "p0" not in sent_up(net, "confirm")


# ---------------------------------------------------------------- garbage packets


def garble(net: Any, dealer: int, victims: tuple[int, ...]) -> None:
    def hook(name: str, raw: bytes) -> bytes:
        message = up(raw)
        packets = tuple(
            with_(packet, sealed=bytes(82)) if packet.party in victims else packet for packet in message.packets
        )
        return messages.encode(with_(message, packets=packets)) if name == f"p{dealer}" else raw

    net.hooks["up", "share"] = hook


@pytest.mark.parametrize("changes", [{"corrupt": 2, "dropouts": 2}, {"neighbours": 4, "threshold": 3}])
def test_a_dealer_of_garbage_evicts_nobody(network: Make, changes: dict[str, Any]) -> None:
    net = network(7, **changes).open()
    victims = net.session.terms.graph[6][:1]
    garble(net, 6, victims)
    for drops in ({}, {"p6": "upload"}):
        outcome = net.round(VECTORS, drops=drops)
        survivors = [name for name in net.names if name not in drops]
        assert outcome.survivors == tuple(survivors)
        np.testing.assert_array_equal(outcome.total, sum_of(survivors))
        assert outcome.disputes == {"p6": tuple(f"p{victim}" for victim in victims)}
        assert not net.refused


def test_a_party_can_say_whose_packet_did_not_open(network: Make) -> None:
    net = network(5).open()
    garble(net, 4, (0,))
    stage, states = net.round(VECTORS, until="share")
    _, outbox = stage.close()
    assert states["p0"].receive(outbox["p0"]).unopened == ("p4",)
    assert states["p1"].receive(outbox["p1"]).unopened == ()


def test_a_dealer_of_garbage_to_more_than_may_lie_is_named(network: Make) -> None:
    net = network(7, corrupt=2, dropouts=2).open()
    garble(net, 6, (0, 1, 2))
    with pytest.raises(FaultyPartyError, match="dealt do not open, say p0, p1, p2: more than the 2") as caught:
        net.round(VECTORS)
    assert caught.value.blame == "p6"
    assert not sent_up(net, "unmask")


@pytest.mark.parametrize("silent", [("p6",), ("p6", "p5")], ids=["one would do", "both are needed"])
def test_garbage_that_only_few_accuse_blames_both_sides(network: Make, silent: tuple[str, ...]) -> None:
    net = network(7, corrupt=2, dropouts=2).open()
    assert net.setup.threshold == 5
    garble(net, 6, (0, 1))
    with pytest.raises(DisputedSharesError) as caught:
        net.round(VECTORS, drops=dict.fromkeys(silent, "upload"))
    assert (caught.value.dealer, caught.value.accusers) == ("p6", ("p0", "p1"))
    assert caught.value.blame == "p6 or p0, p1"


@pytest.mark.parametrize("unopened", [(0,), (3,), (2, 1), (1, 1)], ids=["itself", "no dealer", "order", "twice"])
def test_a_false_form_of_accusation(network: Make, unopened: tuple[int, ...]) -> None:
    net = network(5).open()
    net.hooks["up", "confirm"] = lambda name, raw: (
        messages.encode(with_(up(raw), unopened=unopened)) if name == "p0" else raw
    )
    net.round(VECTORS, drops={"p3": "share"})
    assert [(name, type(error), error.blame) for name, error in net.rejected] == [("p0", FaultyPartyError, "p0")]
    assert "accuses" in str(net.rejected[0][1])


def test_who_accuses_reveals_no_share_of_the_accused(network: Make) -> None:
    net = network(5).open()
    garble(net, 4, (0,))
    net.round(VECTORS)
    assert [entry.party for entry in sent_up(net, "unmask")["p0"].seeds] == [0, 1, 2, 3]
    net.hooks["up", "unmask"] = lambda name, raw: (
        messages.encode(with_(up(raw), seeds=(*up(raw).seeds, messages.Revealed(4, bytes(33)))))
        if name == "p0"
        else raw
    )
    net.round(VECTORS)
    assert [(name, type(error)) for name, error in net.rejected] == [("p0", FaultyPartyError)]


# ---------------------------------------------------------------- across rounds


@pytest.mark.parametrize("stalled", ["advertise", "share", "upload", "confirm"])
def test_a_round_that_was_given_up_is_not_answered_after_the_next_began(network: Make, stalled: str) -> None:
    net = network(4, corrupt=1).open()
    stage, states = net.round(VECTORS, until=stalled)
    _, outbox = stage.close()
    net.round(VECTORS, drops={"p3": "upload"})
    steps: dict[str, Callable[[], Any]] = {
        "advertise": lambda: states["p0"].share(outbox["p0"], randomness=net.random["p0"]),
        "share": lambda: states["p0"].receive(outbox["p0"]),
        "upload": lambda: states["p0"].confirm(outbox["p0"]),
        "confirm": lambda: states["p0"].unmask(outbox["p0"]),
    }
    with pytest.raises(StateUsedError, match="round 1 ended for this party when it took part in round 2"):
        steps[stalled]()


def test_a_vector_is_not_uploaded_to_a_round_that_was_given_up(network: Make) -> None:
    net = network(4, corrupt=1).open()
    stage, states = net.round(VECTORS, until="share")
    ready = states["p0"].receive(stage.close()[1]["p0"])
    net.round(VECTORS)
    with pytest.raises(StateUsedError, match="round 1 ended"):
        ready.upload(np.array(VECTORS["p0"]))


def test_advertising_ahead_does_not_end_the_round(network: Make) -> None:
    net = network(4, corrupt=1).open()
    stage, states = net.round(VECTORS, until="confirm")
    unmasking, outbox = stage.close()
    for name, raw in outbox.items():
        net.members[name], _, ride = net.members[name].advertise(2, randomness=net.random[name])
        unmasking.receive(name, states[name].unmask(raw, following=ride))
    np.testing.assert_array_equal(unmasking.close().total, sum_of(net.names))


def test_a_wrong_round_number_does_not_cost_the_session(network: Make) -> None:
    net = network(3).open()
    net.round(VECTORS)
    for wrong in (1, 0, 1 << 32):
        with pytest.raises(FaultyServerError, match="after round 1"):
            net.members["p0"].advertise(wrong, randomness=net.random["p0"])
    np.testing.assert_array_equal(net.round(VECTORS).total, sum_of(net.names))


def test_an_old_vector_is_late_if_it_was_dropped_and_a_replay_if_it_was_summed(network: Make) -> None:
    net = network(4, corrupt=1).open()
    old: dict[str, bytes] = {}
    net.hooks["up", "upload"] = lambda name, raw: old.setdefault(name, raw) and (None if name == "p3" else raw)
    net.round(VECTORS)
    stage = net.session.begin(2)
    with pytest.raises(LateVectorError):
        stage.receive("p3", old["p3"])
    with pytest.raises(FaultyPartyError, match="p0: expected its Advertise, got its Upload"):
        stage.receive("p0", old["p0"])


def everything_in(value: Any, seen: set[int]) -> set[bytes]:
    if id(value) in seen:
        return set()
    seen.add(id(value))
    if isinstance(value, bytes):
        return {value}
    items = [*value.values(), *value.keys()] if isinstance(value, dict) else []
    items += list(value) if isinstance(value, set | frozenset | list | tuple) else []
    slots = (*getattr(type(value), "__slots__", ()), *getattr(value, "__dict__", {}))
    items += [getattr(value, slot, None) for slot in slots]
    return set().union(*(everything_in(item, seen) for item in items)) if items else set()


def test_nothing_that_a_party_keeps_opens_a_packet_of_a_past_round(network: Make) -> None:
    net = network(4, corrupt=1).open()
    drawn: list[bytes] = []
    honest = net.random["p0"]
    net.random["p0"] = lambda size: drawn.append(honest(size)) or drawn[-1]
    stage, states = net.round(VECTORS, until="share")
    first = sent_up(net, "advertise")["p0"]
    transport = next(secret for secret in drawn if len(secret) == 32 and x25519_public(secret) == first.transport)
    assert transport != next(secret for secret in drawn if len(secret) == 32 and x25519_public(secret) == first.mask)
    agreed = x25519_shared(transport, sent_up(net, "advertise")["p1"].transport)
    channel = signing.channel(agreed, net.session.terms.session)
    assert channel in everything_in(states["p0"], set())
    ready = states["p0"].receive(stage.close()[1]["p0"])
    for kept in (ready, net.members["p0"]):
        assert not {transport, agreed, channel} & everything_in(kept, set())
    [(membership, _)] = net.members["p0"]._content
    assert membership.session in everything_in(net.members["p0"], set())  # the search does find what is there
    net.round(VECTORS)
    second = sent_up(net, "advertise")["p0"]
    assert len({first.mask, first.transport, second.mask, second.transport}) == 4
    assert not set(drawn[:3]) & everything_in(net.members["p0"], set())
