"""Client-level differential privacy: whole updates are clipped, and the sum of all clients' updates is noisy.

`ClientPrivacy` is the promise; `ClientPrivacyEngine` keeps it for one federation and its ledger, and makes a
`ClientRound` for each sum, which every client encodes with and the server decodes with:

    privacy = ClientPrivacy(epsilon=8.0, delta=1e-5, min_survivors=80)
    engine = ClientPrivacyEngine(privacy, clients=100, length=d, rounds=20, ledger=Ledger(path))
    current = engine.begin()                                  # paid for, on disk
    integers = current.encode(update)                        # each client; int64, to the secure sum
    mean = current.decode(total, survivors=len(survivors))   # the server; float64, shape (d,)

Record-level :class:`choral.privacy.Privacy` wraps a training loop and is another thing: its clipping norm is of a
record's gradient, its ledger one data owner's. The two are classes of their own, for hardly a setting means the same.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np

from choral.errors import ConfigError
from choral.privacy.accounting import client_level, record_level
from choral.privacy.accounting.client_noise import calibrate
from choral.privacy.accounting.events import CLIENT_UNIT, ClientRelease, ReleasePlan
from choral.privacy.accounting.plain_numbers import as_float
from choral.privacy.client_level.central import CentralScheme
from choral.privacy.client_level.client_noise_shares import DistributedScheme, Int64Array, check_bits, design
from choral.privacy.client_level.encoder import ClientEncoder
from choral.privacy.dpsgd.clip_settings import AdaptiveClip, check_clip
from choral.privacy.errors import BudgetExceededError, PrivacyError, TooFewClientsError
from choral.privacy.ledgers.ledger import Ledger, as_ledger
from choral.privacy.ledgers.plans import RemainingBudget
from choral.privacy.ledgers.spending import spent_by_clients
from choral.privacy.ledgers.spent import Spent
from choral.privacy.noise.gaussian import Source, os_stream
from choral.privacy.noise.integer_tables import Law
from choral.privacy.noise.rotation import SEED_BYTES

if TYPE_CHECKING:
    import torch

HOLDER = "clients"
Where = Literal["distributed", "local", "central"]


@dataclass(frozen=True)
class ClientPrivacy:
    """A promise: all sums, and so all models, together are (epsilon, delta)-differentially private for each client.

    Unit: the client, with all its records and its whole training. Neighbour relation: zero out one client, that is, its
    update is the zero vector in every round; who takes part and who drops out is public and must not depend on data.
    Amplification by sampling clients is claimed with a `sample_rate` alone.

    Adversary, by `noise`:
        "distributed": whoever sees the sums, so the server too when the secure sum hides the rest from it, together
            with up to `colluders` clients, who know their own noise. A malicious server is withstood as far as the
            secure sum makes it open sums of at least `min_survivors` clients only (`Masked(server="malicious")`).
        "local": the server sees each noisy update; anyone, whatever the server and all other clients do.
        "central": whoever sees the models. The server, or whoever opens the sum, sees it without noise and is trusted
            to add the noise and to keep the sum to itself. With a `sample_rate`: whoever sees the models and nothing
            else of a round. The server is trusted besides to draw each client with that probability from secret
            randomness, and to tell nobody whom it drew, nor how many: sums are divided by the number expected.

    Args:
        epsilon, delta: the most that may be spent; delta in (0, 1), below 1/n for n clients.
        clip: the largest L2 norm of an update, > 0; or :class:`AdaptiveClip`.
        min_survivors: distributed noise is sized for this many clients, and no sum over fewer is opened; by default a
            majority. When more survive, the sum has more noise, and is accounted so.
        colluders: clients whose noise the adversary may know. 0 protects from the server alone and from outsiders; any
            single other client knows its own share, so the default is 1.
        mechanism: of integer noise, "discrete_gaussian" or "skellam" (whose shares add up exactly). bits: of a
            coordinate of the sum, 4 to 24; 16 to 20 are usual. Neither matters to central noise.
        sample_rate: of central noise alone: the chance of each client to be in a round's cohort, which is secret.
        noise_multiplier: the noise of each sum in clipping norms, of all shares that the adversary does not know; None
            takes the least that epsilon has room for. Given, a plan that does not fit with it is refused. Parties that
            keep ledgers of their own add the same noise only where it is given, or nothing was spent before.
        ledger: what remembers what these clients have spent, a file or a :class:`Ledger`; None keeps it in the run's
            folder, or where there is none in memory for as long as the run.
    Raises: ConfigError for a value out of range.
    """

    epsilon: float
    delta: float
    _: KW_ONLY
    clip: float | AdaptiveClip = 1.0
    noise: Where = "distributed"
    min_survivors: int | None = None
    colluders: int = 1
    mechanism: Law = "discrete_gaussian"
    bits: int = 20
    sample_rate: float | None = None
    noise_multiplier: float | None = None
    ledger: Ledger | str | Path | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.ledger is not None:
            object.__setattr__(self, "ledger", as_ledger(self.ledger))
        record_level.check_target(self.epsilon, self.delta)
        for name in ("epsilon", "delta"):  # Python's own, which can be written down
            if not isinstance(value := getattr(self, name), int | float):
                object.__setattr__(self, name, float(value))
        if not isinstance(self.clip, AdaptiveClip):
            check_clip(self.clip)
        check_bits(self.bits)
        for name, known in (
            ("noise", ("distributed", "local", "central")),
            ("mechanism", ("discrete_gaussian", "skellam")),
        ):
            if not isinstance(value := getattr(self, name), str) or value not in known:
                raise ConfigError(f"{name} is {value!r:.80}, expected one of {', '.join(known)}")
        if isinstance(self.colluders, bool) or not isinstance(self.colluders, int) or self.colluders < 0:
            raise ConfigError(f"colluders is {self.colluders}, expected an integer >= 0")
        self._check_cohorts()
        if self.noise_multiplier is not None and not as_float("noise_multiplier", self.noise_multiplier) > 0.0:
            raise ConfigError(f"noise_multiplier is {self.noise_multiplier!r:.80}, expected a finite number > 0")
        least = self.min_survivors
        if least is not None and (isinstance(least, bool) or not isinstance(least, int) or least <= self.colluders):
            raise ConfigError(
                f"min_survivors is {least}, expected an integer above the {self.colluders} colluders",
                hint="At least one client's noise must be unknown to the adversary; more make each share smaller.",
            )

    def _check_cohorts(self) -> None:
        rate = self.sample_rate
        if rate is None:
            return
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0.0 < rate < 1.0:
            raise ConfigError(f"sample_rate is {rate!r}, expected a number between 0 and 1, or None")
        if self.noise != "central":
            raise ConfigError(
                f'sample_rate with noise="{self.noise}": whoever runs the rounds knows who was selected',
                hint='noise="central" trusts the server with it, and holds off whoever sees the models',
            )
        if isinstance(self.clip, AdaptiveClip) or self.min_survivors is not None:
            raise ConfigError(
                "sample_rate with an adaptive clip or min_survivors: they go by how many were selected, a secret",
                hint="leave them out: the sum is divided by the number expected",
            )

    def survivors_of(self, clients: int) -> int:
        """The fewest of `clients` whose sum may be opened.

        Raises: ConfigError when that many cannot survive, or no honest one would be among them.
        """
        least = clients // 2 + 1 if self.min_survivors is None else self.min_survivors
        if self.noise != "distributed":
            return 1 if self.min_survivors is None else min(least, clients)
        if not self.colluders < least <= clients:
            raise ConfigError(
                f"min_survivors is {least} of {clients} clients with {self.colluders} colluders, expected"
                f" {self.colluders + 1} to {clients}",
                hint="Set min_survivors to what is left after the dropouts that you expect.",
            )
        return least

    def settings(self, clients: int) -> dict[str, float | int | str]:
        """The promise as plain data, for a run's record."""
        adaptive = self.clip if isinstance(self.clip, AdaptiveClip) else None
        plain: dict[str, float | int | str] = {
            "epsilon": self.epsilon,
            "delta": self.delta,
            "unit": CLIENT_UNIT,
            "noise": self.noise,
            "clip": adaptive.start if adaptive else float(self.clip),  # type: ignore[arg-type]
        }
        if adaptive:
            plain |= {"quantile": adaptive.quantile, "clip_rate": adaptive.rate, "clip_share": adaptive.share}
        if self.noise != "central":
            plain |= {"mechanism": self.mechanism, "bits": self.bits}
        if self.sample_rate is not None:
            plain |= {"sample_rate": float(self.sample_rate)}
        if self.noise_multiplier is not None:
            plain |= {"noise_multiplier": float(self.noise_multiplier)}
        if self.noise == "distributed":
            plain |= {"min_survivors": self.survivors_of(clients), "colluders": self.colluders}
        return plain


