"""Recurrent layers and cells out of Opacus' cells, with the parameters, arguments and results of torch's.

In Opacus' own stacks dropout falls on the state that is handed from step to step, in torch's between the layers, and so
it does here.
"""

from __future__ import annotations

from typing import Any

import torch
from opacus.layers.dp_rnn import DPGRUCell, DPLSTMCell, DPRNNCell
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from choral.privacy.errors import UnsupportedModelError

_CELLS: dict[type[nn.Module], Any] = {
    **dict.fromkeys((nn.LSTM, nn.LSTMCell), DPLSTMCell),
    **dict.fromkeys((nn.GRU, nn.GRUCell), DPGRUCell),
    **dict.fromkeys((nn.RNN, nn.RNNCell), DPRNNCell),
}


class Recurrent(nn.Module):
    """An `nn.LSTM`, `nn.GRU` or `nn.RNN` out of Opacus' cells, with its parameters, arguments and results.

    A packed sequence is unpacked and its records run in their own order to their own ends: Opacus' layers keep the
    gradients of a packed batch in the order of lengths, so that a record's gradient would be spread over two rows.
    """

    def __init__(self, plain: nn.RNNBase) -> None:
        super().__init__()
        self.mode, self.batch_first, self.bidirectional = plain.mode, plain.batch_first, plain.bidirectional
        self.input_size, self.hidden_size, self.num_layers = plain.input_size, plain.hidden_size, plain.num_layers
        self.directions = 2 if plain.bidirectional else 1
        self.dropout = nn.Dropout(plain.dropout)
        self.cells = nn.ModuleList()
        self._places: dict[str, str] = {}  # of a parameter named as torch does
        settings = {"nonlinearity": plain.nonlinearity} if isinstance(plain, nn.RNN) else {}
        for number in range(plain.num_layers * self.directions):
            layer, direction = divmod(number, self.directions)
            size = plain.input_size if layer == 0 else self.directions * plain.hidden_size
            with torch.device("meta"):  # no memory, no random numbers: the parameters come from `plain`
                cell = _CELLS[type(plain)](size, plain.hidden_size, plain.bias, **settings)
            for kind in ("weight", "bias") if plain.bias else ("weight",):
                for part in ("ih", "hh"):
                    name = f"{kind}_{part}_l{layer}{'_reverse' if direction else ''}"
                    setattr(getattr(cell, part), kind, getattr(plain, name))
                    self._places[name] = f"cells.{number}.{part}.{kind}"
            self.cells.append(cell)
        self.register_state_dict_post_hook(_save_plain_names)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_load_plain_names)  # type: ignore[no-untyped-call]

    def forward(self, input: Any, hx: Any = None) -> tuple[Any, Any]:
        """Do as torch's layer does. Raises: UnsupportedModelError (a sequence without a batch dimension)."""
        lengths = None
        if isinstance(input, PackedSequence):
            x, ends = pad_packed_sequence(input, batch_first=True)
            lengths = ends.to(x.device)
        elif input.ndim == 3:
            x = input if self.batch_first else input.transpose(0, 1)
        else:
            raise UnsupportedModelError(
                f"a recurrent layer was given shape {tuple(input.shape)}, expected three dimensions with a batch's",
                hint="Use batch_first=True and shape (records, steps, features).",
            )
        if hx is None:
            zeros = x.new_zeros(len(self.cells), len(x), self.hidden_size)
            hx = (zeros, zeros) if self.mode == "LSTM" else zeros
        last = []
        for layer in range(self.num_layers):
            outputs = []
            for direction in range(self.directions):
                number = layer * self.directions + direction
                state = tuple(h[number] for h in hx) if self.mode == "LSTM" else hx[number]
                steps = _turned(x, lengths) if direction else x
                output, state = _over_time(self.cells[number], steps, state, lengths)
                outputs.append(_turned(output, lengths) if direction else output)
                last.append(state)
            x = torch.cat(outputs, -1)
            if layer + 1 < self.num_layers:
                x = self.dropout(x)
        end = tuple(map(torch.stack, zip(*last, strict=True))) if self.mode == "LSTM" else torch.stack(last)
        if isinstance(input, PackedSequence):
            return _packed_like(input, x, ends), end
        return x if self.batch_first else x.transpose(0, 1), end

    def flatten_parameters(self) -> None:
        """Do nothing: there is no fused kernel to prepare for."""


