"""What an algorithm keeps between rounds: the server's tensors and each party's own, in the run's folder.

    DIR/algorithm_state.R.safetensors    "server|NAME", "party|PARTY|NAME" and "clip|OWNER" after round R

Named by round, and written before the weights, which make the round complete. The parties' part is here because one
process plays them all; where they are apart it stays with each, as their data does: an update can be told from it.
Earlier versions called the file memory.R.safetensors, which is still read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, unquote

import torch

from choral.trainers.run_folder.folder import drop_earlier, read_tensors, write_side_file
from choral.trainers.run_folder.info import RunFolderError

State = dict[str, torch.Tensor]
_NAME, _OLD_NAME = "algorithm_state", "memory"


@dataclass
class AlgorithmState:
    """server: the server's tensors by name. parties: each party's, for those that keep any.

    clips: by data owner, where adaptive clipping of records has come to; no secret, since what moves it is noisy.
    """

    server: State = field(default_factory=dict)
    parties: dict[str, State] = field(default_factory=dict)
    clips: dict[str, float] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether the algorithm keeps anything."""
        return bool(self.server) or any(self.parties.values())


def write_algorithm_state(folder: Path, state: AlgorithmState, round_number: int) -> None:
    flat: dict[str, torch.Tensor] = {f"server|{name}": tensor for name, tensor in state.server.items()}
    for party, own in state.parties.items():
        flat |= {f"party|{quote(party, safe='')}|{name}": tensor for name, tensor in own.items()}
    for owner, clip in state.clips.items():
        flat[f"clip|{quote(owner, safe='')}"] = torch.tensor(clip, dtype=torch.float64)
    write_side_file(folder, _NAME, flat, round_number, kept="yes")
    drop_earlier(folder, _OLD_NAME, round_number)


def read_algorithm_state(folder: Path, round_number: int) -> AlgorithmState:
    """Raises: RunFolderError if the file is damaged or of another round."""
    files = (folder / f"{name}.{round_number}.safetensors" for name in (_NAME, _OLD_NAME))
    path = next((file for file in files if file.is_file()), None)
    if path is None:
        return AlgorithmState()
    tensors, metadata = read_tensors(path)
    if int(metadata["round"]) != round_number:
        raise RunFolderError(f"{path} belongs to round {metadata['round']}", hint="restore the file of this round")
    state = AlgorithmState()
    for key, tensor in tensors.items():
        kind, _, rest = key.partition("|")
        if kind == "server":
            state.server[rest] = tensor
        elif kind == "clip":
            state.clips[unquote(rest)] = float(tensor)
        else:
            party, _, name = rest.partition("|")
            state.parties.setdefault(unquote(party), {})[name] = tensor
    return state
