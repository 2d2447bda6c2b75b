"""What an instance's cost model says of its present load. Pure arithmetic, in seconds.

The shape is DistServe's: a queue drains at the speed of prefill, a decode step grows with its batch and its context.
"""

from __future__ import annotations

from router.state import Instance

EXPECTED_OUTPUT_TOKENS = 128
"""How long a running sequence is taken to hold its slot, in tokens, when nothing better is known."""


def drain_s(instance: Instance) -> float:
    """Time until the prompts that wait there are prefilled, taking them to be of equal length."""
    tokens = instance.waiting_tokens
    if not tokens:
        return 0.0
    cost = instance.beat.cost
    prompts = max(1, instance.beat.load.waiting + instance.assigned_sequences)
    return cost.step_s + tokens * (cost.prefill_token_s + cost.attention_s * tokens / (2 * prompts))


def decode_step_s(instance: Instance, context_tokens: int = 0) -> float:
    """Time of a decode step there with one more sequence of `context_tokens`."""
    load, cost = instance.beat.load, instance.beat.cost
    batch = load.running + instance.assigned_sequences + 1
    context = load.context_tokens + instance.assigned_context_tokens + context_tokens
    return cost.step_s + cost.decode_sequence_s * batch + cost.decode_context_s * context


def slot_wait_s(instance: Instance, context_tokens: int, step_s: float) -> float:
    """Time until the instance has a batch slot and blocks for one more sequence; 0 when it has them now."""
    beat = instance.beat
    ahead = instance.sequences + 1 - beat.max_num_seqs
    short = _blocks(instance, context_tokens + instance.assigned_context_tokens + 1) - beat.load.free_blocks
    if ahead <= 0 and short <= 0:
        return 0.0
    held = max(1, beat.total_blocks - beat.load.free_blocks)
    turns = max(ahead / beat.max_num_seqs, short / held)
    return EXPECTED_OUTPUT_TOKENS * step_s * turns


def _blocks(instance: Instance, tokens: int) -> int:
    """Blocks of all groups of layers for so many tokens of one sequence more and of those on their way. A window keeps no more of
    each than it sees."""
    windows = [group.sliding_window for group in instance.groups.groups]
    kept = [tokens if window is None else min(tokens, window * (instance.assigned_sequences + 1)) for window in windows]
    return sum([-(-each // instance.beat.layout.block_size) for each in kept])
