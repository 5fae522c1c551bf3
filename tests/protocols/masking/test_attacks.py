"""The attack zoo: each test plays a cheating party or server against the real state machines."""

from __future__ import annotations

import contextlib
import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
import pytest

from choral.protocols.crypto import shamir
from choral.protocols.crypto.keys import ed25519_sign, x25519_public
from choral.protocols.errors import (
    FaultyPartyError,
    FaultyPartyOrServerError,
    FaultyServerError,
    LateVectorError,
    MessageError,
    PolicyError,
    ProtocolError,
    SpecError,
    StateUsedError,
    TooFewSurvivorsError,
)
from choral.protocols.masking import messages, party_round, signing
from choral.protocols.masking.server.opening import Opening

Make = Callable[..., Any]
VECTORS = {f"p{place}": [place, -place, 1] for place in range(12)}
SMALL_ORDER = [
    bytes(32),
    (1).to_bytes(32, "little"),
    (325606250916557431795983626356110631294008115727848805560023387167927233504).to_bytes(32, "little"),
    (2**255 - 20).to_bytes(32, "little"),
]


def parse(raw: bytes) -> Any:
    """What is in a message, whoever it is for."""
    return (
        messages.to_party(raw, limit=1 << 30)
        if _is_down(raw)
        else messages.to_server(raw, sender="test", limit=1 << 30)
    )


def _is_down(raw: bytes) -> bool:
    try:
        messages.to_party(raw, limit=1 << 30)
    except MessageError:
        return False
    return True


def edit(change: Callable[[str, Any], Any], *, only: str | None = None) -> Callable[[str, bytes], bytes | None]:
    """A hook that rewrites decoded messages: fields of the struct that ``change`` gives back."""

    def hook(name: str, raw: bytes) -> bytes | None:
        if only not in (None, name):
            return raw
        message = parse(raw)
        changed = change(name, message)
        return None if changed is None else messages.encode(changed)

    return hook


def with_(message: Any, **changes: Any) -> Any:
    return msgspec.structs.replace(message, **changes)


def replaced(items: tuple[Any, ...], place: int, item: Any) -> tuple[Any, ...]:
    return (*items[:place], item, *items[place + 1 :])


def flip(raw: bytes, place: int = 0) -> bytes:
    return raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :]


