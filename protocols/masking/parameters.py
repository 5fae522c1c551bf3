"""How many neighbours, which threshold: (k, t) for n parties, of whom some collude and some drop out.

Who is protected against what (Google's names in brackets):

- ``semi-honest`` (CURIOUS_SERVER): the server follows the protocol and pools what it sees with up to ``corrupt``
  parties. Needs that no party has t colluding share holders.
- ``malicious`` (SEMI_MALICIOUS_SERVER): the server may also ask different share holders for different secrets of one
  party, the self mask here and the pairwise key there, which together unmask it. Colluders answer both questions,
  honest holders one: needs 2t > holders + colluding holders. That the keys are genuine, all parties see one survivor
  set and the graph's seed is not the server's alone is not a matter of (k, t): the protocol's signatures, its
  consistency round and its joint seed see to it.

Two regimes:

- the **complete graph**, for up to COMPLETE_UP_TO parties and wherever no sparser graph suffices: everyone, the party
  itself included, holds a share, so holders = n and k = n - 1. Security and correctness are certain, not statistical,
  within the stated numbers (Bonawitz et al. 2017, theorems 6.3 and 6.5).
- the **Harary graph** above it, on a random ring (:mod:`choral.protocols.masking.graph`): the k neighbours alone hold
shares
  (holders = k). The smallest even k, and for it the smallest t, such that
  (1) the graph of honest survivors is disconnected with probability < 2^-(security_bits + 1);
  (2) *some* party has too many colluding neighbours with probability < 2^-(security_bits + 1);
  (3) *some* party has fewer than t surviving neighbours with probability < 2^-correctness_bits;
  (4) against a malicious server, *some* two disjoint runs of k/2 places on the ring have t - k/2 or more colluders
  each, with probability < 2^-(security_bits + 1).
  The neighbours of one party that are marked (corrupt, surviving) are hypergeometric, and (2) and (3) are union bounds
  over n parties; (1) is a union bound over the pairs of gaps of k/2 that cut a ring (Bell et al. 2020, sections 3.3
  to 3.5), (4) over the pairs of runs. (1) to (3) are the rule of Google's graph_parameter_finder (federated-compute,
  fcp/secagg/server), which is :func:`harary`; tests/protocols/masking/test_parameters.py reproduces its published
  table.
  :func:`choose` adds (4), and raises k and t until it holds too.

Why (4). (1) takes which parties drop out as independent of the ring, but a malicious server sees the ring, declares
dropped whom it likes, and may show two groups of honest parties two different sets. Say that two such groups A and B
both unmask, with no mask between them, and follow the ring from a party u of A to the next member v of B. Each has t
holders in its own group or corrupt. When k/2 or more places lie between them, those next to u hold at most corrupt
holders of u, at least t - k/2 of them as the other side has k/2 places only. When fewer do, then adding up both
parties' holders gives 2t - k <= c(u) + c(v), where c(u) counts the corrupt among the k/2 places after u and c(v) among
those before v: one of the two runs has t - k/2. The ring passes from A to B and back, so there are two such runs; that
they are disjoint is checked exhaustively on small rings in tests/protocols/masking/test_parameters.py.

(2) and (4) depend on the graph and on who is corrupt only: they happen or not once per session. (1) and (3) depend on
who drops out: once per round.

The smallest sufficient t is taken in both regimes: it is as secure as was asked for and leaves the most room for
dropouts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

from choral.protocols import argument_checks as checks
from choral.protocols.errors import SpecError

COMPLETE_UP_TO = 64
"""Parties up to which everyone masks with everyone."""
MAX_PARTIES = 1_000_000
SECURITY_BITS = 40
CORRECTNESS_BITS = 20

Server = Literal["semi-honest", "malicious"]
SERVERS: tuple[Server, ...] = get_args(Server)

Cohort = Literal["everyone", "chosen", "random"]
"""How a roster came about: all parties of the directory; those that the server chose; those that it drew at random."""
COHORTS: tuple[Cohort, ...] = get_args(Cohort)


class InfeasibleError(SpecError):
    """No threshold withstands that many corrupt parties and that many dropouts at once."""


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """What :func:`choose` chose, and what it achieves.

    parties: n. neighbours: k, how many others each party masks with. threshold: t, shares needed for a secret.
    holders: how many parties hold shares of each secret: n on the complete graph (the party itself is one of them), k
        on a Harary graph (it is not).
    corrupt, dropouts: the absolute numbers withstood. server: see the module.
    security_bits, correctness_bits: -log2 of the bound on the probability that the choice is insecure (against a
        malicious server in a session, against a semi-honest one in a round), or that a round fails, within those
        numbers; infinite on the complete graph.
    """

    parties: int
    neighbours: int
    threshold: int
    holders: int
    corrupt: int
    dropouts: int
    server: Server
    security_bits: float
    correctness_bits: float

    @property
    def complete(self) -> bool:
        """Whether everyone masks with everyone."""
        return self.neighbours == self.parties - 1


def choose(
    n: int,
    *,
    corrupt: float | int,
    dropouts: float | int,
    server: Server,
    security_bits: float = SECURITY_BITS,
    correctness_bits: float = CORRECTNESS_BITS,
) -> Parameters:
    """The cheapest safe parameters for ``n`` parties.

    n: 2 to 1,000,000. corrupt, dropouts: an int is a number of parties, a float in [0, 1) a fraction of n, rounded
    *up*: 5 % of 10 parties is one party, not none. At least two parties must be honest.
    security_bits, correctness_bits: > 0; see the module. The complete graph meets any.

    Raises: SpecError for a value outside these ranges; InfeasibleError, saying what would be feasible, when not even
    the complete graph withstands the numbers.
    """
    n = checks.whole(n, "parties", 2, MAX_PARTIES)
    checks.one_of(server, "server", SERVERS)
    if checks.positive(security_bits, "security_bits") > 128 or checks.positive(correctness_bits, "bits") > 128:
        raise SpecError(f"expected 0 < bits <= 128, got security {security_bits} and correctness {correctness_bits}")
    bad = _count(corrupt, n, "corrupt")
    gone = _count(dropouts, n, "dropouts")
    if n - bad < 2:
        raise InfeasibleError(
            f"{bad} corrupt of {n} parties leave fewer than 2 honest ones, whose sum is one party's own value",
            hint=f"allow for at most {n - 2} corrupt parties",
        )
    complete = _complete(n, bad, gone, server)
    if n <= COMPLETE_UP_TO:
        return complete
    return harary(n, bad, gone, server, security_bits, correctness_bits, split=True) or complete


def harary(
    n: int,
    corrupt: int,
    dropouts: int,
    server: Server,
    security_bits: float = SECURITY_BITS,
    correctness_bits: float = CORRECTNESS_BITS,
    *,
    split: bool = False,
) -> Parameters | None:
    """The Harary graph's parameters, or None when no k < n - 1 will do. Arguments as for :func:`choose`, counted.

    split: whether event (4) counts too, against a malicious server; the published finder does not know it.
    """
    split = split and server == "malicious"
    log_event = -(security_bits + 1) * math.log(2)
    log_party = log_event - math.log(n)
    log_failure = -correctness_bits * math.log(2) - math.log(n)
    for k in range(2, n - 1, 2):
        disconnected = _log_disconnected(n, k, corrupt + dropouts)  # (1)
        if disconnected >= log_event:
            continue
        many_corrupt = _log_tails(n, corrupt, k)  # (2) [j]: log Pr[at least j corrupt neighbours]
        withstood = int(np.argmax(many_corrupt < log_party)) - 1  # more than this many is the bad event
        # t > c, or against a malicious server 2t > k + c, for c colluding neighbours as many as are withstood
        threshold = max(2, withstood + 1 if server == "semi-honest" else (k + withstood) // 2 + 1)
        many_gone = _log_tails(n, dropouts, k)  # (3): fewer than t of k are left exactly if k - t + 1 or more are gone
        while (
            split and many_gone[k - threshold + 1] < log_failure and _log_split(n, k, threshold, corrupt) >= log_event
        ):
            threshold += 1
        if many_gone[k - threshold + 1] >= log_failure:  # [0] is certain: a threshold of k + 1 fails too
            continue
        # What reaches it is lost: t colluders alone; against a malicious server 2t - k, which with k - t honest holders
        # of one answer and as many of the other reach t twice.
        tolerable = threshold if server == "semi-honest" else 2 * threshold - k
        cut = _log_split(n, k, threshold, corrupt) if split else disconnected
        # The union bound over the cut and n parties: Pr <= Pr[cut] + n Pr[X >= tolerable]
        insecure = np.logaddexp(cut, math.log(n) + many_corrupt[min(tolerable, k + 1)])
        return Parameters(
            parties=n,
            neighbours=k,
            threshold=threshold,
            holders=k,
            corrupt=corrupt,
            dropouts=dropouts,
            server=server,
            security_bits=_bits(float(insecure)),
            correctness_bits=_bits(math.log(n) + float(many_gone[k - threshold + 1])),
        )
    return None


def achieved(
    n: int, neighbours: int, threshold: int, *, corrupt: int, dropouts: int, server: Server
) -> tuple[float, float]:
    """The security and the correctness bits of a sparse graph that somebody else chose; O(k) time.

    Security is by (2) and (4) against a malicious server, by (1) and (2) against a semi-honest one; correctness by (3).
    All numbers are counts; 2 <= threshold <= neighbours < n - 1.
    """
    malicious = server == "malicious"
    lost = 2 * threshold - neighbours if malicious else threshold
    exposed = math.log(n) + float(_log_tails(n, corrupt, neighbours)[max(lost, 0)])
    even = neighbours - neighbours % 2
    cut = _log_split(n, neighbours, threshold, corrupt) if malicious else _log_disconnected(n, even, corrupt + dropouts)
    failed = math.log(n) + float(_log_tails(n, dropouts, neighbours)[neighbours - threshold + 1])
    return _bits(float(np.logaddexp(cut, exposed))), _bits(failed)


def least_threshold(n: int, corrupt: int, server: Server) -> int:
    """The least t that is safe on the complete graph of n parties; the module says why."""
    # 2t > n + n_corrupt (Bonawitz et al. 2017, theorem 6.5), t > n_corrupt (theorem 6.3)
    return max(2, (n + corrupt) // 2 + 1 if server == "malicious" else corrupt + 1)


def _complete(n: int, corrupt: int, dropouts: int, server: Server) -> Parameters:
    malicious = server == "malicious"
    threshold = least_threshold(n, corrupt, server)
    if threshold > n - dropouts:
        fewer_gone = n - threshold
        fewer_bad = n - 2 * dropouts - 1 if malicious else n - dropouts - 1
        options = [f"at most {fewer_gone} dropouts with {corrupt} corrupt"] if fewer_gone >= 0 else []
        options += [f"at most {fewer_bad} corrupt with {dropouts} dropouts"] if 0 <= fewer_bad < corrupt else []
        raise InfeasibleError(
            f"{corrupt} corrupt and {dropouts} dropouts of {n} parties cannot both be withstood with a {server} server",
            hint="; or ".join(options) or f"with {n} parties and a {server} server nothing can be withstood",
        )
    return Parameters(
        parties=n,
        neighbours=n - 1,
        threshold=threshold,
        holders=n,
        corrupt=corrupt,
        dropouts=dropouts,
        server=server,
        security_bits=math.inf,
        correctness_bits=math.inf,
    )


def _count(value: float | int, n: int, what: str) -> int:
    value = checks.share(value, what)
    if isinstance(value, int) and value >= n:
        raise SpecError(f"expected {what} from 0 to {n - 1}, got {value}")
    return counted(value, n)


def counted(value: float | int, n: int) -> int:
    """An int as it is; a fraction of ``n`` rounded up, as it is written in decimal: 0.07 x 100 is 7 and not 8."""
    return value if isinstance(value, int) else math.ceil(Fraction(repr(float(value))) * n)


def colluding(corrupt: float | int, directory: int, roster: int, cohort: Cohort) -> int:
    """How many colluders a roster must withstand that was taken from a directory of so many parties.

    corrupt: a count as it is, whatever the roster. A fraction is of the *directory*, rounded up: of a roster it would
    mean nothing, since a server that picks the roster may put every colluder of the directory into a small one.

    cohort: "everyone" and "chosen": all of them may be in the roster (or as many as it has). "random": the roster is a
    uniform draw that the colluders did not influence, which is taken on trust: of ``directory`` parties with that
    fraction of colluders no more than this are in it, but for a chance of 2^-SECURITY_BITS, per draw (hypergeometric
    tail). Only a fraction gets smaller by a draw; a count is an absolute statement about whoever is in the roster.

    Raises: SpecError for a roster that the directory has no room for.
    """
    if not 2 <= roster <= directory:
        raise SpecError(f"expected a roster of 2 to {directory} parties, as many as there are, got {roster}")
    if isinstance(corrupt, int):
        return corrupt
    there = counted(corrupt, directory)
    if cohort != "random":
        return min(there, roster)
    tails = _log_tails(directory, there, roster)
    beyond = int(np.argmax(tails < -SECURITY_BITS * math.log(2)))  # the least j with Pr[X >= j] below it
    return min(beyond - 1, there, roster)


def _log_disconnected(n: int, k: int, bad: int) -> float:
    """log of a bound on Pr[removing ``bad`` random nodes cuts the ring in two places, each k/2 nodes wide]."""
    if k > bad:
        return -math.inf
    # n (n - k - 1) / 2 pairs of gaps, each all bad with C(n - k, bad - k) / C(n, bad) = bad! (n - k)! / n! (bad - k)!
    pairs = math.log(n) + math.log(n - k - 1) - math.log(2)
    return pairs + math.lgamma(bad + 1) + math.lgamma(n - k + 1) - math.lgamma(n + 1) - math.lgamma(bad - k + 1)


def _log_split(n: int, k: int, threshold: int, corrupt: int) -> float:
    """log of a bound on Pr[two disjoint runs of k/2 places have t - k/2 or more of ``corrupt`` random nodes each].

    The second run's chance is taken as if the first had just enough: the more it has, the fewer are left. For odd k the
    neighbour opposite counts among the t as one that is honest.
    """
    half = k // 2  # n (n - 2 h + 1) / 2 pairs of runs, each with Pr[X_1 >= t - h] Pr[X_2 >= t - h | X_1 = t - h]
    enough = threshold - (k - half)
    if enough <= 0:
        return 0.0
    if 2 * enough > corrupt or enough > half:
        return -math.inf
    pairs = math.log(n) + math.log(n - 2 * half + 1) - math.log(2)
    first = float(_log_tails(n, corrupt, half)[enough])
    second = float(_log_tails(n - half, corrupt - enough, half)[enough])
    return min(0.0, pairs + first + second)


def _log_tails(n: int, marked: int, k: int) -> NDArray[np.float64]:
    """``[j] = log Pr[X >= j]``, j = 0 .. k + 1, for X ~ Hypergeometric(n parties, ``marked`` of them, k drawn)."""
    j = np.arange(k + 1)
    possible = (j <= marked) & (k - j <= n - marked)
    j = j[possible]
    # Pr[X = j] = C(marked, j) C(n - marked, k - j) / C(n, k)
    log_pmf = np.full(k + 2, -np.inf)
    log_pmf[:-1][possible] = _log_choose(marked, j) + _log_choose(n - marked, k - j) - _log_choose(n, np.asarray(k))
    tails: NDArray[np.float64] = np.logaddexp.accumulate(log_pmf[::-1])[::-1]
    return tails


def _log_choose(n: int, j: NDArray[np.int64]) -> NDArray[np.float64]:
    result: NDArray[np.float64] = gammaln(n + 1) - gammaln(j + 1) - gammaln(n - j + 1)
    return result


def _bits(log_probability: float) -> float:
    return max(0.0, -log_probability / math.log(2))
