"""What a masked sum says of itself, for reports; and what a party saw of a round, for its receipt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from choral.protocols.driver import Agreed
from choral.protocols.masking import messages, signing
from choral.protocols.masking.parameters import Parameters
from choral.protocols.masking.party_round import Membership

CIPHER_BITS = 128
"""Of AES-128, X25519, Ed25519 and SHA-256 commitments: no choice of neighbours makes the whole stronger."""

COHORT_TRUST = {
    "everyone": "",
    "chosen": " The server chose this roster out of all parties, and so may have put every one that colludes into it.",
    "random": (
        " The server is taken to be semi-honest in the choice of the cohort: that it drew the roster at random is taken"
        " on its word, and one that picks colluders by hand reads single vectors."
    ),
}
"""What is said of each way to make a roster."""


def statement_of(setup: messages.SumSetup, chosen: Parameters) -> Mapping[str, Any]:
    """JSON-able facts of a session with this setup. chosen: what its threshold and graph achieve."""
    server = "may do whatever it likes" if setup.server == "malicious" else "follows the protocol"
    return {
        "name": "masked",
        "trust": (
            f"The server {server} and may collude with up to {setup.corrupt} of {len(setup.roster)} parties:"
            f" together they learn the sum over the survivors, at least {setup.min_survivors} parties, and no"
            f" single vector of the others.{COHORT_TRUST[setup.cohort]} Each party trusts its pinned directory of"
            " identities, which in this in-process run was made by the process itself."
        ),
        "server_learns": "the sum over the survivors, who they are, and who dropped out",
        "server": setup.server,
        "parties": len(setup.roster),
        "threshold": setup.threshold,
        "neighbours": setup.neighbours,
        "graph": "complete" if setup.complete else "Harary",
        "corrupt": setup.corrupt,
        "directory": setup.population,
        "cohort": setup.cohort,
        "dropouts": setup.dropouts,
        "min_survivors": setup.min_survivors,
        "security_bits": round(min(CIPHER_BITS, chosen.security_bits), 1),
        "correctness_bits": round(chosen.correctness_bits, 1) if chosen.correctness_bits < CIPHER_BITS else None,
        "modulus_bits": setup.modulus_bits,
        "encoding": setup.encoding,
        "ciphers": {
            "mask stream": "AES-128-CTR",
            "key agreement": "X25519",
            "signatures": "Ed25519",
            "sealed shares": "ChaCha20-Poly1305",
            "derivation": "HKDF-SHA-256",
            "secret sharing": "Shamir over 2^256 + 297",
        },
        "protocol_version": messages.VERSION,
    }


def agreed_of(
    member: Membership, begin: bytes, bitmap: bytes, confirmed: Sequence[messages.Confirmation], setup: bytes
) -> Agreed:
    """What a party may put into its receipt. confirmed: what it verified of the set in `bitmap`. setup: encoded."""
    roster = member.setup.roster
    alive = messages.from_bitmap(bitmap, len(roster)) if confirmed else None
    return Agreed(
        begin=begin,
        setup=signing.setup_digest(setup),
        session=member.session,
        roster=roster,
        survivors=None if alive is None else tuple(roster[place] for place in sorted(alive)),
        keys={roster[entry.party]: member.key(entry.party) for entry in confirmed},
        signatures={roster[entry.party]: entry.signature for entry in confirmed},
    )
