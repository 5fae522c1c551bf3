"""Gradient inversion: rebuild a party's record from its update, its masked message, the sum, and the sum with noise.

The adversary knows the global model, the learning rate and the record's label. One party's round is one step of
gradient descent on one record, the case that favours the adversary most; what fails here fails for more records too.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.func import functional_call

from choral.audits.attacks.pictures import RECOGNISABLE_PSNR, nearer_p_value, psnr, ssim
from choral.audits.findings.evidence import InversionAudit, View
from choral.errors import ConfigError, DataError
from choral.privacy import ClientPrivacy, ClientPrivacyEngine, FixedPoint, Ledger
from choral.privacy.record_independence.shared_inputs import evaluating
from choral.protocols import Masked
from choral.protocols.crypto.modular_integers import unpack
from choral.protocols.interface import SumSpec
from choral.protocols.masking import messages
from choral.protocols.tap import watched_by
from choral.trainers.federated.codec import ClientCodec

Attack = Callable[[torch.Tensor, int], torch.Tensor]
"""From an update, shape (d,), and the label to the rebuilt input."""

_BOUND, _BITS = 16.0, 28
_UNRELATED = 20
_SEES = {
    "plain update": "one party's update, as a server without a secure sum has it",
    "masked message": "the message that the party sends in the masked sum, read as fixed-point numbers",
    "sum": "the sum of all parties' updates, which the masked sum opens",
    "sum with noise": "the same sum of clipped updates with client-level noise",
}
LEVEL = 0.01
_ASSUMPTIONS = (
    "Each party trains one step of gradient descent on one record; the adversary knows model, learning rate and label.",
    "Pictures and unrelated pictures are drawn alike, so that a blind guess is equally near to both.",
)


@dataclass(frozen=True)
class _Global:
    """The user's model as it is, with copies of its weights on the CPU: nothing of it is changed or copied besides.

    weights: the trainable parameters by name, in the order of an update's coordinates. fixed: all others, and buffers.
    """

    module: nn.Module
    weights: dict[str, torch.Tensor]
    fixed: dict[str, torch.Tensor]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = functional_call(self.module, (self.weights, self.fixed), (x,))
        return output

    @property
    def trained(self) -> list[torch.Tensor]:
        return list(self.weights.values())


@contextlib.contextmanager
def _evaluated(module: nn.Module) -> Iterator[_Global]:
    """The model in eval mode, and each of its parts in its own mode again afterwards."""
    named = {
        name: value.detach().cpu().clone() for name, value in [*module.named_parameters(), *module.named_buffers()]
    }
    trained = {name: named.pop(name).requires_grad_() for name, p in module.named_parameters() if p.requires_grad}
    with evaluating(module):
        yield _Global(module, trained, named)


def inversion_audit(
    model: nn.Module,
    inputs: torch.Tensor,
    labels: torch.Tensor,
    *,
    shape: tuple[int, int],
    parties: int = 10,
    trials: int = 12,
    privacy: ClientPrivacy | None = None,
    learning_rate: float = 0.1,
    iterations: int = 300,
    seed: int = 0,
) -> InversionAudit:
    """Attack the update of one party out of ``parties``, in the four ways in which it may be seen.

    model: the global model, trained by cross-entropy; it is left as it is. If its first layer is linear with a bias and
        takes the input itself, the attack is exact; otherwise it optimises for ``iterations`` steps.
    inputs: shape (n, ...), each with height * width values in [0, 1]; labels: shape (n,). shape: (height, width).
    privacy: of the sum with noise; default epsilon 8, delta 1e-5, clipping norm 1, noise inside the secure sum, for one
    round. seed: which records are drawn. A picture counts as nearer to its original below a significance of LEVEL.

    Raises: DataError for inputs of another shape, outside [0, 1] or too few; ConfigError for a setting out of range.
    """
    _check(inputs, labels, shape, parties, trials)
    rng = np.random.default_rng(seed)
    promise = privacy or ClientPrivacy(epsilon=8.0, delta=1e-5)
    rebuilt = {name: _Rebuilt() for name in _SEES}
    truth: list[npt.NDArray[np.float64]] = []
    with _evaluated(model) as shared:
        layer = _first_linear(shared, inputs[:1])
        attack = (
            _exact(shared, layer, inputs)
            if layer is not None
            else _optimiser(shared, inputs, learning_rate, iterations)
        )
        for _ in range(trials):
            drawn = rng.choice(len(inputs), parties + _UNRELATED, replace=False)
            chosen, unrelated = drawn[:parties], [_picture(inputs[j], shape) for j in drawn[parties:]]
            updates = {
                f"party-{i}": _update(shared, inputs[j : j + 1], labels[j : j + 1], learning_rate)
                for i, j in enumerate(chosen)
            }
            truth.append(_picture(inputs[chosen[0]], shape))
            for name, view in _views(updates, promise).items():
                image = _picture(attack(view, int(labels[chosen[0]])), shape)
                rebuilt[name].add(image, truth[-1], unrelated)
    return InversionAudit(
        method="exact (linear first layer)" if layer is not None else "optimisation",
        shape=shape,
        batch=1,
        trials=trials,
        level=LEVEL,
        truth=tuple(truth[0].ravel().tolist()),
        views=tuple(rebuilt[name].view(name, LEVEL) for name in _SEES),
        assumptions=_ASSUMPTIONS,
    )


@dataclass
class _Rebuilt:
    """What the attack made of one view, trial by trial, and how near it came: to the original and to others.

    own, alike: PSNR and SSIM to the original. other: PSNR to each unrelated picture.
    """

    images: list[npt.NDArray[np.float64]] = field(default_factory=list)
    own: list[float] = field(default_factory=list)
    alike: list[float] = field(default_factory=list)
    other: list[list[float]] = field(default_factory=list)

    def add(
        self,
        image: npt.NDArray[np.float64],
        original: npt.NDArray[np.float64],
        unrelated: list[npt.NDArray[np.float64]],
    ) -> None:
        self.images.append(image)
        self.own.append(psnr(original, image))
        self.alike.append(ssim(original, image))
        self.other.append([psnr(picture, image) for picture in unrelated])

    def view(self, name: str, level: float) -> View:
        p_value = nearer_p_value(np.array(self.own), np.array(self.other))
        mean = float(np.mean(self.own))
        return View(
            name=name,
            sees=_SEES[name],
            image=tuple(self.images[0].ravel().tolist()),
            psnr=mean,
            ssim=float(np.mean(self.alike)),
            unrelated_psnr=float(np.mean(self.other)),
            p_value=p_value,
            recovered=p_value < level and mean >= RECOGNISABLE_PSNR,
        )


def _update(model: _Global, x: torch.Tensor, y: torch.Tensor, learning_rate: float) -> torch.Tensor:
    """One step of gradient descent, as a flat vector, shape (d,)."""
    gradients = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), model.trained)
    return torch.cat([-learning_rate * g.reshape(-1) for g in gradients]).float()


def _views(updates: Mapping[str, torch.Tensor], promise: ClientPrivacy) -> dict[str, torch.Tensor]:
    """What each adversary holds of the first party, as an update, shape (d,): by the protocol itself."""
    parties = tuple(updates)
    victim, length = parties[0], len(updates[parties[0]])
    codec = FixedPoint(bound=_BOUND, value_bits=_BITS, max_weight=1)
    spec = SumSpec(parties=parties, length=length + 1, bound=codec.integer_bound, encoding=repr(codec))
    message, total, bits = _masked(spec, {party: codec.encode(update, 1) for party, update in updates.items()}, victim)
    centred = (message.astype(np.int64) + (1 << (bits - 1))) % (1 << bits) - (1 << (bits - 1))
    mean, count = codec.decode(total, len(parties))
    privacy_engine = ClientPrivacyEngine(promise, clients=len(parties), length=length, rounds=1, ledger=Ledger(None))
    noisy, encoded = privacy_engine.begin(), ClientCodec(parties, privacy_engine).spec
    _, private, _ = _masked(encoded, {party: noisy.encode(update) for party, update in updates.items()}, victim)
    return {
        "plain update": updates[victim],
        "masked message": torch.from_numpy(centred[:-1] * codec.step).float(),
        "sum": (mean * count).float(),
        "sum with noise": (noisy.decode(private, len(parties)) * len(parties)).float(),
    }


def _masked(
    spec: SumSpec, vectors: Mapping[str, Any], victim: str
) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64], int]:
    """The victim's masked vector as it is on the wire, the total, and the bits of the modulus."""
    uploads: list[bytes] = []
    session = Masked().open(spec)
    summing = session.begin()
    for party, vector in vectors.items():
        with watched_by((lambda _way, _party, raw: uploads.append(raw)) if party == victim else None):
            summing.submit(party, vector)
    message = messages.to_server(uploads[0], sender=victim, limit=len(uploads[0]))
    packed = messages.from_pieces(message.vector) if isinstance(message, messages.Upload) else None
    sent = unpack(packed or b"", spec.length, spec.modulus_bits)
    return sent, summing.finish().total, spec.modulus_bits