class ClientPrivacyEngine:
    """Keeps one promise over the rounds of a federation.

    Args:
        privacy: the promise. clients: how many there are. length: coordinates of an update. rounds: sums that are
            still to come; the noise is calibrated for them, on top of what the ledger holds. 0 opens what is over.
        ledger: what these clients have spent before. clip: the present clipping norm of an adaptive promise that is
            resumed. source: of noise and rounding. most: of the clients in one sum, by default all; the modulus has
            room for so many, and no sum of more is decoded. holder: whose ledger it is, where one client keeps its own.
    goes_on: that no new plan is made, for one on the ledger goes on, or nothing is to come.
    Raises: ConfigError (delta >= 1/n, too few survivors or bits), BudgetExceededError, LedgerError.
    """

    def __init__(
        self,
        privacy: ClientPrivacy,
        *,
        clients: int,
        length: int,
        rounds: int,
        ledger: Ledger,
        clip: float | None = None,
        source: Source = os_stream,
        most: int | None = None,
        holder: str = HOLDER,
    ) -> None:
        if rounds < 0 or clients < 2 or length < 1:
            raise ConfigError(
                f"expected rounds >= 0, clients >= 2 and length >= 1, got {rounds}, {clients} and {length}"
            )
        check_client_delta(privacy.delta, clients)
        ledger.bind(holder, privacy.delta, unit=CLIENT_UNIT)
        self.privacy, self.clients, self.length, self.rounds, self.ledger = privacy, clients, length, rounds, ledger
        self.adaptive = privacy.clip if isinstance(privacy.clip, AdaptiveClip) else None
        start = privacy.clip.start if isinstance(privacy.clip, AdaptiveClip) else float(privacy.clip)
        self.clip: float = start if clip is None or not self.adaptive else clip
        check_clip(self.clip)
        self.min_survivors = privacy.survivors_of(clients)
        self.most = clients if most is None else most
        if not self.min_survivors <= self.most <= clients:
            raise ConfigError(
                f"{self.most} of {clients} clients are in one sum at most, expected at least min_survivors,"
                f" {self.min_survivors}, and at most all",
                hint="Set min_survivors to what is left of those who are selected.",
            )
        self._source = source
        self._begun = 0
        remaining = RemainingBudget.on(ledger, privacy.epsilon, privacy.delta)
        self._known = len(remaining.state.before)
        self.ratio, self._announced = self._planned(remaining)
        self.goes_on = self._announced is None
        self.scheme = self._scheme(self.ratio)

    @property
    def holders(self) -> int:
        """Noise shares that no sum that is opened has fewer of, without those of the colluders."""
        return self.min_survivors - self.privacy.colluders if self.privacy.noise == "distributed" else 1

    @property
    def release(self) -> ClientRelease:
        """What a sum is charged as before it is made: over the fewest who may survive."""
        return self.scheme.release(self.holders)

    def least_noise(self, remaining: RemainingBudget, rounds: int) -> float:
        """The smallest noise multiplier with which so many sums more fit in. Raises: BudgetExceededError."""
        return remaining.client_ratio(self._release_of, rounds)

    def divisor(self, survivors: int) -> float:
        """What a sum over so many is divided by: their number, or where that is secret, the one to be expected."""
        rate = self.privacy.sample_rate
        return survivors if rate is None else rate * self.clients

    @property
    def encoding(self) -> str:
        """What clients must agree on, as text."""
        if isinstance(self.scheme, CentralScheme):
            return f"clients, central: grid {self.scheme.grid.hex()}"
        scheme = self.scheme
        return (
            f"clients, {self.privacy.noise}: {scheme.mechanism}, {scheme.bits} bits, scale {scheme.scale.hex()},"
            f" variance {float(scheme.share_variance).hex()}, count {self.adaptive.share if self.adaptive else 0}"
        )

    def begin(self, seed: bytes | None = None) -> ClientRound:
        """Pay for one sum, on disk, before any of its noise is drawn.

        seed: of the rotation, public and the same for all clients of the sum; None draws one, for all to be told.
        Raises: BudgetExceededError when it was not planned or would cost more than is left; LedgerError.
        """
        if self._begun >= self.rounds:
            raise BudgetExceededError(
                f"the budget was planned for {self.rounds} rounds, and all are used",
                hint="Plan more rounds from the start; each then has more noise.",
            )
        worst = self.release
        cost = client_level.epsilon([*self.ledger.releases, worst], self.privacy.delta)
        if not cost <= self.privacy.epsilon:
            raise BudgetExceededError(
                f"one more round would cost epsilon={cost:.6g} in all, {self.privacy.epsilon:g} were promised",
                hint="Training ends here; the last model is within the promise.",
            )
        self.append(worst, self._announced)
        self._announced = None
        self._begun += 1
        return ClientRound(self, self._source(SEED_BYTES) if seed is None else seed, self._source)

    def append(self, release: ClientRelease, plan: ReleasePlan | None = None) -> None:
        """Write one event to the ledger. Raises: LedgerError."""
        self.ledger.append(release, after=self._known, plan=plan)
        self._known += 1

    def spent(self) -> Spent:
        """Return what these clients have spent so far, earlier runs included."""
        return spent_by_clients(self.ledger, self.privacy.delta)

    def _planned(self, remaining: RemainingBudget) -> tuple[float, ReleasePlan | None]:
        """Return the ratio of the noise, and the plan to announce; None where an earlier process's plan goes on."""
        given = self.privacy.noise_multiplier
        if not self.rounds:  # nothing is to come: no noise is made, and the scheme only names the encoding
            latest = remaining.state.latest
            times = latest.parts[0].times if latest else 1
            earlier = remaining.before_latest().state.before if latest else ()
            before = [event for event in earlier if isinstance(event, ClientRelease)]
            return given or calibrate(self.privacy.epsilon, self.privacy.delta, self._release_of, times, before), None
        for part, left in remaining.unfinished():
            if isinstance(part.event, ClientRelease) and left >= self.rounds:
                ratio = given or remaining.before_latest().client_ratio(self._release_of, part.times)
                if self._release_of(ratio) == part.event:
                    return ratio, None
        ratio = given or remaining.client_ratio(self._release_of, self.rounds)
        event = self._release_of(ratio)
        if given:
            remaining.check([msgspec.structs.replace(event, steps=self.rounds)])
        return ratio, remaining.plan(event, self.rounds)

    def _release_of(self, ratio: float) -> ClientRelease:
        return self._scheme(ratio).release(self.holders)

    def _scheme(self, ratio: float) -> DistributedScheme | CentralScheme:
        length = self.length + (1 if self.adaptive else 0)
        if self.privacy.noise == "central":
            return CentralScheme(length=length, ratio=ratio, sample_rate=self.privacy.sample_rate)
        return design(
            mechanism=self.privacy.mechanism,
            bits=self.privacy.bits,
            length=length,
            clients=self.most,
            holders=self.holders,
            ratio=ratio,
        )


