"""The server of the split-key sum as trips: those of the masked sum of keys; ciphertexts come with the keys."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from choral.protocols.driver import RoundTerms, Trip
from choral.protocols.errors import FaultyPartyError, LateVectorError
from choral.protocols.homomorphic.messages import Ciphertext
from choral.protocols.homomorphic.split.party_and_server import Collector, SplitRound
from choral.protocols.homomorphic.split.party_driver import chosen, key_spec
from choral.protocols.interface import SumSpec, check_spec
from choral.protocols.masking.messages import Upload
from choral.protocols.masking.server.driver import NO_TRAINING, MaskedServerDriver, ServerContext, among
from choral.protocols.wire_format import claims_to_be

if TYPE_CHECKING:
    from choral.protocols.masking.masked import Masked


class SplitServerDriver(MaskedServerDriver):
    """See :class:`choral.protocols.driver.ServerDriver`. A party's key is let in only after its whole ciphertext."""

    def __init__(self, keys: Masked, spec: SumSpec, context: ServerContext) -> None:
        check_spec(spec)
        self._long = spec
        self.parameters = chosen(spec)
        super().__init__(keys, key_spec(self.parameters), context)

    def _spec_for(self, roster: tuple[str, ...]) -> SumSpec:
        self.parameters = chosen(among(self._long, roster))
        return key_spec(self.parameters)

    def round(self, terms: RoundTerms = NO_TRAINING, *, lost: Iterable[str] = ()) -> Iterator[Trip]:
        """See :class:`choral.protocols.driver.ServerDriver`. Raises: GarbledSumError too."""
        of_round = SplitRound(parameters=self.parameters, session=self.digest, number=self.number + 1)
        collector = Collector(of_round, self.setup.roster)
        included: set[str] = set()
        for trip in super().round(terms, lost=lost):
            self._take_ciphertexts(trip, collector, included)
            yield trip
        if self.result is not None:
            keys, self.result = self.result, None
            self.result = replace(keys, total=collector.open(keys.total, keys.survivors))

    def _take_ciphertexts(self, trip: Trip, collector: Collector, included: set[str]) -> None:
        """Have a trip take ciphertexts too, and let a party's key in together with its ciphertext."""
        take_key = trip.take

        def take(sender: str, raw: bytes) -> None:
            if claims_to_be(Ciphertext, raw):
                if sender in included:
                    return
                if trip.step != "vector":
                    raise LateVectorError(sender)
                try:
                    collector.receive(sender, raw)
                except FaultyPartyError:
                    if not collector.repeats(sender, raw):
                        raise
                self._traffic.up(sender, raw)
                return
            asked = trip.step == "vector" and sender in trip.waiting
            if asked and claims_to_be(Upload, raw) and not collector.complete(sender):
                raise FaultyPartyError(sender, "sent its key before its whole ciphertext")
            take_key(sender, raw)
            if asked and sender not in trip.waiting:
                collector.include(sender)
                included.add(sender)

        trip.take = take
