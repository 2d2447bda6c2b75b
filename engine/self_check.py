"""Proof, at load, that the assembled engine computes what the model alone computes.

Two short sequences run once through the model's own eager attention, whole and each alone, and once through the engine,
packed together and in ragged chunks. Whatever a probe cannot see shows here: state that the model keeps outside its KV, a
layer that looks across the sequences of a batch, a backend or a swapped module that computes something else. Such a model is
refused at start-up; it never serves a wrong token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from core.errors import ModelError
from engine.model import LoadedModel
from engine.plan import Scheduled, StepPlan, trial_plan

CHECK_TOKENS = 12
_CHUNKS = ((4, 1, 2, 1, 4), (2, 5, 1, 1, 3))
_REFERENCE = "eager"
_EXACT_TOLERANCE = 1e-3
_ROUNDED_TOLERANCE = 0.25


def reference_logits(loaded: LoadedModel) -> list[torch.Tensor]:
    """`[CHECK_TOKENS, vocab]` in float32 for each check sequence, by the model's own code. Raises ModelError."""
    model = loaded.model
    try:
        model.set_attn_implementation(_REFERENCE)
        with torch.inference_mode():
            return [
                model(input_ids=torch.tensor([tokens], device=loaded.device), use_cache=False).logits[0].float()
                for tokens in _prompts(loaded)
            ]
    except (ValueError, TypeError, AttributeError, RuntimeError, IndexError, KeyError, NotImplementedError) as error:
        raise ModelError(f"{loaded.name}: fails on a short prompt with its own attention: {error}") from error


def check_against(
    expected: list[torch.Tensor], loaded: LoadedModel, logits: Callable[[StepPlan], torch.Tensor], width: int, groups: int
) -> None:
    """Compare `logits(plan)`, an engine's, with `expected`, the model's own. `width` blocks hold `CHECK_TOKENS` tokens.

    In float32 every row must agree; in narrower types, where rounding and a changed choice of experts can move single rows,
    the median row.

    Raises:
        ModelError: they differ by more than rounding.
    """
    tokens = [tuple(prompt) for prompt in _prompts(loaded)]
    admit = trial_plan(tokens, width, groups)
    errors = []
    done = [0] * len(tokens)
    for step, counts in enumerate(zip(*_CHUNKS, strict=True)):
        scheduled = tuple(Scheduled(row, done[row], count, True) for row, count in enumerate(counts))
        plan = StepPlan(step, scheduled, admitted=admit.admitted, blocks=admit.blocks) if step == 0 else StepPlan(step, scheduled)
        done = [before + count for before, count in zip(done, counts, strict=True)]
        for row, got in enumerate(logits(plan)):
            errors += differences(got[None], expected[row][done[row] - 1][None])
    wrong = more_than_rounding(errors, loaded.dtype)
    if wrong is not None:
        raise ModelError(
            f"{loaded.name} ({loaded.model.config.model_type}): with a paged KV cache its logits differ from its own by "
            f"{wrong}; it keeps state that the cache does not hold"
        )


def differences(got: torch.Tensor, expected: torch.Tensor) -> list[float]:
    """For each row of `[n, vocab]` logits, the distance between the two as a share of the spread of `expected`."""
    got, expected = got.float(), expected.float()
    spread = (expected - expected.mean(dim=-1, keepdim=True)).norm(dim=-1)
    shares: list[float] = ((got - expected).norm(dim=-1) / spread.clamp_min(1e-30)).tolist()
    return shares


def more_than_rounding(errors: list[float], dtype: torch.dtype) -> str | None:
    """How large the `differences` are, in words, unless rounding explains them. In float32 the worst row counts, in narrower
    types the median."""
    worst = max(errors) if dtype == torch.float32 else sorted(errors)[len(errors) // 2]
    tolerance = _EXACT_TOLERANCE if dtype == torch.float32 else _ROUNDED_TOLERANCE
    return None if worst <= tolerance else f"{worst:.2g} of their spread (at most {tolerance:g} is rounding)"


def _prompts(loaded: LoadedModel) -> list[list[int]]:
    """Two fixed sequences of unlike tokens, spread over the vocabulary."""
    size = min(loaded.vocab_size, loaded.model.config.get_text_config().vocab_size)
    return [[(first + step * i) % size for i in range(CHECK_TOKENS)] for first, step in ((size // 3, 101), (size // 2, 37))]
