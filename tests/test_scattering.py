"""The scattering transform of benchmarks/ against values that kymatio 0.3.0 gave."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch

from choral.jobs.training import load_module


@pytest.fixture(scope="module")
def scattering() -> ModuleType:
    return load_module(Path(__file__).resolve().parent.parent / "benchmarks" / "scattering.py", "the benchmark")


# ScatteringTorch2D(J=2, L=8, shape=(28, 28)) of kymatio 0.3.0: channel, its value at (3, 3), its value at (0, 6).
KYMATIO = [
    (0, 0.313503, 0.453191),
    (1, 0.032546, 0.047098),
    (4, 0.062144, 0.036150),
    (9, 0.028742, 0.035985),
    (16, 0.054189, 0.037403),
    (17, 0.003343, 0.009004),
    (24, 0.002117, 0.007944),
    (40, 0.008400, 0.006463),
    (63, 0.012538, 0.003961),
    (80, 0.012797, 0.007114),
]


def test_it_gives_kymatios_coefficients(scattering: ModuleType) -> None:
    row, column = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    image = ((3 * row + 5 * column + row * column) % 17 / 17)[None]
    found = scattering.scatter(image)
    assert found.shape == (1, 81, 7, 7)
    for channel, middle, corner in KYMATIO:
        assert float(found[0, channel, 3, 3]) == pytest.approx(middle, rel=2e-4)
        assert float(found[0, channel, 0, 6]) == pytest.approx(corner, rel=2e-4)
    assert float(found.square().sum()) == pytest.approx(12.469521, rel=1e-4)  # kymatio takes pi to be 3.1415


def test_each_record_is_transformed_by_itself(scattering: ModuleType) -> None:
    images = torch.rand(5, 28, 28, generator=torch.Generator().manual_seed(0))
    whole = scattering.scatter(images, batch=2)
    alone = torch.cat([scattering.scatter(image[None]) for image in images])
    torch.testing.assert_close(whole, alone)


@pytest.mark.parametrize("shape", [(1, 26, 28), (1, 4, 4)])
def test_other_sizes_are_refused(scattering: ModuleType, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="multiples of 4"):
        scattering.scatter(torch.zeros(shape))
