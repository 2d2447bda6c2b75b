"""Recorders of decode steps for a machine without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class AgainRecorder:
    """Replays by calling the step again. Counts."""

    def __init__(self) -> None:
        self.recorded = 0
        self.replayed = 0

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1
        step()

        def replay() -> None:
            self.replayed += 1
            step()

        return replay


class TapeRecorder(AgainRecorder):
    """Replays tensor operation by tensor operation, as a CUDA graph does: every result lands where it lay while recording,
    host numbers are those of the recording, no line of the model's Python runs, and reading a tensor's value on the host
    breaks the recording."""

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1
        tape = _Tape()
        with tape:
            step()

        def replay() -> None:
            self.replayed += 1
            tape.play()

        return replay


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Callable[..., Any], Any, dict[str, Any], list[tuple[int, torch.Tensor]]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if waits(function, args):
            raise RuntimeError(f"{function} waits for the device")
        result = function(*args, **kwargs)
        given = {storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        leaves = enumerate(tree_leaves(result))
        fresh = [(i, leaf) for i, leaf in leaves if isinstance(leaf, torch.Tensor) and storage(leaf) not in given]
        self._calls.append((function, args, kwargs, fresh))
        return result

    def play(self) -> None:
        for function, args, kwargs, fresh in self._calls:
            leaves = tree_leaves(function(*args, **kwargs))
            for index, place in fresh:
                place.copy_(leaves[index])


def waits(function: Any, args: Any) -> bool:
    """Whether the host must know a tensor's values to go on: for a number, or for the size of the result."""
    if function is torch.ops.aten.index.Tensor:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return torch.Tag.data_dependent_output in function.tags or torch.Tag.dynamic_output_shape in function.tags


def storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class CopiedInts(TorchDispatchMode):
    """Counts the numbers that come from the host while it is active: those copied into tensors that stay, and those that are
    indexes of, or values for, such tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.copy_.default:
            self.count += args[1].numel()
        elif function in (torch.ops.aten.index_copy_.default, torch.ops.aten.index_fill_.int_Scalar):
            self.count += sum(arg.numel() for arg in args[2:] if isinstance(arg, torch.Tensor))
        return function(*args, **(kwargs or {}))
