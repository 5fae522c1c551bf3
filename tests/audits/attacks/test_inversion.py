"""Gradient inversion: a digit comes back from a plain update, and nothing from a masked message."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from choral.audits.attacks.inversion import inversion_audit
from choral.audits.attacks.pictures import nearer_p_value, psnr, ssim
from choral.audits.findings.evidence import InversionAudit
from choral.errors import ConfigError, DataError


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    x, y = load_digits(return_X_y=True)
    return torch.from_numpy(x).float() / 16, torch.from_numpy(y).long()


def audit_linear() -> InversionAudit:
    torch.manual_seed(0)
    x, y = digits()
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    return inversion_audit(model, x, y, shape=(8, 8))


def test_a_linear_first_layer_gives_the_record_away_and_the_mask_nothing() -> None:
    found = audit_linear()
    views = {view.name: view for view in found.views}
    assert found.method.startswith("exact")
    plain = views["plain update"]
    assert plain.recovered
    assert plain.psnr > 60  # float32 rounding alone
    assert plain.ssim > 0.999
    assert np.allclose(plain.image, found.truth, atol=1e-3)
    # The masked message: PSNR no better than for an unrelated picture. Under uniform masks p is (nearly) uniform:
    # the false-alarm rate of this line is 1e-3.
    masked = views["masked message"]
    assert masked.p_value > 1e-3
    assert not masked.recovered
    assert masked.psnr == pytest.approx(masked.unrelated_psnr, abs=1.5)
    # The sum holds one part in ten of it, which is no recognisable picture; noise hides that too.
    assert not views["sum"].recovered
    assert views["sum"].psnr < plain.psnr - 30
    assert not views["sum with noise"].recovered


def test_without_masks_the_message_gives_the_record_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """That nothing is found in a masked message says something only if it would be found in one without masks."""
    from choral.protocols.masking import mask_addition
    from choral.protocols.masking.server import unmasking

    for module in (mask_addition, unmasking):
        monkeypatch.setattr(module, "add_mask", lambda *_, **__: None)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    views = {view.name: view for view in inversion_audit(model, *digits(), shape=(8, 8), trials=5).views}
    assert views["masked message"].recovered
    assert views["masked message"].psnr > 30  # fixed-point rounding alone


def test_a_model_that_is_the_layer_itself_is_attacked_exactly() -> None:
    found = inversion_audit(nn.Linear(64, 10), *digits(), shape=(8, 8), trials=5, iterations=1)
    assert found.method.startswith("exact")
    assert found.views[0].psnr > 60  # which one step of optimisation does not reach


def test_a_convolution_gives_the_record_away_to_optimisation() -> None:
    torch.manual_seed(1)
    x, y = digits()
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Sigmoid(), nn.Flatten(), nn.Linear(512, 10))
    found = inversion_audit(model, x.reshape(-1, 1, 8, 8), y, shape=(8, 8), trials=5, parties=4, iterations=150)
    views = {view.name: view for view in found.views}
    assert found.method == "optimisation"
    assert views["plain update"].recovered
    assert views["masked message"].p_value > 1e-3
    assert not views["masked message"].recovered
    assert not views["sum with noise"].recovered


class Uncopied(nn.Module):
    """What cannot be deep-copied: it holds a lock, and its forward closes over a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        self.first, self.drop, self.last = nn.Linear(64, 32), nn.Dropout(0.5), nn.Linear(32, 10)
        self.norm = nn.GroupNorm(4, 32).eval()
        self.hidden = lambda x: torch.tanh(self.norm(self.first(x)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self.lock:
            return self.last(self.drop(self.hidden(x)))


def test_the_users_model_is_neither_copied_nor_changed() -> None:
    torch.manual_seed(0)
    model = Uncopied().train()
    model.norm.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = inversion_audit(model, *digits(), shape=(8, 8), trials=5)
    assert found.method.startswith("exact")
    assert found.views[0].recovered
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [part.training for part in (model, model.drop, model.norm)] == [True, True, False]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_users_model_keeps_its_modes_where_the_attack_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Uncopied().train()
    model.norm.eval()

    def fails(x: torch.Tensor) -> torch.Tensor:
        assert not model.drop.training
        raise ValueError("stopped")

    monkeypatch.setattr(model, "hidden", fails)
    with pytest.raises(ValueError, match="stopped"):
        inversion_audit(model, *digits(), shape=(8, 8), trials=5)
    assert [part.training for part in (model, model.drop, model.norm)] == [True, True, False]


def test_ssim_matches_windows_written_down() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.random((10, 12)), rng.random((10, 12))
    b = 0.5 * a + 0.5 * b
    values = []
    for top in range(10 - 6):
        for left in range(12 - 6):
            p, q = (m[top : top + 7, left : left + 7].ravel() for m in (a, b))
            c = np.cov(p, q)
            values.append(
                (2 * p.mean() * q.mean() + 1e-4) * (2 * c[0, 1] + 9e-4)
                / ((p.mean() ** 2 + q.mean() ** 2 + 1e-4) * (c[0, 0] + c[1, 1] + 9e-4))
            )  # fmt: skip
    assert ssim(a, b) == pytest.approx(np.mean(values), rel=1e-9)
    assert ssim(a, a) == pytest.approx(1.0)


def test_psnr_of_known_errors() -> None:
    a = np.zeros((4, 4))
    assert psnr(a, a + 0.1) == pytest.approx(20.0)
    assert psnr(a, a + 1.0) == pytest.approx(0.0)
    assert psnr(a, a) == 100.0
    with pytest.raises(DataError, match="one shape"):
        psnr(a, np.zeros((4, 5)))


def test_the_rank_test_is_exact() -> None:
    # Two trials, three unrelated pictures each: ranks are uniform on 0..3; P[sum <= 1] = 3/16.
    own = np.array([30.0, 20.0])
    others = np.array([[1.0, 2.0, 3.0], [1.0, 2.0, 25.0]])
    assert nearer_p_value(own, others) == pytest.approx(3 / 16)
    assert nearer_p_value(np.array([1.0]), np.array([[1.0, 1.0]])) == pytest.approx(1.0)  # ties count against it
    rng = np.random.default_rng(3)  # calibration: 1000 blind audits, P[p < .05] <= .05; above 75 has probability 3e-4
    low = sum(nearer_p_value(rng.random(12), rng.random((12, 20))) < 0.05 for _ in range(1000))
    assert 20 < low <= 75


def test_bad_inputs() -> None:
    x, y = digits()
    model = nn.Linear(64, 10)
    with pytest.raises(DataError, match="at least 30"):
        inversion_audit(model, x[:20], y[:20], shape=(8, 8))
    with pytest.raises(DataError, match="no picture"):
        inversion_audit(model, x, y, shape=(8, 9))
    with pytest.raises(DataError, match=r"in \[0, 1\]"):
        inversion_audit(model, 2 * x, y, shape=(8, 8))
    with pytest.raises(DataError, match="labels"):
        inversion_audit(model, x, y[:-1], shape=(8, 8))
    with pytest.raises(ConfigError, match="parties"):
        inversion_audit(model, x, y, shape=(8, 8), parties=2)
