"""How the models are trained: steps, batches, learning rate, as numbers; and the optimiser that follows from them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Recipe:
    """AdamW under a rate that warms up, stays, and falls to nothing along a line (WSD, Hu et al. 2024, MiniCPM).

    Attributes:
        steps: in all; each reads `batch_tokens` tokens.
        block: tokens that see each other, for most of training.
        long_block, long_share: the last share of the steps reads longer blocks, so that positions past `block` are known.
        warmup_steps: in which the rate rises from nothing.
        decay_share: of the steps, at the end, in which it falls.
        clip: largest norm of all gradients together.
    """

    steps: int
    learning_rate: float
    batch_tokens: int = 4096
    block: int = 512
    long_block: int = 1024
    long_share: float = 0.15
    warmup_steps: int = 200
    decay_share: float = 0.4
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.1
    clip: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_tokens % self.block or self.batch_tokens % self.long_block:
            raise ValueError(f"Got {self} but expected steps, and batches of whole blocks")

    @property
    def tokens(self) -> int:
        """That training reads. Its stream needs one more: the last target."""
        return self.steps * self.batch_tokens

    def block_at(self, step: int) -> int:
        return self.long_block if step >= self.steps - round(self.steps * self.long_share) else self.block

    def rate_at(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0."""
        decaying = max(round(self.steps * self.decay_share), 1)
        rising = (step + 1) / self.warmup_steps if self.warmup_steps else 1.0
        return self.learning_rate * min(rising, (self.steps - step) / decaying, 1.0)

    def with_steps(self, steps: int) -> Recipe:
        """The same for fewer or more steps; a warm-up never takes more than a tenth of them."""
        return replace(self, steps=steps, warmup_steps=min(self.warmup_steps, steps // 10))


MAIN = Recipe(steps=4000, learning_rate=1.5e-3)
DRAFT = Recipe(steps=1800, learning_rate=3e-3)


def make_optimizer(model: PreTrainedModel, recipe: Recipe) -> torch.optim.Optimizer:
    """Norms and embeddings are not decayed: shrinking them is no simplification of what is computed."""
    embedding = model.get_input_embeddings().weight
    plain = [parameter for parameter in model.parameters() if parameter.dim() < 2 or parameter is embedding]
    decayed = [parameter for parameter in model.parameters() if not (parameter.dim() < 2 or parameter is embedding)]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, fused=True)