def _first_linear(model: _Global, x: torch.Tensor) -> str | None:
    """The name of the layer that all of the input enters as it is, if it is linear with a bias."""
    named = model.module.named_modules()
    name, layer = next((pair for pair in named if any(True for _ in pair[1].parameters(recurse=False))), ("", None))
    if not isinstance(layer, nn.Linear) or layer.bias is None:
        return None
    if not (layer.weight.requires_grad and layer.bias.requires_grad):
        return None
    seen: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    with torch.no_grad():
        model(x)
    handle.remove()
    same = len(seen) == 1 and seen[0].numel() == x.numel() and torch.equal(seen[0].reshape(-1), x.reshape(-1))
    return name if same else None


def _exact(model: _Global, layer: str, inputs: torch.Tensor) -> Attack:
    """dL/dW = dL/db x^T for one record: least squares over the rows (Phong et al. 2018; Geiping et al. 2020)."""
    names, sizes = list(model.weights), [weight.numel() for weight in model.trained]
    prefix = f"{layer}." if layer else ""
    places = [names.index(f"{prefix}{part}") for part in ("weight", "bias")]
    shape = model.weights[f"{prefix}weight"].shape

    def attack(update: torch.Tensor, _: int) -> torch.Tensor:
        parts = torch.split(update.double(), sizes)
        weight, bias = parts[places[0]].view(shape), parts[places[1]]
        found = bias @ weight / bias.square().sum().clamp(min=1e-300)
        return found.reshape(inputs.shape[1:]).float()

    return attack


