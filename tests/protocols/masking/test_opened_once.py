"""Parties of one process read and check what opens their session once, and refuse what each would refuse by itself."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from choral.protocols import Masked, SumSpec
from choral.protocols.crypto.keys import ed25519_public
from choral.protocols.errors import FaultyServerError, PolicyError, ProtocolError
from choral.protocols.masking import messages, signing
from choral.protocols.masking import party as steps
from choral.protocols.masking.party import join
from choral.protocols.masking.server.opening import Opening
from choral.protocols.masking.signing import Signatures

Make = Callable[..., Any]
with_ = msgspec.structs.replace


def replaced(entries: tuple[Any, ...], place: int, entry: Any) -> tuple[Any, ...]:
    return (*entries[:place], entry, *entries[place + 1 :])


EDITS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "a commitment": (
        "hello",
        lambda told: with_(told, hellos=replaced(told.hellos, 1, with_(told.hellos[1], commitment=b"m" * 32))),
    ),
    "a signature": (
        "hello",
        lambda told: with_(told, hellos=replaced(told.hellos, 1, with_(told.hellos[1], signature=b"m" * 64))),
    ),
    "a Hello too few": ("hello", lambda told: with_(told, hellos=told.hellos[:-1])),
    "Hellos of another session": ("hello", lambda told: with_(told, session=b"another session!")),
    "a nonce": ("reveal", lambda told: with_(told, nonces=replaced(told.nonces, 1, b"x" * 32))),
    "a nonce too few": ("reveal", lambda told: with_(told, nonces=told.nonces[:-1])),
    "nonces of another session": ("reveal", lambda told: with_(told, session=b"another session!")),
}


@pytest.mark.parametrize("what", EDITS)
@pytest.mark.parametrize("victim", ["p0", "p2", "p3"])
def test_who_is_shown_something_else_refuses_whatever_the_others_accepted(
    network: Make, what: str, victim: str
) -> None:
    stage, edit = EDITS[what]
    net = network(4)
    net.signatures.shared = True

    def shown(name: str, raw: bytes) -> bytes:
        if name != victim:
            return raw
        return messages.encode(edit(messages.to_party(raw, limit=1 << 20)))

    net.hooks["down", stage] = shown
    if stage == "hello":
        with pytest.raises(ProtocolError, match=victim):
            net.open()  # its nonce is missing
    else:
        net.open()
        assert set(net.members) == {"p0", "p1", "p2", "p3"} - {victim}
    assert set(net.refused) == {victim}


def test_a_party_whose_own_hello_was_replaced_refuses_what_the_others_accepted(network: Make) -> None:
    """Signed with its stolen identity, so that to everybody else it is a Hello like any other."""
    net = network(4)
    net.signatures.shared = True

    def swap(name: str, raw: bytes) -> bytes:
        del name
        told = messages.to_party(raw, limit=1 << 20)
        digest = signing.setup_digest(messages.encode(net.setup))
        mine = messages.HelloEntry(b"m" * 32, signing.sign(net.identities["p2"], signing.hello(digest, 2, b"m" * 32)))
        return messages.encode(with_(told, hellos=replaced(told.hellos, 2, mine)))

    net.hooks["down", "hello"] = swap
    with pytest.raises(ProtocolError, match="p2"):
        net.open()
    assert set(net.refused) == {"p2"}
    assert "another Hello of this party" in str(net.refused["p2"])


def test_each_party_goes_by_the_keys_that_it_has_pinned_itself(network: Make) -> None:
    """One has another key for p1 than the others, who accepted the same bytes a moment before."""
    net = network(3)
    shared = Signatures(shared=True)
    other = {**net.directory, "p1": ed25519_public(secrets.token_bytes(32))}
    opening = Opening(net.setup, net.directory, net.signatures)
    states = {}
    for name in net.names:
        policy = replace(net.policy, directory=other if name == "p2" else net.directory, signatures=shared)
        states[name], hello = join(
            opening.invitation,
            name=name,
            identity=net.identities[name],
            policy=policy,
            randomness=secrets.token_bytes,
        )
        opening.receive(name, hello)
    _, outbox = opening.close()
    states["p0"].reveal(outbox["p0"])
    states["p1"].reveal(outbox["p1"])
    with pytest.raises(FaultyServerError, match="Hello of p1 is not signed"):
        states["p2"].reveal(outbox["p2"])


def test_each_party_holds_a_setup_against_its_own_policy(network: Make) -> None:
    net = network(5, corrupt=1)
    shared = Signatures(shared=True)
    raw = messages.encode(net.setup)

    def joined(name: str, **terms: Any) -> Any:
        policy = replace(net.policy, signatures=shared, **terms)
        return join(raw, name=name, identity=net.identities[name], policy=policy, randomness=secrets.token_bytes)

    joined("p0")
    with pytest.raises(PolicyError, match="corrupt"):
        joined("p1", corrupt=2)
    with pytest.raises(PolicyError, match="length"):
        joined("p2", maximum_length=2)
    joined("p3")


def test_an_unsafe_setup_is_refused_by_everyone(network: Make) -> None:
    net = network(5, corrupt=1)
    raw = messages.encode(with_(net.setup, threshold=2))
    policy = replace(net.policy, signatures=Signatures(shared=True))
    for name in net.names:
        with pytest.raises(PolicyError, match=r"threshold|2t"):
            join(raw, name=name, identity=net.identities[name], policy=policy, randomness=secrets.token_bytes)


def test_what_all_are_sent_alike_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty parties look at forty Hellos once: what is hashed and decoded grows with the parties, not their square."""
    n, made = 40, dict.fromkeys(("hello", "commitment", "ring"), 0)

    def counted(what: str, honest: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **more: Any) -> Any:
            made[what] += 1
            return honest(*arguments, **more)

        return step

    monkeypatch.setattr(signing, "hello", counted("hello", signing.hello))
    monkeypatch.setattr(signing, "commitment", counted("commitment", signing.commitment))
    monkeypatch.setattr(steps, "ring_of", counted("ring", steps.ring_of))
    names = tuple(f"p{place}" for place in range(n))
    session: Any = Masked(corrupt=1, dropouts=1).open(SumSpec(parties=names, length=3, bound=5))
    session.begin()
    # A party signs its Hello and looks at its own commitment; the server and, once for all, the parties check each.
    assert made == {"hello": 3 * n, "commitment": 4 * n, "ring": 1}
    assert session._signatures._alike
    session.begin()
    assert not session._signatures._alike  # nothing of it is kept


def test_one_who_shares_with_nobody_keeps_nothing_and_a_refusal_is_never_kept() -> None:
    calls: list[int] = []

    def check(value: int) -> int:
        calls.append(value)
        if value < 0:
            raise FaultyServerError("refused")
        return value

    alone, shared = Signatures(), Signatures(shared=True)
    for _ in range(3):
        assert alone.once("a", lambda: check(1)) == shared.once("a", lambda: check(2)) - 1 == 1
    assert calls == [1, 2, 1, 1]
    assert not alone._alike
    for _ in range(2):
        with pytest.raises(FaultyServerError):
            shared.once("b", lambda: check(-1))
    assert calls[-2:] == [-1, -1]
    for place in range(100):
        assert shared.once(place, lambda place=place: check(place)) == place  # type: ignore[misc]
    assert len(shared._alike) <= Signatures._ALIKE
    assert shared.once("a", lambda: check(7)) == 7  # it was crowded out
