"""What test_sharded.py runs in one process and in several: python sharded_program.py KIND FOLDER."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from choral import Masked, Privacy, federate
from choral.trainers import FSVRG, Epochs, Run, Scaffold

RANK = int(os.environ.get("RANK", "0"))


def main(kind: str, folder: Path) -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    sizes = [40, 25, 30, 12, 50]
    parties = {
        f"party-{k}": TensorDataset(
            torch.randn(n, 6, generator=generator), torch.randint(2, (n,), generator=generator).float()
        )
        for k, n in enumerate(sizes)
    }
    seen: list[str] = []

    def build(dataset: Any) -> Any:
        model = nn.Sequential(nn.Linear(6, 1), nn.Flatten(0))
        rate = float("inf") if kind == "diverges" and len(dataset) == 25 else 0.1
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        return model, optimizer, DataLoader(dataset, batch_size=8, shuffle=True)

    def fit(model: nn.Module, optimizer: torch.optim.Optimizer, loader: Any) -> None:
        seen.append(f"trained at {RANK}")
        if kind == "dies" and RANK == 1 and len(seen) > 2:  # in round 2
            os.kill(os.getpid(), signal.SIGKILL)
        Epochs(criterion=nn.functional.binary_cross_entropy_with_logits)(model, optimizer, loader)

    job: dict[str, Any] = {
        "build": build,
        "fit": fit,
        "loss": Epochs(criterion=nn.functional.binary_cross_entropy_with_logits).loss,
        "evaluate": lambda model: float(next(model.parameters()).sum()),
        "parties": parties,
        "rounds": 3,
        "seed": 4,
    }

    def keep(name: str, run: Run) -> None:
        save_file(dict(run.state), folder / f"{name}-rank-{RANK}.safetensors")
        (folder / f"{name}-rank-{RANK}.txt").write_text("\n".join(seen))

    masked = Masked(min_survivors=3)
    keep("masked", federate(**job, secure_sum=masked, out=folder / "masked", resume=(folder / "masked").exists()))
    if kind == "all":
        keep("scaffold", federate(**job, algorithm=Scaffold(), out=folder / "scaffold"))
        keep("fsvrg", federate(**job, algorithm=FSVRG(step=0.5), out=folder / "fsvrg"))
        known = job | {"fit": Epochs(criterion=nn.functional.binary_cross_entropy_with_logits)}
        keep("epochs", federate(**known))
        keep("private", federate(**job, privacy=Privacy(epsilon=3.0, delta=1e-3), out=folder / "private"))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
