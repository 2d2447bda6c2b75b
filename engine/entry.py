"""What can be known of a sequence before it enters an engine. Whatever could break a step, or never end, is refused here: token
ids given by clients reach tensors unchecked."""

from __future__ import annotations

from core.errors import ContextLengthExceeded, InvalidRequest
from core.tokens import within
from engine.sequence import Sequence, Status


def check_new(sequence: Sequence, vocab_size: int, max_model_len: int) -> None:
    """Refuse a sequence that a model of these sizes cannot serve.

    Raises:
        ContextLengthExceeded: prompt and `max_tokens` exceed the model.
        InvalidRequest: a token id outside the vocabulary, or nothing left to generate.
        ValueError: it was in an engine before.
    """
    sampling = sequence.sampling
    if sequence.status is not Status.WAITING or sequence.tables or sequence.computed_tokens:
        raise ValueError(f"sequence {sequence.sequence_id} is not new: {sequence.status.value}")
    outside = f"Got a token id outside the vocabulary of {vocab_size}"
    if not within(sequence.tokens, vocab_size):
        raise InvalidRequest(outside, "prompt")
    if max(sampling.logit_bias, default=0) >= vocab_size:
        raise InvalidRequest(outside, "logit_bias")
    if max(sampling.stop_token_ids, default=0) >= vocab_size:
        raise InvalidRequest(outside, "stop_token_ids")
    remaining = sampling.max_tokens - sequence.output_tokens
    if remaining < 1:
        raise InvalidRequest(f"{sequence.output_tokens} of {sampling.max_tokens} tokens are there already", "max_tokens")
    if len(sequence.tokens) + remaining > max_model_len:
        wanted = f"{sequence.prompt_tokens} prompt tokens and max_tokens = {sampling.max_tokens}"
        raise ContextLengthExceeded(f"Got {wanted} but the model takes {max_model_len}", "max_tokens")
