"""Every message that crosses the data plane, one frozen struct each, grouped by who receives it.

Each process owns one *mailbox* (`mail.mailbox`); messages are one-way. Who sends what to whom:

    gateway -> worker     Submit, Keep, Cancel
    decode  -> prefill    Renew, Grant, Withdrawn
    prefill -> decode     Renew, Withdrawn        (KV itself, its commit and its abort: `kv_transfer`)
    worker  -> gateway    Tokens, Failed, Heartbeat

Any of them may be lost, come twice, late, or out of order: `Keep` and `Renew`, which are said again and again, repair it.

Receivers drop what is fenced: what comes from an older incarnation of its sender, or of an attempt that they do not know, but for
the words that ask after one: those they answer.
Times are durations in seconds; no clock reading crosses the wire.
"""

from __future__ import annotations

import msgspec

from core.attempts import Phase
from core.cost import CostModel
from core.layout import KVLayout
from core.request import FinishReason
from core.sampling import SamplingParams


class Address(msgspec.Struct, frozen=True):
    """Where one incarnation of a process takes messages. `mailbox` is a ZeroMQ endpoint."""

    name: str
    incarnation: int
    mailbox: str


# --- to a worker ------------------------------------------------------------------------------------------------------


class Submit(msgspec.Struct, frozen=True, kw_only=True, tag="submit"):
    """Serve an attempt.

    Attributes:
        attempt: made by the gateway, never used twice.
        tokens: packed prompt and, when an earlier attempt had already delivered some, the tokens delivered.
        prompt_tokens: how many of them are the prompt. Generation goes on at output position
            `len(tokens) - prompt_tokens`.
        stage: what this worker does: `prefill` the tokens and send their KV to a `peer`, `decode` what that peer
            prefills, or do it all (`local`).
        peer: the other worker of a disaggregated attempt.
        deadline_s: give up, with an error, this long after receipt.
        ticket: the request's age among all requests of the cluster, smaller is older; equal on both workers, kept by retries.
    """

    attempt: str
    gateway: Address
    tokens: bytes
    prompt_tokens: int
    sampling: SamplingParams
    stage: str
    peer: Address | None = None
    salt: bytes = b""
    deadline_s: float = 600.0
    ticket: int = 0


class Wanted(msgspec.Struct, frozen=True, array_like=True):
    """An attempt that a gateway still waits for, and the output position of the first token that it does not have."""

    attempt: str
    position: int


class Keep(msgspec.Struct, frozen=True, kw_only=True, tag="keep"):
    """Gateway to worker, several times a lease: these attempts of mine you should have. What the worker has and the gateway
    does not list for a lease, it ends. What the gateway lists and the worker does not know, it answers with `Failed`; tokens
    that were sent and did not arrive, it sends again."""

    gateway: Address
    wanted: tuple[Wanted, ...]


class Cancel(msgspec.Struct, frozen=True, kw_only=True, tag="cancel"):
    """The gateway no longer wants the attempt: free all it holds and say nothing more of it."""

    attempt: str


class Grant(msgspec.Struct, frozen=True, kw_only=True, tag="grant"):
    """Decode to prefill: there is room for the attempt's KV; push it.

    Attributes:
        grant: fencing id of this reservation, never used twice by this decode instance, in any incarnation.
        decode: the sender.
        endpoints: where the `Receiver` of each of its ranks listens.
        first_token: push tokens from here on; earlier ones are in the sender's prefix cache.
        windowed: of each layer, push only what its sliding window sees behind the prompt: the sender keeps no more.
        lease_s: the reservation ends this long after the last sign of life (a frame or a `Renew`).
        answers: number of the newest `Renew` that the sender had heard of the attempt. A prompt that has lost its blocks since
            is no longer what the grant is for.
    """

    attempt: str
    grant: int
    decode: Address
    endpoints: tuple[str, ...]
    first_token: int
    windowed: bool
    lease_s: float
    answers: int


