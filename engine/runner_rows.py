"""What a runner keeps of each row from step to step: on the host its known tokens and its block table, on the device the token
that was drawn for it last.

A decode step reads the token that the step before it drew, from where it was drawn, so that the host need not have seen it.

Neighbours: `engine.plan` brings the changes, `engine.batch` and `engine.cuda_graph` read.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch

from engine.plan import Admitted, Scheduled, StepPlan

Ints = npt.NDArray[np.int32]

_FIRST_ROWS, _FIRST_WIDTH = 16, 8


class RunnerRows:
    """Rows of one runner. All arrays are indexed by row and grow as rows and tables do.

    Attributes:
        tables: int32 `[rows, width]` for each group of layers, block tables, 0 past a row's own blocks. Left of what a window
            sees there may be blocks of others.
        widths: int32 `[rows]` for each group, where the row's own blocks end in its table.
        known: int32 `[rows]`, how many tokens the row was admitted with. Those after them were drawn here.
        drawn: int64 `[rows]` on the device, the token drawn last. It moves only when rows are added beyond those reserved.
    """

    def __init__(self, device: torch.device, groups: int = 1) -> None:
        self.tables: list[Ints] = [np.zeros((_FIRST_ROWS, _FIRST_WIDTH), dtype=np.int32) for _ in range(groups)]
        self.widths: list[Ints] = [np.zeros(_FIRST_ROWS, dtype=np.int32) for _ in range(groups)]
        self.known: Ints = np.zeros(_FIRST_ROWS, dtype=np.int32)
        self.drawn = torch.zeros(_FIRST_ROWS, dtype=torch.long, device=device)
        self._tokens: dict[int, Ints] = {}
        self._prompt_tokens: dict[int, int] = {}

    def __len__(self) -> int:
        """How many rows are there."""
        return len(self._tokens)

    def apply(self, plan: StepPlan) -> None:
        """Make a plan's changes."""
        for number in plan.dropped:
            del self._tokens[number]
        for admitted in plan.admitted:
            self._admit(admitted)
        for added in plan.blocks:
            end, table = added.at + len(added.blocks), self.tables[added.group]
            if end > table.shape[1]:
                table = self.tables[added.group] = _grown(table, (len(table), 2 * end))
            table[added.row, added.at : end] = added.blocks
            self.widths[added.group][added.row] = end

    def reserve(self, rows: int) -> None:
        """Make room for rows up to that number, so that `drawn` need not move."""
        if rows <= len(self.known):
            return
        self.tables = [_grown(table, (rows, table.shape[1])) for table in self.tables]
        self.widths = [_grown(widths, (rows,)) for widths in self.widths]
        self.known = _grown(self.known, (rows,))
        drawn = self.drawn.new_zeros(rows)
        drawn[: len(self.drawn)] = self.drawn
        self.drawn = drawn

    def tokens(self, row: int) -> Ints:
        """Those that the row was admitted with."""
        return self._tokens[row]

    def known_at(self, rows: Ints, positions: Ints) -> Ints:
        """int32 `[n]`: the token of `rows[n]` at `positions[n]`, -1 where it was drawn here."""
        tokens = np.full(len(rows), -1, dtype=np.int32)
        for index in np.flatnonzero(positions < self.known[rows]).tolist():
            tokens[index] = self._tokens[int(rows[index])][positions[index]]
        return tokens

    def output_positions(self, items: Iterable[Scheduled]) -> list[int]:
        """For rows that sample: the output position of the token that each is to draw."""
        return [item.start + item.count - self._prompt_tokens[item.row] for item in items]

    def keep_drawn(self, rows: list[int], tokens: torch.Tensor) -> None:
        """`tokens` (int64 `[n]` on the device) were drawn for `rows[n]`. An unusable one, of -1, is kept as some token that
        exists: nobody will see what follows it."""
        if self.drawn.device.type == "cpu":
            self.drawn.numpy()[rows] = np.maximum(tokens.numpy(), 0)
            return
        (where,) = to_device([np.array(rows, dtype=np.int32)], self.drawn.device)
        self.drawn.index_copy_(0, where.long(), tokens.clamp(min=0))

    def clear(self) -> None:
        """Drop every row."""
        self._tokens.clear()

    def _admit(self, admitted: Admitted) -> None:
        row = admitted.row
        if row >= len(self.known):
            self.reserve(2 * row + 1)
        self._tokens[row] = np.array(admitted.tokens, dtype=np.int32)
        self._prompt_tokens[row] = admitted.prompt_tokens
        self.known[row] = len(admitted.tokens)
        for widths, table in zip(self.widths, self.tables, strict=True):
            widths[row] = table[row] = 0


def _grown(array: Ints, shape: tuple[int, ...]) -> Ints:
    grown = np.zeros(shape, dtype=np.int32)
    grown[tuple(slice(size) for size in array.shape)] = array
    return grown


def to_device(arrays: list[Ints], device: torch.device) -> list[torch.Tensor]:
    """The same arrays there; on a GPU by one copy, which joins the current stream."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    packed = torch.from_numpy(np.concatenate([array.ravel() for array in arrays])).pin_memory()
    whole = packed.to(device, non_blocking=True)
    pieces = torch.split(whole, [array.size for array in arrays])
    return [piece.view(array.shape) for piece, array in zip(pieces, arrays, strict=True)]