def _optimiser(model: _Global, inputs: torch.Tensor, learning_rate: float, iterations: int) -> Attack:
    """Maximise the cosine of gradients, with a little total variation. Reference: Geiping et al. 2020, equation 4."""

    def attack(update: torch.Tensor, label: int) -> torch.Tensor:
        wanted, y = -update / learning_rate, torch.tensor([label])
        x = torch.full((1, *inputs.shape[1:]), 0.5).requires_grad_()
        optimizer = torch.optim.Adam([x], lr=0.1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
        for _ in range(iterations):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            gradients = torch.autograd.grad(loss, model.trained, create_graph=True)
            flat = torch.cat([g.reshape(-1) for g in gradients])
            far = 1.0 - nn.functional.cosine_similarity(flat, wanted, dim=0) + 1e-4 * _variation(x)
            (x.grad,) = torch.autograd.grad(far, x)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                x.clamp_(0.0, 1.0)
        return x.detach()[0]

    return attack


def _variation(x: torch.Tensor) -> torch.Tensor:
    if x.ndim < 4:
        return x.new_zeros(())
    return (x[..., 1:, :] - x[..., :-1, :]).abs().mean() + (x[..., 1:] - x[..., :-1]).abs().mean()


def _picture(values: torch.Tensor, shape: tuple[int, int]) -> npt.NDArray[np.float64]:
    return values.detach().double().clamp(0.0, 1.0).reshape(shape).numpy()


def _check(inputs: torch.Tensor, labels: torch.Tensor, shape: tuple[int, int], parties: int, trials: int) -> None:
    if parties < 3 or trials < 5:
        raise ConfigError(f"expected parties >= 3 and trials >= 5, got {parties} and {trials}")
    if len(inputs) != len(labels) or len(inputs) < parties + _UNRELATED:
        raise DataError(
            f"{len(inputs)} inputs and {len(labels)} labels, expected one label each, at least {parties + _UNRELATED}"
        )
    if math.prod(inputs.shape[1:]) != shape[0] * shape[1]:
        raise DataError(f"inputs have shape {tuple(inputs.shape[1:])}, which is no picture of {shape}")
    if not bool(((inputs >= 0.0) & (inputs <= 1.0)).all()):
        raise DataError("inputs are not all in [0, 1]", hint="undo the normalisation; PSNR is of that range")
