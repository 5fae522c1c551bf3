"""What a report says of its runs as a whole: which manifests bind them, and what all of them cost together."""

from __future__ import annotations

import msgspec


class CitedManifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A run's manifest, as a report cites it. sha256: of its file. signed: by how many, its writer among them; gone:
    parties that did not. rehearsal: one operator made all keys; signatures say just that the files belong together."""

    sha256: str
    run: str
    signed: int
    gone: tuple[str, ...] = ()
    rehearsal: bool


class Composed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What all private trainings that a report shows cost together, for whoever reads all of it.

    unit: whose presence it is of. runs: trainings on the same records. single: the most that one of them cost, for who
    reads one model. epsilon: of all at ``delta``, for the data owner with the most (``owner``); None where not every
    ledger is there, or they are of unlike neighbour relations.
    """

    unit: str
    runs: int
    delta: float
    single: float
    owner: str = ""
    epsilon: float | None = None
