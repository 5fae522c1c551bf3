"""What one party alone has: coordinates of the sums to which few parties contributed, as the rehearsal counted them.

A sum hides nothing where one party alone is not zero: there it is that party's value. A run whose sums leave such
coordinates out is held to that; of another it is said how many there were.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from choral.audits.findings.schema import Check

if TYPE_CHECKING:
    from choral.trainers.run_folder.run import Run

NAME = "No coordinate is of fewer parties than the sum promises"


def contributor_checks(run: Run) -> list[Check]:
    """One check where a round was counted; none where nothing was."""
    counted = [entry.contributed for entry in run.history if entry.contributed is not None]
    if not counted or not (moved := sum(each["moved"] for each in counted)):
        return []
    one, few, shown_one, shown_few = (
        sum(each[key] for each in counted) for key in ("one", "few", "shown_one", "shown_few")
    )
    least, promised = counted[-1]["least"], (run.info.secure_sum or {}).get("contributors")
    of = f"Of {moved:,} coordinates that parties moved, over all rounds,"
    if promised is None:
        if not few:
            return []
        finding = (
            f"{of} {shown_one:,} ({shown_one / moved:.1%}) were published as one party's alone, and {shown_few:,}"
            f" ({shown_few / moved:.1%}) as those of fewer than {least}: there the sum is their value. No threshold was"
            " promised; Masked(contributors=...) leaves them out."
        )
        return [Check(name=NAME, verdict="holds", finding=finding, refutable=False)]
    finding = (
        f"{of} {one:,} were one party's alone and {few:,} of fewer than {promised}: {few - shown_few:,} of these were"
        f" left out, {shown_few:,} published."
    )
    return [Check(name=NAME, verdict="violated" if shown_few or least != promised else "holds", finding=finding)]