class ClientRound:
    """One sum: `encode` for each client, `decode` once. Made by :meth:`ClientPrivacyEngine.begin`."""

    def __init__(self, engine: ClientPrivacyEngine, seed: bytes, source: Source) -> None:
        self._engine, self.seed, self._source = engine, seed, source
        self._signs: Any = engine.scheme.signs(seed)
        self._scheme, self.clip = engine.scheme, engine.clip
        self._decoded = False
        self._client = ClientEncoder(
            length=engine.length,
            clip=self.clip,
            adaptive=engine.adaptive,
            scheme=self._scheme,
            signs=self._signs,
            source=source,
        )

    def encode(self, update: torch.Tensor | np.ndarray[Any, Any]) -> Int64Array:
        """See :meth:`ClientEncoder.encode`."""
        return self._client.encode(update)

    def decode(self, total: Int64Array, survivors: int, sure: int | None = None) -> torch.Tensor:
        """Return the noisy mean of the survivors' clipped updates, float64, shape (length,), and move the clip.

        The divisor is the public number of survivors; of secret cohorts the number expected. sure: how many are in the
        sum for certain, if that is fewer: those that nobody confirmed are paid for as if they were not.
        Raises: TooFewClientsError (fewer than min_survivors), PrivacyError (a second time), EncodingError (another
        shape or type), LedgerError.
        """
        import torch

        engine = self._engine
        if self._decoded:
            raise PrivacyError("this sum has been decoded", hint="A second draw of noise would cost as much again.")
        if not engine.min_survivors <= survivors <= engine.most:
            raise TooFewClientsError(
                f"{survivors} of {engine.most} clients survived, expected at least {engine.min_survivors}",
                hint="Its noise was sized for that many; open no smaller sum.",
            )
        self._decoded = True
        if isinstance(self._scheme, CentralScheme):
            scale = 1.0 if engine.adaptive else self.clip
            sums = self._scheme.decode(total, scale, self._signs, self._source)
        else:
            sums = self._scheme.decode(total, 1.0 if engine.adaptive else self.clip, self._signs)
            there = survivors if sure is None else min(survivors, sure)
            shares = there - engine.privacy.colluders if engine.privacy.noise == "distributed" else 1
            if shares > engine.holders:
                engine.append(self._scheme.release(shares, settles=True))
        if engine.adaptive:
            share = engine.adaptive.share
            within = (sums[-1] / (math.sqrt(share) * survivors) + 1.0) / 2.0
            sums = sums[:-1] * (self.clip / math.sqrt(1.0 - share))
            engine.clip = engine.adaptive.moved(self.clip, float(within))
        return torch.from_numpy(sums / engine.divisor(survivors))


def check_client_delta(delta: float, clients: int) -> None:
    """Raise ConfigError unless delta < 1/n for n clients: it would allow publishing one client's update outright."""
    if not delta < 1.0 / clients:
        raise ConfigError(
            f"delta is {delta:g}, expected below 1/n = {1.0 / clients:.3g} for {clients} clients",
            hint="At delta >= 1/n publishing one client's update outright would count as private.",
        )