class RecurrentCell(nn.Module):
    """An `nn.LSTMCell`, `nn.GRUCell` or `nn.RNNCell` out of Opacus' cell: same parameters, arguments and results."""

    def __init__(self, plain: nn.RNNCellBase) -> None:
        super().__init__()
        self.input_size, self.hidden_size, self.bias = plain.input_size, plain.hidden_size, plain.bias
        self._tuple = isinstance(plain, nn.LSTMCell)
        settings = {"nonlinearity": plain.nonlinearity} if isinstance(plain, nn.RNNCell) else {}
        with torch.device("meta"):
            self.cell = _CELLS[type(plain)](plain.input_size, plain.hidden_size, plain.bias, **settings)
        self._places: dict[str, str] = {}
        for kind in ("weight", "bias") if plain.bias else ("weight",):
            for part in ("ih", "hh"):
                setattr(getattr(self.cell, part), kind, getattr(plain, f"{kind}_{part}"))
                self._places[f"{kind}_{part}"] = f"cell.{part}.{kind}"
        self.register_state_dict_post_hook(_save_plain_names)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_load_plain_names)  # type: ignore[no-untyped-call]

    def forward(self, input: torch.Tensor, hx: Any = None) -> Any:
        """Do as torch's cell does. Raises: UnsupportedModelError (one record without a batch dimension)."""
        if input.ndim != 2:
            raise UnsupportedModelError(
                f"a recurrent cell was given shape {tuple(input.shape)}, expected (records, features)"
            )
        if hx is None:
            zeros = input.new_zeros(len(input), self.hidden_size)
            hx = (zeros, zeros) if self._tuple else zeros
        return self.cell(input, hx)


def _over_time(cell: nn.Module, x: torch.Tensor, state: Any, lengths: torch.Tensor | None) -> tuple[torch.Tensor, Any]:
    """Run a cell over shape (records, steps, features); a record's state stays as it is from its end on."""
    outputs = []
    for t, step in enumerate(x.unbind(1)):
        new = cell(step, state)
        if lengths is not None:
            alive = (t < lengths)[:, None]
            pairs = zip(new, state, strict=True) if isinstance(new, tuple) else [(new, state)]
            kept = tuple(torch.where(alive, a, b) for a, b in pairs)
            new = kept if isinstance(new, tuple) else kept[0]
        state = new
        outputs.append(state[0] if isinstance(state, tuple) else state)
    return torch.stack(outputs, 1), state


def _turned(x: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """Return the steps of each record in reverse, those behind its end in their places."""
    if lengths is None:
        return x.flip(1)
    t = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
    place = torch.where(t < lengths[:, None], lengths[:, None] - 1 - t, t)
    return x.gather(1, place[:, :, None].expand_as(x))


def _packed_like(like: PackedSequence, x: torch.Tensor, lengths: torch.Tensor) -> PackedSequence:
    order = like.sorted_indices
    if order is not None:
        x, lengths = x[order], lengths[order.to(lengths.device)]
    return like._replace(data=pack_padded_sequence(x, lengths, batch_first=True).data)


def _save_plain_names(layer: Recurrent | RecurrentCell, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    for name, place in layer._places.items():
        state[prefix + name] = state.pop(prefix + place)


def _load_plain_names(layer: Recurrent | RecurrentCell, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, place in layer._places.items():
        if prefix + name in state:
            state[prefix + place] = state.pop(prefix + name)