def secrets_in(value: Any, seen: set[int] | None = None) -> Iterator[bytes]:
    """Every bytes object that can be reached from ``value``."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, bytes):
        yield value
    elif isinstance(value, dict | set | frozenset | list | tuple):
        for item in (*value.values(), *value.keys()) if isinstance(value, dict) else value:
            yield from secrets_in(item, seen)
    for slot in (*getattr(type(value), "__slots__", ()), *getattr(value, "__dict__", {})):
        yield from secrets_in(getattr(value, slot, None), seen)


def expect_sum(net: Any, outcome: Any, names: Any) -> None:
    assert outcome.survivors == tuple(names)
    np.testing.assert_array_equal(outcome.total, np.sum([VECTORS[name] for name in names], axis=0))


# ---------------------------------------------------------------- double reveal


def test_a_party_that_confirmed_holds_one_share_per_peer_and_nothing_of_the_other(
    network: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    dealt: list[list[list[bytes]]] = []

    def spy(*args: Any, **kwargs: Any) -> list[list[bytes]]:
        dealt.append(shamir.split(*args, **kwargs))
        return dealt[-1]

    monkeypatch.setattr(party_round, "split", spy)
    net = network(4, corrupt=1).open()
    _, states = net.round(VECTORS, drops={"p3": "upload"}, until="confirm")
    # In the order of sharing p0 .. p3; dealer d's holders are the others ascending, then d itself.
    held = set(secrets_in(states["p0"]._content))
    for dealer, (seeds, keys) in enumerate(dealt):
        place = -1 if dealer == 0 else 0  # p0's place among the holders of this dealer
        assert (seeds[place] in held) == (dealer != 3), dealer
        assert (keys[place] in held) == (dealer == 3), dealer


def test_a_second_request_finds_an_empty_state(network: Make) -> None:
    net = network(4, corrupt=1).open()
    stage, states = net.round(VECTORS, drops={"p3": "share"}, until="upload")
    uploaded = states["p0"]
    _, survivors = stage.close()
    confirmed, _ = uploaded.confirm(survivors["p0"])
    everyone_else = messages.encode(with_(parse(survivors["p0"]), bitmap=messages.to_bitmap([0, 1, 2, 3], 4)))
    for again in (survivors["p0"], everyone_else):
        with pytest.raises(StateUsedError, match="used already") as caught:
            uploaded.confirm(again)
        assert "server" in caught.value.blame
    garbage = messages.encode(messages.Confirmations(parse(survivors["p0"]).session, 1, ()))
    with pytest.raises(TooFewSurvivorsError):
        confirmed.unmask(garbage)
    with pytest.raises(StateUsedError):  # a refusal spends the state too
        confirmed.unmask(garbage)


def test_of_many_threads_that_ask_one_state_one_is_answered(network: Make) -> None:
    net = network(3).open()
    stage, states = net.round(VECTORS, until="upload")
    _, outbox = stage.close()
    start, answers = threading.Barrier(8), []

    def ask() -> None:
        start.wait()
        with contextlib.suppress(StateUsedError):
            answers.append(states["p0"].confirm(outbox["p0"]))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 1


def test_states_cannot_be_copied_or_shown(network: Make) -> None:
    net = network(3).open()
    _, states = net.round(VECTORS, until="confirm")
    for state in (net.members["p0"], states["p0"]):
        for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(StateUsedError):
                duplicate(state)
        text = repr(state) + str(state)
        assert len(text) < 60
        for secret in secrets_in(state._content):
            assert secret.hex() not in text


def test_overlapping_sets_of_survivors_and_dropped_in_one_answer(network: Make) -> None:
    def both(name: str, message: Any) -> Any:
        return with_(message, keys=(messages.Revealed(message.seeds[0].party, message.seeds[0].share), *message.keys))

    net = network(5, corrupt=1).open()
    net.hooks["up", "unmask"] = edit(both, only="p1")
    outcome = net.round(VECTORS)
    assert [(name, type(error), error.blame) for name, error in net.rejected] == [("p1", FaultyPartyError, "p1")]
    expect_sum(net, outcome, net.names)  # the others' answers suffice


def test_a_server_cannot_ask_for_a_set_that_overlaps_its_complement() -> None:
    # One bit per party: the request has no form that says "survived" and "dropped" of the same one.
    assert messages.from_bitmap(bytes([0b0101]), 4) == {0, 2}
    assert messages.from_bitmap(bytes([0b10101]), 4) is None
    assert messages.from_bitmap(bytes([0b0101, 0]), 4) is None


# ---------------------------------------------------------------- survivors


def split_views(net: Any, views: dict[str, list[int]]) -> dict[str, Any]:
    """A malicious server shows each party its own set and forwards every signature it gets; the refusals."""
    stage, states = net.round(VECTORS, until="upload")
    session, n = parse(stage.close()[1]["p0"]).session, len(net.names)
    signatures, confirmed, refused = {}, {}, {}
    for name, view in views.items():
        raw = messages.encode(messages.Survivors(session, net.number, messages.to_bitmap(view, n)))
        try:
            confirmed[name], reply = states[name].confirm(raw)
        except ProtocolError as error:
            refused[name] = error
        else:
            signatures[name] = parse(reply).signature
    for name, state in confirmed.items():
        entries = tuple(
            messages.Confirmation(net.names.index(peer), signature)
            for peer, signature in sorted(signatures.items())
            if peer != name and net.names.index(peer) in views[name]
        )
        try:
            state.unmask(messages.encode(messages.Confirmations(session, net.number, entries)))
        except ProtocolError as error:
            refused[name] = error
    return refused


def test_different_survivor_sets_shown_to_different_parties(network: Make) -> None:
    everyone, without = [0, 1, 2, 3], [0, 1, 2]
    net = network(4, corrupt=1).open()
    assert not split_views(net, dict.fromkeys(net.names, everyone))
    refused = split_views(net, {"p0": everyone, "p1": everyone, "p2": without, "p3": everyone})
    assert set(refused) == {"p0", "p1", "p2", "p3"}
    assert {type(error) for error in refused.values()} == {FaultyServerError}


def test_hiding_the_differing_signatures_leaves_too_few(network: Make) -> None:
    net = network(4, corrupt=1).open()  # t = 3: two and two can never both agree
    stage, states = net.round(VECTORS, until="upload")
    session = parse(stage.close()[1]["p0"]).session
    raw = messages.encode(messages.Survivors(session, 1, messages.to_bitmap(range(4), 4)))
    pairs = {name: states[name].confirm(raw) for name in ("p0", "p1")}
    for one, other in (("p0", "p1"), ("p1", "p0")):
        entry = messages.Confirmation(net.names.index(other), parse(pairs[other][1]).signature)
        with pytest.raises(TooFewSurvivorsError, match="agree on the survivors"):
            pairs[one][0].unmask(messages.encode(messages.Confirmations(session, 1, (entry,))))


@pytest.mark.parametrize(
    ("view", "error"),
    [
        ([1, 2, 3], FaultyServerError),  # says that p0 dropped, and asks it all the same
        ([0, 1], TooFewSurvivorsError),  # below min_survivors
        ([0], TooFewSurvivorsError),
        ([0, 1, 2, 5], FaultyServerError),  # there is no party 5
    ],
)
def test_survivors_that_a_party_cannot_agree_to(network: Make, view: list[int], error: type[Exception]) -> None:
    net = network(4, corrupt=1).open()
    net.hooks["down", "upload"] = edit(lambda _, message: with_(message, bitmap=messages.to_bitmap(view, 8)), only="p0")
    net.round(VECTORS)
    assert type(net.refused["p0"]) is error


def test_a_survivor_that_never_shared(network: Make) -> None:
    net = network(4, corrupt=1).open()
    net.hooks["down", "upload"] = edit(
        lambda _, message: with_(message, bitmap=messages.to_bitmap(range(4), 4)), only="p0"
    )
    net.hooks["down", "confirm"] = lambda name, raw: raw
    with pytest.raises(TooFewSurvivorsError):
        net.round(VECTORS, drops={"p3": "share"})
    assert isinstance(net.refused["p0"], FaultyServerError)
    assert "p3 survives but never shared" in str(net.refused["p0"])


def test_a_confirmation_of_a_dropped_or_unrelated_party_does_not_count(network: Make) -> None:
    net = network(5).open()

    def forge(name: str, message: Any) -> Any:
        signature = ed25519_sign(net.identities["p4"], signing.confirm(net.session.terms.session, 1, 4, b"\x0f"))
        return with_(message, entries=(*message.entries, messages.Confirmation(4, signature)))

    net.hooks["down", "confirm"] = edit(forge, only="p0")
    net.round(VECTORS, drops={"p4": "upload"})
    assert isinstance(net.refused["p0"], FaultyServerError)


def test_one_confirmation_counted_twice(network: Make) -> None:
    net = network(4, corrupt=1).open()
    net.hooks["down", "confirm"] = edit(lambda _, message: with_(message, entries=(message.entries[0],) * 2), only="p0")
    net.round(VECTORS)
    assert isinstance(net.refused["p0"], FaultyServerError)


# ---------------------------------------------------------------- keys


def test_a_mask_key_substituted_on_the_way_down(network: Make) -> None:
    mallory = x25519_public(b"m" * 32)
    net = network(4, corrupt=1).open()
    net.hooks["down", "advertise"] = edit(
        lambda _, message: with_(
            message, entries=replaced(message.entries, 0, with_(message.entries[0], mask=mallory))
        ),
        only="p0",
    )
    outcome = net.round(VECTORS)
    assert isinstance(net.refused["p0"], FaultyServerError)
    assert "p1 are not signed" in str(net.refused["p0"])
    expect_sum(net, outcome, ["p1", "p2", "p3"])


def test_a_mask_key_signed_by_another_identity_on_the_way_up(network: Make) -> None:
    net = network(4, corrupt=1).open()

    def forge(name: str, message: Any) -> Any:
        signed = signing.advertise(net.session.terms.session, 1, 0, message.mask, message.transport)
        return with_(message, signature=ed25519_sign(net.identities["p1"], signed))

    net.hooks["up", "advertise"] = edit(forge, only="p0")
    outcome = net.round(VECTORS)
    assert [(name, error.blame) for name, error in net.rejected] == [("p0", "p0")]
    expect_sum(net, outcome, ["p1", "p2", "p3"])


def test_a_hello_changed_on_the_way(network: Make) -> None:
    net = network(3)

    def swap(name: str, message: Any) -> Any:
        return with_(message, hellos=replaced(message.hellos, 1, with_(message.hellos[1], commitment=b"m" * 32)))

    net.hooks["down", "hello"] = edit(swap, only="p0")
    with pytest.raises(TooFewSurvivorsError, match="p0"):
        net.open()
    assert isinstance(net.refused["p0"], FaultyServerError)
    assert "Hello of p1" in str(net.refused["p0"])


def test_a_party_whose_own_hello_was_replaced(network: Make) -> None:
    net = network(3)

    def swap(name: str, message: Any) -> Any:
        mine = with_(message.hellos[0], commitment=b"m" * 32)
        signed = signing.hello(signing.setup_digest(messages.encode(net.setup)), 0, mine.commitment)
        mine = with_(mine, signature=ed25519_sign(net.identities["p0"], signed))  # its identity was stolen, even
        return with_(message, hellos=replaced(message.hellos, 0, mine))

    net.hooks["down", "hello"] = edit(swap)
    with pytest.raises(TooFewSurvivorsError):
        net.open()
    assert "another Hello of this party" in str(net.refused["p0"])


@pytest.mark.parametrize("field", ["mask", "transport"])
@pytest.mark.parametrize("point", SMALL_ORDER, ids=["zero", "one", "order 8", "minus one"])
def test_small_order_points_are_refused_and_their_signer_named(network: Make, point: bytes, field: str) -> None:
    def weaken(net: Any, party: int, message: Any) -> Any:
        message = with_(message, **{field: point})
        signed = signing.advertise(net.session.terms.session, 1, party, message.mask, message.transport)
        return with_(message, signature=ed25519_sign(net.identities[f"p{party}"], signed))

    net = network(4, corrupt=1).open()
    net.hooks["up", "advertise"] = edit(lambda _, message: weaken(net, 0, message), only="p0")
    expect_sum(net, net.round(VECTORS), ["p1", "p2", "p3"])  # the server forwards it to nobody
    assert [(name, type(error), error.blame) for name, error in net.rejected] == [("p0", FaultyPartyError, "p0")]
    assert "unusable" in str(net.rejected[0][1])
    assert not net.refused

    net = network(4, corrupt=1).open()  # a server that does forward it: p1's key, to p0
    net.hooks["down", "advertise"] = edit(
        lambda _, message: with_(message, entries=(weaken(net, 1, message.entries[0]), *message.entries[1:])), only="p0"
    )
    expect_sum(net, net.round(VECTORS), ["p1", "p2", "p3"])
    assert isinstance(net.refused["p0"], FaultyPartyError)
    assert net.refused["p0"].blame == "p1"


# ---------------------------------------------------------------- replay


@pytest.mark.parametrize("stage", ["advertise", "share", "upload", "confirm", "unmask"])
def test_a_party_replays_its_message_of_another_round_or_session(network: Make, stage: str) -> None:
    net = network(4, corrupt=1).open()
    net.round(VECTORS)
    old = {name: raw for way, at, name, raw in net.sent if (way, at) == ("up", stage)}
    net.hooks["up", stage] = lambda name, raw: old[name] if name == "p0" else raw
    outcome = net.round(VECTORS)
    assert [(name, type(error), error.blame) for name, error in net.rejected] == [("p0", FaultyPartyError, "p0")]
    assert "round 1" in str(net.rejected[0][1])
    expect_sum(net, outcome, net.names if stage in ("confirm", "unmask") else ["p1", "p2", "p3"])

    other = network(4, corrupt=1, seed=1).open()
    other.hooks["up", stage] = lambda name, raw: old[name] if name == "p0" else raw
    other.round(VECTORS)
    assert "another session" in str(other.rejected[0][1])


@pytest.mark.parametrize(
    ("stage", "blame"),
    [("advertise", "the server"), ("share", ""), ("upload", "the server"), ("confirm", "the server")],
)
@pytest.mark.parametrize("relabel", [False, True], ids=["as it was", "relabelled"])
def test_the_server_replays_its_message_of_another_round(network: Make, stage: str, blame: str, relabel: bool) -> None:
    net = network(4, corrupt=1).open()
    net.round(VECTORS, drops={"p3": "upload"})
    old = {name: raw for way, at, name, raw in net.sent if (way, at) == ("down", stage)}

    def replay(name: str, raw: bytes) -> bytes:
        if name != "p0":
            return raw
        return messages.encode(with_(parse(old[name]), round=2)) if relabel else old[name]

    net.hooks["down", stage] = replay
    net.round(VECTORS)
    if relabel and stage == "upload":  # the set itself is no secret and can recur; nobody else confirms it
        assert net.rejected[0][0] == "p0"
        assert isinstance(net.rejected[0][1], FaultyPartyError)
        return
    if relabel and stage == "share":  # packets of another round do not open: nothing of them is used
        (confirm,) = [raw for way, at, name, raw in net.sent[-30:] if (way, at, name) == ("up", "confirm", "p0")]
        assert parse(confirm).unopened == (1, 2, 3)
        assert "p0" not in net.refused
        return
    assert net.refused["p0"].blame == (blame if relabel else "the server")


@pytest.mark.parametrize("stage", ["hello", "reveal", "advertise", "share", "upload", "confirm"])
def test_a_message_of_the_server_under_another_session(network: Make, stage: str) -> None:
    net = network(4, corrupt=1)
    net.hooks["down", stage] = edit(lambda _, message: with_(message, session=b"another session!"), only="p0")
    if stage in ("hello", "reveal"):
        with pytest.raises(TooFewSurvivorsError) if stage == "hello" else contextlib.nullcontext():
            net.open()
    else:
        net.open().round(VECTORS)
    assert isinstance(net.refused["p0"], FaultyServerError)
    assert "another session" in str(net.refused["p0"])


@pytest.mark.parametrize("count", [0, 3, 5])
def test_nonces_missing_or_too_many(network: Make, count: int) -> None:
    net = network(4)
    net.hooks["down", "reveal"] = edit(
        lambda _, message: with_(message, nonces=(message.nonces * 2)[:count]), only="p0"
    )
    net.open()
    assert net.refused["p0"].blame == "the server"


def test_only_a_key_for_a_later_round_of_this_session_rides_along(network: Make) -> None:
    for ride in ("confirm", "same round", "other session"):
        net, other = network(3).open(), network(3, seed=1).open()
        stage, states = net.round(VECTORS, until="confirm")
        _, outbox = stage.close()
        sent = {at: raw for way, at, name, raw in net.sent if (way, name) == ("up", "p0")}
        rides = {
            "confirm": sent["confirm"],
            "same round": sent["advertise"],
            "other session": other.members["p0"].advertise(2, randomness=net.random["p0"])[2],
        }
        with pytest.raises(SpecError, match="later round of this session"):
            states["p0"].unmask(outbox["p0"], following=rides[ride])


@pytest.mark.parametrize("fault", ["mask", "transport", "round", "earlier", "weak mask", "weak transport"])
def test_a_key_that_rides_along_is_checked_by_the_server(network: Make, fault: str) -> None:
    net = network(3).open()
    stage, states = net.round(VECTORS, until="confirm")
    unmasking, outbox = stage.close()
    net.members["p0"], _, ride = net.members["p0"].advertise(2, randomness=net.random["p0"])
    message = parse(states["p0"].unmask(outbox["p0"], following=ride))
    mask, transport = message.following.mask, message.following.transport

    def signed(number: int, mask: bytes, transport: bytes) -> Any:
        text = signing.advertise(net.session.terms.session, number, 0, mask, transport)
        return messages.Following(number, mask, transport, ed25519_sign(net.identities["p0"], text))

    following = {
        "mask": with_(message.following, mask=x25519_public(b"m" * 32)),
        "round": with_(message.following, round=3),
        "transport": with_(message.following, transport=x25519_public(b"m" * 32)),
        "earlier": signed(1, mask, transport),
        "weak mask": signed(2, bytes(32), transport),
        "weak transport": signed(2, mask, bytes(32)),
    }[fault]
    with pytest.raises(FaultyPartyError, match="p0: the keys that it sent along"):
        unmasking.receive("p0", messages.encode(with_(message, following=following)))
    unmasking.receive("p0", messages.encode(message))


def test_a_message_after_the_round_went_on_without_its_sender(network: Make) -> None:
    net = network(4, corrupt=1).open()
    kept = {}
    net.hooks["up", "share"] = lambda name, raw: kept.setdefault(name, raw) and None if name == "p3" else raw
    stage, _ = net.round(VECTORS, until="share")
    uploading, _ = stage.close()
    with pytest.raises(FaultyPartyError, match="p3: its DealtShares came after the round went on without it"):
        stage.receive("p3", kept["p3"])
    with pytest.raises(FaultyPartyError, match="p3: expected its Upload"):
        uploading.receive("p3", kept["p3"])
    forged = messages.encode(messages.Upload(parse(kept["p3"]).session, 1, (bytes(5),)))
    with pytest.raises(FaultyPartyError, match="p3: its Upload came after the round went on without it"):
        uploading.receive("p3", forged)
    with pytest.raises(StateUsedError, match="closed"):
        stage.close()


def test_a_hello_signed_by_somebody_else(network: Make) -> None:
    net = network(3)

    def forge(name: str, message: Any) -> Any:
        signed = signing.hello(signing.setup_digest(messages.encode(net.setup)), 0, message.commitment)
        return with_(message, signature=ed25519_sign(net.identities["p1"], signed))

    net.hooks["up", "hello"] = edit(forge, only="p0")
    with pytest.raises(TooFewSurvivorsError, match="p0"):
        net.open()
    assert [(name, type(error), error.blame) for name, error in net.rejected] == [("p0", FaultyPartyError, "p0")]


@pytest.mark.parametrize(
    "cheat", [lambda keys: (), lambda keys: keys[:1], lambda keys: keys[::-1], lambda keys: keys * 2]
)
def test_a_holder_that_withholds_or_repeats_shares_of_the_dropped(network: Make, cheat: Any) -> None:
    net = network(7).open()  # t = 4
    net.hooks["up", "unmask"] = edit(lambda _, message: with_(message, keys=cheat(message.keys)), only="p0")
    outcome = net.round(VECTORS, drops={"p5": "upload", "p6": "upload"})
    assert [(name, type(error), error.blame) for name, error in net.rejected] == [("p0", FaultyPartyError, "p0")]
    expect_sum(net, outcome, ["p0", "p1", "p2", "p3", "p4"])


def test_a_survivor_stranded_among_dropped_neighbours_is_named_before_anything_is_revealed(network: Make) -> None:
    net = network(10, neighbours=4, threshold=3, min_survivors=3).open()
    victim = 0
    gone = [f"p{peer}" for peer in net.session.terms.graph[victim][:2]]
    with pytest.raises(TooFewSurvivorsError, match="too few hold a share of p"):
        net.round(VECTORS, drops=dict.fromkeys(gone, "upload"))
    assert not [1 for way, stage, *_ in net.sent if (way, stage) == ("up", "confirm")]


def test_a_server_opens_only_for_parties_that_it_knows(network: Make) -> None:
    net = network(3)
    with pytest.raises(SpecError, match="no key for 'p2'"):
        Opening(net.setup, {name: net.directory[name] for name in ("p0", "p1")}, net.signatures)
    with pytest.raises(PolicyError, match="can wrap"):
        Opening(with_(net.setup, modulus_bits=3), net.directory, net.signatures)
    net.open().session.begin(3)
    with pytest.raises(SpecError, match="a round after 3"):
        net.session.begin(3)


def test_a_party_does_not_run_a_round_twice(network: Make) -> None:
    net = network(3).open()
    net.round(VECTORS)
    with pytest.raises(FaultyServerError, match="round 1 after round 1"):
        net.members["p0"].advertise(1, randomness=net.random["p0"])


def test_the_same_setup_twice_is_not_the_same_session(network: Make) -> None:
    first = network(3).open()
    first.random = network(3, seed=9).random  # the parties restart: fresh randomness, the server repeats itself
    again = first.session.terms.session
    first.open()
    assert first.session.terms.setup.session == first.setup.session
    assert first.session.terms.session != again


def test_messages_of_another_session_with_the_same_identities(network: Make) -> None:
    one, other = network(3).open(), network(3)
    other.random = network(3, seed=9).random
    other.open()
    one.round(VECTORS)
    old = next(raw for way, at, name, raw in one.sent if (way, at, name) == ("up", "advertise", "p0"))
    stage = other.session.begin(1)
    with pytest.raises(FaultyPartyError, match="another session"):
        stage.receive("p0", old)
    with pytest.raises(FaultyPartyError, match="not signed"):
        stage.receive("p0", messages.encode(with_(parse(old), session=other.session.terms.session[:16])))


def test_the_same_survivors_confirmed_in_an_earlier_round(network: Make) -> None:
    net = network(4, corrupt=1).open()
    net.round(VECTORS)
    old = {name: raw for way, at, name, raw in net.sent if (way, at) == ("down", "confirm")}
    net.hooks["down", "confirm"] = lambda name, raw: (
        messages.encode(with_(parse(old[name]), round=2)) if name == "p0" else raw
    )
    net.round(VECTORS)
    assert "not on the set shown" in str(net.refused["p0"])
    assert net.refused["p0"].blame == "the server"


def test_a_session_depends_on_everything_that_was_agreed() -> None:
    parts = (b"s" * 32, [b"c" * 32, b"d" * 32], [b"e" * 32, b"f" * 32])
    digests = {signing.session_digest(*parts)}
    digests.add(signing.session_digest(b"x" * 32, *parts[1:]))
    for place in (1, 2):
        for party in (0, 1):
            changed = [list(part) if isinstance(part, list) else part for part in parts]
            changed[place][party] = b"x" * 32
            digests.add(signing.session_digest(*changed))
    assert len(digests) == 6


@pytest.mark.parametrize("stage", ["advertise", "share"])
def test_too_few_neighbours_are_refused_before_anything_is_sent(network: Make, stage: str) -> None:
    net = network(5, corrupt=1).open()  # t = 4: three neighbours and the party itself
    what = "entries" if stage == "advertise" else "packets"
    net.hooks["down", stage] = edit(lambda _, message: with_(message, **{what: getattr(message, what)[:2]}), only="p0")
    net.round(VECTORS)
    assert isinstance(net.refused["p0"], TooFewSurvivorsError)
    assert (net.refused["p0"].survivors, net.refused["p0"].needed) == (3, 4)
    following = {"advertise": "share", "share": "upload"}[stage]
    assert not [1 for way, at, name, _ in net.sent if (way, at, name) == ("up", following, "p0")]


def test_survivors_without_enough_of_this_party_s_neighbours(network: Make) -> None:
    net = network(10, neighbours=4, threshold=3, min_survivors=3).open()
    around = net.session.terms.graph[0]
    view = messages.to_bitmap(set(range(10)) - set(around[:2]), 10)
    net.hooks["down", "upload"] = edit(lambda _, message: with_(message, bitmap=view), only="p0")
    net.round(VECTORS)
    assert isinstance(net.refused["p0"], TooFewSurvivorsError)
    assert "to unmask anyone" in str(net.refused["p0"])


# ---------------------------------------------------------------- terms


def test_sybil_neighbours_in_a_round(network: Make) -> None:
    net = network(6, neighbours=2, threshold=2).open()
    around = net.session.terms.graph[0]
    stranger = next(party for party in range(1, 6) if party not in around)

    def add(name: str, message: Any) -> Any:
        mask = x25519_public(b"m" * 32)
        signature = ed25519_sign(
            net.identities[f"p{stranger}"], signing.advertise(net.session.terms.session, 1, stranger, mask, mask)
        )
        entries = (message.entries[0], messages.RosterEntry(stranger, mask, mask, signature))
        return with_(message, entries=tuple(sorted(entries, key=lambda entry: entry.party)))

    net.hooks["down", "advertise"] = edit(add, only="p0")
    with pytest.raises(TooFewSurvivorsError):
        net.round(VECTORS)
    assert "no place among them" in str(net.refused["p0"])
    assert net.refused["p0"].blame == "the server"


def test_one_neighbour_shown_twice(network: Make) -> None:
    net = network(4, corrupt=1).open()
    net.hooks["down", "advertise"] = edit(
        lambda _, message: with_(message, entries=(message.entries[0], *message.entries)[:3]), only="p0"
    )
    net.round(VECTORS)
    assert "each once" in str(net.refused["p0"])


def test_a_cohort_below_the_minimum(network: Make) -> None:
    net = network(5, corrupt=1, min_survivors=5, policy={"minimum_cohort": 5}).open()
    net.hooks["down", "upload"] = edit(lambda _, message: with_(message, bitmap=b"\x0f"))
    with pytest.raises(TooFewSurvivorsError):
        net.round(VECTORS)
    assert {name: type(error) for name, error in net.refused.items()} == {
        **dict.fromkeys(("p0", "p1", "p2", "p3"), TooFewSurvivorsError),
        "p4": FaultyServerError,
    }


def test_the_server_cannot_choose_the_graph(network: Make) -> None:
    # Whatever everyone else reveals, one honest nonce moves that party's neighbours over all of the roster.
    met = set()
    for seed in range(40):
        net = network(9, neighbours=2, threshold=2)
        net.random["p0"] = network(9, seed=seed).random["p0"]  # the others and the server repeat themselves
        net.open()
        met |= set(net.session.terms.graph[0])
    assert met == set(range(1, 9))


def test_a_nonce_cannot_be_chosen_after_the_others_are_known(network: Make) -> None:
    net = network(4)
    net.hooks["up", "reveal"] = edit(lambda _, message: with_(message, nonce=b"x" * 32), only="p3")
    with pytest.raises(TooFewSurvivorsError, match="p3"):
        net.open()
    assert [(name, error.blame) for name, error in net.rejected] == [("p3", "p3")]

    net = network(4)
    net.hooks["down", "reveal"] = edit(
        lambda _, message: with_(message, nonces=replaced(message.nonces, 3, b"x" * 32)), only="p0"
    )
    net.open()
    assert isinstance(net.refused["p0"], FaultyPartyOrServerError)
    assert net.refused["p0"].blame == "p3 or the server"


@pytest.mark.parametrize("count", [0, 2, 3, 5])
def test_no_nonce_is_shown_before_everybody_committed(network: Make, count: int) -> None:
    net = network(4)
    net.hooks["down", "hello"] = edit(lambda _, message: with_(message, hellos=(message.hellos * 2)[:count]), only="p0")
    with pytest.raises(TooFewSurvivorsError):
        net.open()
    assert "expected 4 Hellos" in str(net.refused["p0"]) or isinstance(net.refused["p0"], MessageError)
    assert not [1 for way, at, name, _ in net.sent if (way, at, name) == ("up", "reveal", "p0")]


# ---------------------------------------------------------------- shares and secrets


@pytest.mark.parametrize(
    "cheat",
    [
        lambda seeds: (seeds[0], with_(seeds[1], share=seeds[2].share), with_(seeds[2], share=seeds[1].share)),
        lambda seeds: (seeds[0], with_(seeds[1], party=2), with_(seeds[2], party=1)),
        lambda seeds: (seeds[0], seeds[2], seeds[1]),
        lambda seeds: (seeds[0], seeds[1], seeds[1]),
        lambda seeds: seeds[:2],
        lambda seeds: (*seeds[:3], messages.Revealed(3, seeds[2].share), seeds[3]),
        lambda seeds: (*seeds, messages.Revealed(9, seeds[2].share)),
        lambda seeds: (seeds[0], seeds[1], with_(seeds[2], share=flip(seeds[2].share))),
        lambda seeds: (seeds[0], seeds[1], with_(seeds[2], share=b"\xff" * 33)),
        lambda seeds: (with_(seeds[0], share=flip(seeds[0].share)), *seeds[1:]),
    ],
    ids=["swapped", "renamed", "reordered", "duplicate", "missing", "extra", "unknown", "wrong", "no element", "own"],
)
def test_a_holder_that_reveals_wrong_shares_is_named_and_done_without(network: Make, cheat: Any) -> None:
    net = network(5, corrupt=1, dropouts=1).open()
    net.hooks["up", "unmask"] = edit(lambda _, message: with_(message, seeds=cheat(message.seeds)), only="p0")
    with pytest.raises(TooFewSurvivorsError, match="p0"):
        net.round(VECTORS, drops={"p3": "upload"})  # p0 is needed: t = 4
    assert [(name, type(error), error.blame) for name, error in net.rejected] == [("p0", FaultyPartyError, "p0")]


def test_a_wrong_share_costs_only_its_holder_when_others_suffice(network: Make) -> None:
    net = network(5).open()  # t = 3
    net.hooks["up", "unmask"] = edit(
        lambda _, message: with_(message, keys=(with_(message.keys[0], share=flip(message.keys[0].share)),)), only="p0"
    )
    outcome = net.round(VECTORS, drops={"p3": "upload"})
    assert [error.blame for _, error in net.rejected] == ["p0"]
    expect_sum(net, outcome, ["p0", "p1", "p2", "p4"])


@pytest.mark.parametrize("which", ["seed", "key"])
def test_a_dealer_whose_shares_give_another_secret_is_named(
    network: Make, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    net = network(4, corrupt=1).open()
    turn = []

    def lie(secrets: list[bytes], **kwargs: Any) -> list[list[bytes]]:
        turn.append(1)
        if len(turn) == 2:  # p1 deals shares of another secret
            secrets = [flip(secrets[0]), secrets[1]] if which == "seed" else [secrets[0], flip(secrets[1], 5)]
        return shamir.split(secrets, **kwargs)

    monkeypatch.setattr(party_round, "split", lie)
    drops = {"p1": "upload"} if which == "key" else {}
    with pytest.raises(FaultyPartyError, match="p1: its shares give another") as caught:
        net.round(VECTORS, drops=drops)
    assert caught.value.blame == "p1"
    assert not net.rejected
    assert not net.refused


def test_a_dealer_whose_shares_are_of_no_polynomial_is_named(network: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    net = network(4, corrupt=1).open()
    turn = []

    def lie(secrets: list[bytes], **kwargs: Any) -> list[list[bytes]]:
        turn.append(1)
        seeds, keys = shamir.split(secrets, **kwargs)
        return [[b"\xff" * 33 for _ in seeds], keys] if len(turn) == 2 else [seeds, keys]

    monkeypatch.setattr(party_round, "split", lie)
    with pytest.raises(FaultyPartyError, match="p1: the shares that it dealt combine to no secret"):
        net.round(VECTORS)


def test_a_packet_whose_shares_are_not_those_committed_to(network: Make) -> None:
    for field in ("seed_share", "key_share"):
        net = network(4, corrupt=1).open()

        def packet(*args: Any, field: str = field, honest: Any = party_round._packet) -> Any:
            """p1 seals one share and commits to another; the seal itself is right."""
            member, number, channel, public, peer, seed_share, key_share = args
            sealed = honest(*args)
            if member.index != 1:
                return sealed
            bad = {"seed_share": seed_share, "key_share": key_share}
            bad[field] = flip(bad[field])
            key = signing.seal_key(channel, number, 1, peer, public)
            data = signing.seal_data(member.session, number, 1, peer, sealed.seed_hash, sealed.key_hash)
            return with_(
                sealed, sealed=party_round.seal(key, party_round.NONCE, bad["seed_share"] + bad["key_share"], data)
            )

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(party_round, "_packet", packet)
            with pytest.raises(FaultyPartyError, match="p1: the shares that it dealt do not open, say p0, p2, p3"):
                net.round(VECTORS)
        assert not net.refused
        assert not [1 for way, at, *_ in net.sent if (way, at) == ("up", "unmask")]


@pytest.mark.parametrize("field", ["sealed", "seed_hash", "key_hash"])
def test_a_packet_changed_on_the_way(network: Make, field: str) -> None:
    net = network(4, corrupt=1).open()

    def change(name: str, message: Any) -> Any:
        packet = message.packets[1]
        packet = with_(packet, **{field: flip(getattr(packet, field), 7)})
        return with_(message, packets=replaced(message.packets, 1, packet))

    net.hooks["down", "share"] = edit(change, only="p0")
    outcome = net.round(VECTORS)
    expect_sum(net, outcome, net.names)
    assert outcome.disputes == {"p2": ("p0",)}  # who runs the server knows whether it was the server


def test_packets_given_to_the_wrong_party_or_under_another_name(network: Make) -> None:
    net = network(4, corrupt=1).open()
    kept = {}
    net.hooks["down", "share"] = lambda name, raw: kept.setdefault(name, raw) and None
    with pytest.raises(TooFewSurvivorsError):
        net.round(VECTORS)
    net = network(4, corrupt=1).open()
    net.hooks["down", "share"] = lambda name, raw: {"p0": kept["p1"]}.get(name, raw)
    net.round(VECTORS)
    assert net.refused["p0"].blame == "the server"  # p1's list has a packet from p0, and none from p1
    net = network(4, corrupt=1).open()

    def rename(name: str, message: Any) -> Any:
        one, two, three = message.packets
        return with_(message, packets=(with_(two, party=one.party), with_(one, party=two.party), three))

    net.hooks["down", "share"] = edit(rename, only="p0")
    assert net.round(VECTORS).disputes == {"p1": ("p0",), "p2": ("p0",)}


def test_shares_for_the_wrong_neighbours(network: Make) -> None:
    for cheat in (
        lambda packets: packets[:-1],
        lambda packets: (*packets, packets[-1]),
        lambda packets: packets[::-1],
        lambda packets: (with_(packets[0], party=0), *packets[1:]),
    ):
        net = network(4, corrupt=1).open()
        net.hooks["up", "share"] = edit(
            lambda _, message, c=cheat: with_(message, packets=c(message.packets)), only="p0"
        )
        outcome = net.round(VECTORS)
        assert [(name, error.blame) for name, error in net.rejected] == [("p0", "p0")]
        expect_sum(net, outcome, ["p1", "p2", "p3"])
    net = network(4, corrupt=1).open()
    net.hooks["up", "share"] = edit(lambda _, message: with_(message, own_hash=None), only="p0")
    net.round(VECTORS)
    assert net.rejected[0][1].blame == "p0"


# ---------------------------------------------------------------- vectors


def test_a_late_vector_is_thrown_away(network: Make) -> None:
    net = network(4, corrupt=1).open()
    late = {}
    net.hooks["up", "upload"] = lambda name, raw: late.setdefault(name, raw) and None if name == "p3" else raw
    stage, states = net.round(VECTORS, until="upload")
    assert stage.waiting == ("p3",)
    confirming, outbox = stage.close()
    for at in (stage, confirming):
        with pytest.raises(LateVectorError) as caught:
            at.receive("p3", late["p3"])
        assert caught.value.blame == "p3"
    replies = net.each("down", "upload", outbox, lambda name, raw: states[name].confirm(raw))
    states = net.post("confirm", confirming, replies)
    unmasking, outbox = confirming.close()
    with pytest.raises(LateVectorError):
        unmasking.receive("p3", late["p3"])
    replies = net.each("down", "confirm", outbox, lambda name, raw: (None, states[name].unmask(raw)))
    net.post("unmask", unmasking, replies)
    expect_sum(net, unmasking.close(), ["p0", "p1", "p2"])
    del net.hooks["up", "upload"]
    with pytest.raises(LateVectorError):
        net.session.begin(2).receive("p3", late["p3"])
    net.number = 2
    stage, _ = net.round(VECTORS, until="confirm")
    with pytest.raises(LateVectorError):
        stage.receive("p3", late["p3"])


def test_a_second_vector_does_not_replace_the_first(network: Make) -> None:
    net = network(3).open()
    stage, _ = net.round(VECTORS, until="upload")
    first = next(raw for way, at, name, raw in net.sent if (way, at, name) == ("up", "upload", "p0"))
    before = stage._sum.copy()
    stage.receive("p0", first)  # the network repeats itself
    np.testing.assert_array_equal(stage._sum, before)
    with pytest.raises(FaultyPartyError, match="p0: sent a second Upload, and not the same"):
        stage.receive("p0", messages.encode(with_(parse(first), vector=(bytes(len(parse(first).vector[0])),))))
    np.testing.assert_array_equal(stage._sum, before)


@pytest.mark.parametrize("change", [lambda v: v[:-1], lambda v: v + b"\0", lambda v: b"", lambda v: v[:-1] + b"\xff"])
def test_a_vector_of_another_length_or_modulus(network: Make, change: Callable[[bytes], bytes]) -> None:
    net = network(4, corrupt=1).open()  # 3 values of 13 bits: 39 bits, one of padding
    net.hooks["up", "upload"] = edit(lambda _, message: with_(message, vector=(change(message.vector[0]),)), only="p0")
    outcome = net.round(VECTORS)
    assert [(name, error.blame) for name, error in net.rejected] == [("p0", "p0")]
    expect_sum(net, outcome, ["p1", "p2", "p3"])


def test_a_vector_in_other_pieces_than_agreed(network: Make) -> None:
    """One form for each message: the same bytes cut in two are refused, naming their sender."""
    net = network(4, corrupt=1).open()
    net.hooks["up", "upload"] = edit(
        lambda _, message: with_(message, vector=(message.vector[0][:1], message.vector[0][1:])), only="p0"
    )
    outcome = net.round(VECTORS)
    assert [(name, error.blame) for name, error in net.rejected] == [("p0", "p0")]
    expect_sum(net, outcome, ["p1", "p2", "p3"])


# ---------------------------------------------------------------- messages out of place


UP = ["hello", "reveal", "advertise", "share", "upload", "confirm", "unmask"]
DOWN = ["setup", "hello", "reveal", "advertise", "share", "upload", "confirm"]
TAMPER: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda raw: b"",
    "truncated": lambda raw: raw[:-1],
    "extended": lambda raw: raw + b"\0",
    "oversized": lambda raw: raw + bytes(1 << 20),
    "of another version": lambda raw: bytes([messages.VERSION - 1]) + raw[1:],
    "garbage": lambda raw: bytes([messages.VERSION]) + b"\xc1" * 40,
    "another kind": lambda raw: (
        messages.encode(messages.Reveal(b"s" * 16, b"n" * 32))
        if not _is_down(raw)
        else messages.encode(messages.Reveals(b"s" * 16, (b"n" * 32,) * 4))
    ),
}


@pytest.mark.parametrize("how", TAMPER)
@pytest.mark.parametrize(("way", "stage"), [("up", stage) for stage in UP] + [("down", stage) for stage in DOWN])
def test_tampered_messages_are_refused_by_name_and_never_give_a_wrong_sum(
    network: Make, way: str, stage: str, how: str
) -> None:
    net = network(4, corrupt=1)
    net.hooks[way, stage] = lambda name, raw: TAMPER[how](raw) if name == "p0" else raw
    if stage in ("setup", "hello") or (way, stage) == ("up", "reveal"):
        with pytest.raises(TooFewSurvivorsError, match="p0"):
            net.open()
    else:
        net.open()
        outcome = net.round(VECTORS)
        stays = stage in ("confirm", "unmask") or (way, stage) == ("down", "upload")
        expect_sum(net, outcome, net.names if stays else ["p1", "p2", "p3"])
    if way == "up":
        (blamed,) = {error.blame for _, error in net.rejected}
        assert blamed == "p0"
    else:
        assert net.refused["p0"].blame == "the server"
        assert set(net.refused) == {"p0"}


@pytest.mark.parametrize("stage", UP)
def test_repeated_messages_change_nothing_and_blame_nobody(network: Make, stage: str) -> None:
    net = network(3)
    inner: list[Any] = []

    class Twice:
        def __init__(self, server: Any) -> None:
            self.server = server

        def receive(self, name: str, raw: bytes) -> None:
            self.server.receive(name, raw)
            self.server.receive(name, raw)
            inner.append(name)

    honest = net.post
    net.post = lambda at, server, replies: honest(at, Twice(server) if at == stage else server, replies)
    expect_sum(net, net.open().round(VECTORS), net.names)
    assert inner == list(net.names)
    assert not net.rejected


def test_a_repetition_that_arrives_a_stage_later_blames_nobody(network: Make) -> None:
    net = network(3).open()
    for early, late in (("advertise", "upload"), ("share", "upload"), ("upload", "confirm"), ("confirm", "unmask")):
        net.sent.clear()
        stage, _ = net.round(VECTORS, until=late)
        sent = {at: raw for way, at, name, raw in net.sent if (way, name) == ("up", "p0")}
        stage.receive("p0", sent[early])
        with pytest.raises(ProtocolError, match="p0"):  # not the same bytes
            stage.receive("p0", sent[early][:-1] + flip(sent[early][-1:]))
    assert not net.rejected


def test_reordered_messages(network: Make) -> None:
    net = network(3).open()
    net.round(VECTORS)
    sent = {(way, at, name): raw for way, at, name, raw in net.sent}
    for early, stage in (("upload", "advertise"), ("confirm", "share"), ("unmask", "upload")):
        other = network(3).open()
        other.hooks["up", stage] = lambda name, raw, e=early: sent["up", e, name] if name == "p0" else raw
        other.round(VECTORS)
        assert "out of order" in str(other.rejected[0][1]), (early, stage)
        assert other.rejected[0][1].blame == "p0"
    for early, stage in (("confirm", "share"), ("upload", "advertise")):
        other = network(3).open()
        other.hooks["down", stage] = lambda name, raw, e=early: sent["down", e, name] if name == "p0" else raw
        other.round(VECTORS)
        assert other.refused["p0"].blame == "the server"


def test_a_stranger_is_not_heard(network: Make) -> None:
    net = network(3).open()
    with pytest.raises(FaultyPartyError, match="mallory: is not in the roster"):
        net.session.begin(1).receive("mallory", b"")


# ---------------------------------------------------------------- two different things signed


def test_a_party_that_signs_two_different_keys_for_one_round(network: Make) -> None:
    net = network(3).open()
    stage = net.session.begin(1)
    for mask in (x25519_public(b"a" * 32), x25519_public(b"b" * 32)):
        signed = signing.advertise(net.session.terms.session, 1, 0, mask, mask)
        signature = ed25519_sign(net.identities["p0"], signed)
        message = messages.Advertise(net.session.terms.session[:16], 1, mask, mask, signature)
        if mask == x25519_public(b"a" * 32):
            stage.receive("p0", messages.encode(message))
            continue
        with pytest.raises(FaultyPartyError, match="p0: sent a second Advertise, and not the same") as caught:
            stage.receive("p0", messages.encode(message))
        assert caught.value.blame == "p0"


def test_a_party_that_signs_two_sets_of_survivors(network: Make) -> None:
    net = network(4, corrupt=1).open()
    stage, states = net.round(VECTORS, until="upload")
    confirming, outbox = stage.close()
    _, honest = states["p0"].confirm(outbox["p0"])
    confirming.receive("p0", honest)
    signed = signing.confirm(net.session.terms.session, 1, 0, b"\x07")
    other = with_(parse(honest), signature=ed25519_sign(net.identities["p0"], signed))
    with pytest.raises(FaultyPartyError, match="p0: sent a second Confirm, and not the same"):
        confirming.receive("p0", messages.encode(other))
    signed = signing.confirm(net.session.terms.session, 1, 1, b"\x07")
    other = with_(parse(honest), signature=ed25519_sign(net.identities["p1"], signed))
    with pytest.raises(FaultyPartyError, match="p1: its confirmation is not a signature on the set"):
        confirming.receive("p1", messages.encode(other))