class AttemptState(msgspec.Struct, frozen=True, array_like=True):
    """Where an attempt stands at the sender."""

    attempt: str
    phase: Phase


class Renew(msgspec.Struct, frozen=True, kw_only=True, tag="renew"):
    """Prefill to decode, or decode to prefill: these attempts are alive here, and this is where they stand; keep what you hold
    for them. Sent several times a lease, and at once when a prompt is admitted, which asks for a grant.

    `number` goes up with every renewal of the sender, so that an old one that comes late is known as such."""

    worker: Address
    number: int
    states: tuple[AttemptState, ...]


class Withdrawn(msgspec.Struct, frozen=True, kw_only=True, tag="withdrawn"):
    """Prefill to decode, or decode to prefill: the attempt is over on my side (it failed, was cancelled, expired, or ended with
    its first token), and the gateway knows it. Stop. Also the answer to a `Renew` that still lists it."""

    worker: Address
    attempt: str
    reason: str


class Handoff(msgspec.Struct, frozen=True, kw_only=True):
    """What travels behind the last KV frame: the token that prefill drew at output position `position`, after `tokens`
    tokens of context. All other sampler state follows from the tokens and the position."""

    token: int
    position: int
    tokens: int


# --- to a gateway -----------------------------------------------------------------------------------------------------


class TokenLogprobs(msgspec.Struct, frozen=True):
    """Log-probability of the drawn token and the most likely alternatives, best first: `(token, logprob)`."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class ServedBy(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker reports once per attempt, with its first tokens there.

    `queue_s` is from receipt to the first step; `compute_s` the steps until the first token (prefill); `cached_tokens` came
    out of its prefix cache; `kv_bytes` and `transfer_s` describe the KV that arrived from another worker (decode).
    """

    queue_s: float = 0.0
    compute_s: float = 0.0
    cached_tokens: int = 0
    kv_bytes: int = 0
    transfer_s: float = 0.0


class TokenItem(msgspec.Struct, frozen=True, kw_only=True):
    """New output tokens of one attempt, the first at output position `position`."""

    attempt: str
    position: int
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish: FinishReason | None = None
    stop_token: int | None = None
    served: ServedBy | None = None


class Tokens(msgspec.Struct, frozen=True, kw_only=True, tag="tokens"):
    """All that one step of one worker produced for one gateway. `age_s` is the time from sampling to sending."""

    worker: Address
    items: tuple[TokenItem, ...]
    age_s: float = 0.0


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """The attempt is over at this worker. `code` is a `core.errors` code."""

    worker: Address
    attempt: str
    code: str
    message: str


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What an instance is busy with.

    `steps` grows with every engine step, `step_age_s` is how long ago the loop last came round, `stalled_s` how long there has
    been no sign of life: no turn of the loop or, in a step, no layer and no end of it on the device. Both are measured anew for
    each beat, so that a heart that beats over a loop or a device that hangs shows it; without work they stay near 0.
    `newest_ticket` is the largest ticket seen here.
    """

    waiting: int = 0
    waiting_tokens: int = 0
    running: int = 0
    context_tokens: int = 0
    free_blocks: int = 0
    held_blocks: int = 0
    steps: int = 0
    step_age_s: float = 0.0
    draining: bool = False
    newest_ticket: int = 0
    stalled_s: float = 0.0


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True, tag="heartbeat"):
    """An instance introduces itself and says how it is, several times a second.

    `capacity_tokens`: the longest sequence that its cache could hold, were it alone.
    """

    worker: Address
    role: str
    accelerator: str
    model: str
    fingerprint: str
    layout: KVLayout
    total_blocks: int
    capacity_tokens: int
    max_model_len: int
    max_num_seqs: int
    kv_endpoint: str
    cost: CostModel
    load: Load
    node: str = ""


ToWorker = Submit | Keep | Cancel | Grant | Renew | Withdrawn
ToGateway = Tokens | Failed | Heartbeat
Message = ToWorker | ToGateway
