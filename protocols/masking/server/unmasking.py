"""The server's last step: from revealed shares to secrets, from secrets to masks, and who lied if that fails.

Every share was committed to by its dealer and the commitment checked by its holder when it opened the packet. A holder
that could not says so before anything is revealed: that is the dealer's fault or its own, and it is no holder then. So
a revealed share that does not fit the commitment is the *holder's* fault, and shares that all fit and still give a
secret other than the dealer claimed (by its public key, or by the commitment to its seed) are the *dealer's*.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from choral.protocols.crypto.keys import PrivateKey, WeakKeyError
from choral.protocols.crypto.mask_stream import add_mask
from choral.protocols.crypto.modular_integers import lift
from choral.protocols.crypto.shamir import Combiner, ShareError
from choral.protocols.errors import DisputedSharesError, FaultyPartyError, TooFewSurvivorsError
from choral.protocols.interface import IntVector
from choral.protocols.masking import messages, signing


@dataclass(frozen=True)
class Commitments:
    """What the parties that shared their secrets are bound to. Edges are (dealer, holder); all of it is public.

    keys: public mask keys. seed_commitments: to self-mask seeds. seed_hashes, key_hashes: to the shares.
    """

    keys: Mapping[int, bytes]
    seed_commitments: Mapping[int, bytes]
    seed_hashes: Mapping[tuple[int, int], bytes]
    key_hashes: Mapping[tuple[int, int], bytes]


class Tally:
    """One round's reconstruction. ``graph`` is each party's neighbours; those with commitments shared their secrets."""

    def __init__(
        self,
        setup: messages.SumSetup,
        graph: Sequence[tuple[int, ...]],
        session: bytes,
        number: int,
        bound: Commitments,
        begun: bytes,
    ) -> None:
        self._setup = setup
        self._graph = graph
        self._session = session
        self._number = number
        self._bound = bound
        self._begun = begun
        self._combiners: dict[tuple[int, ...], Combiner] = {}
        self.unopened: Mapping[int, frozenset[int]] = {}
        """By holder, the dealers whose packet to it did not open, as it says."""

    def check_reachable(self, survivors: Sequence[int], answering: Iterable[int]) -> None:
        """Raises TooFewSurvivorsError when ``answering`` parties hold too few shares of a secret that is needed."""
        present = set(answering)
        alive = set(survivors)
        for dealer in (*survivors, *self._dropped(survivors)):
            self._holders(dealer, present, dealer in alive)

    def dealers(self, holder: int) -> list[int]:
        """The neighbours that shared their secrets with ``holder``, ascending."""
        return [peer for peer in self._graph[holder] if peer in self._bound.keys]

    def disputes(self) -> dict[str, tuple[str, ...]]:
        """By dealer, who says that its shares do not open; names."""
        dealers = sorted(set().union(*self.unopened.values()))
        return {self._setup.roster[dealer]: self._accusers(dealer) for dealer in dealers}

    def _accusers(self, dealer: int) -> tuple[str, ...]:
        return tuple(self._setup.roster[holder] for holder, unopened in self.unopened.items() if dealer in unopened)

    def check(self, party: int, message: messages.Unmask, survivors: Sequence[int]) -> None:
        """One holder's answer. Raises FaultyPartyError unless it is exactly the shares asked for, as committed to."""
        alive = set(survivors)
        unopened = self.unopened.get(party, frozenset())
        dealers = [peer for peer in self.dealers(party) if peer not in unopened]
        own = [party] if self._setup.complete else []
        if [entry.party for entry in message.seeds] != sorted([*(peer for peer in dealers if peer in alive), *own]):
            raise self._fault(party, "its shares of seeds are not one for each surviving neighbour, in order")
        if [entry.party for entry in message.keys] != [peer for peer in dealers if peer not in alive]:
            raise self._fault(party, "its shares of keys are not one for each dropped neighbour, in order")
        kinds = (("seed", message.seeds, self._bound.seed_hashes), ("key", message.keys, self._bound.key_hashes))
        for kind, entries, hashes in kinds:
            for entry in entries:
                found = signing.share_hash(self._session, self._number, kind, entry.party, party, entry.share)
                if found != hashes[entry.party, party]:
                    dealer = self._setup.roster[entry.party]
                    raise self._fault(party, f"its share of {dealer}'s {kind} is not the one that {dealer} gave it")

    def unmask(self, total: Any, survivors: Sequence[int], answers: Mapping[int, messages.Unmask]) -> IntVector:
        """Take all masks off ``total`` in place; the centred lift. Raises TooFewSurvivorsError, FaultyPartyError."""
        alive = set(survivors)
        seeds = {holder: {entry.party: entry.share for entry in answer.seeds} for holder, answer in answers.items()}
        keys = {holder: {entry.party: entry.share for entry in answer.keys} for holder, answer in answers.items()}
        # All secrets first: a corrupt one is found before hours of masks are computed from the others.
        seed_of = {dealer: self._seed(dealer, seeds) for dealer in survivors}
        key_of = {dealer: self._key(dealer, keys) for dealer in self._dropped(survivors)}
        for seed in seed_of.values():
            add_mask(total, seed, subtract=True)
        for dealer, private in key_of.items():
            for peer in self._graph[dealer]:
                if peer in alive:
                    add_mask(total, self._pair(private, dealer, peer), subtract=dealer < peer)
        return lift(total, self._setup.modulus_bits)

    def _dropped(self, survivors: Sequence[int]) -> Iterator[int]:
        """Who shared its secrets, sent no vector, and has masks in the sum of those who did."""
        alive = set(survivors)
        for dealer in self._bound.keys:
            if dealer not in alive and alive.intersection(self._graph[dealer]):
                yield dealer

    def _holders(self, dealer: int, present: set[int], survived: bool) -> tuple[int, ...]:
        """The first ``threshold`` of the holders that are present."""
        holders = [
            peer
            for peer in self._graph[dealer]
            if peer in present
            and (dealer, peer) in self._bound.key_hashes
            and dealer not in self.unopened.get(peer, ())
        ]
        if survived and self._setup.complete and dealer in present:
            holders = sorted([*holders, dealer])
        if len(holders) < self._setup.threshold:
            self._check_disputed(dealer, len(holders))
            raise TooFewSurvivorsError(
                f"too few hold a share of {self._setup.roster[dealer]}'s secret",
                survivors=len(holders),
                needed=self._setup.threshold,
            )
        return tuple(holders[: self._setup.threshold])

    def _check_disputed(self, dealer: int, holders: int) -> None:
        """Say so when a secret is out of reach only because holders accuse its dealer: one of them did it."""
        accusers = self._accusers(dealer)
        name, needed = self._setup.roster[dealer], self._setup.threshold
        if holders + len(accusers) < needed:
            return
        if len(accusers) > self._setup.corrupt:
            who = ", ".join(accusers)
            raise self._fault(
                dealer,
                f"the shares that it dealt do not open, say {who}: more than the {self._setup.corrupt} that may lie",
            )
        raise DisputedSharesError(name, accusers, survivors=holders, needed=needed)

    def _seed(self, dealer: int, shares: Mapping[int, Mapping[int, bytes]]) -> bytes:
        seed = self._combine(dealer, shares, survived=True)
        found = signing.seed_commitment(self._session, self._number, dealer, seed)
        if found != self._bound.seed_commitments[dealer]:
            raise self._fault(dealer, "its shares give another self-mask seed than it had committed to")
        return seed

    def _key(self, dealer: int, shares: Mapping[int, Mapping[int, bytes]]) -> PrivateKey:
        private = PrivateKey(self._combine(dealer, shares, survived=False))
        if private.public() != self._bound.keys[dealer]:
            raise self._fault(dealer, "its shares give another mask key than it had advertised")
        return private

    def _combine(self, dealer: int, shares: Mapping[int, Mapping[int, bytes]], *, survived: bool) -> bytes:
        holders = self._holders(dealer, set(shares), survived)
        combiner = self._combiners.get(holders)
        if combiner is None:
            indices = [holder + 1 for holder in holders]
            combiner = self._combiners[holders] = Combiner(indices, self._setup.threshold)
        try:
            return combiner.combine([shares[holder][dealer] for holder in holders])
        except ShareError:
            raise self._fault(dealer, "the shares that it dealt combine to no secret") from None

    def _pair(self, private: PrivateKey, dealer: int, peer: int) -> bytes:
        try:
            shared = private.shared(self._bound.keys[peer])
        except WeakKeyError:
            raise self._fault(peer, "signed an unusable key") from None
        return signing.pair_seed(shared, self._session, self._number, dealer, peer, self._begun)

    def _fault(self, party: int, what: str) -> FaultyPartyError:
        return FaultyPartyError(self._setup.roster[party], what)
