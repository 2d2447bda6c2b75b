"""What happens when one of a cluster dies, hangs, drains or has too much to do (docs/architecture.md, ADR 7)."""

from __future__ import annotations

from examples.demo_model.corpus.hetserve.fact import Fact

FACTS = (
    Fact(
        "worker dies",
        "",
        (
            "What happens when a worker dies?",
            "What happens if a worker dies?",
            "What if an instance fails?",
            "What happens when a decode instance dies?",
            "How does HetServe handle failures?",
            "What if a GPU fails in the middle of an answer?",
            "What happens to my answer when a worker dies?",
        ),
        (
            "The gateway starts a new attempt elsewhere from the tokens already sent, and the answer goes on.",
            (
                "The gateway notices the silence and starts a new attempt on another worker, from the prompt and the tokens "
                "already delivered. Nothing is sent twice, and a replacement starts by itself."
            ),
            (
                "A dead worker costs a retry. The request goes on elsewhere from what the client has already seen, with the "
                "same tokens, and nothing is sent twice."
            ),
        ),
    ),
    Fact(
        "same after death",
        "",
        (
            "Is the answer the same after a failure?",
            "Do the tokens change when a worker dies?",
            "Why is the answer the same after a death?",
            "Can a failure change the answer?",
            "How does it draw the same tokens again?",
        ),
        (
            "The tokens stay the same: draws are keyed by seed and position, so a new attempt draws the same ones.",
            (
                "The answer stays the same. Draws depend on the seed and the position only, so the new attempt draws what the "
                "old one would have drawn."
            ),
        ),
    ),
    Fact(
        "gateway dies",
        "",
        (
            "What happens when the gateway dies?",
            "What if the gateway fails?",
            "Is the gateway a single point of failure?",
            "What happens to streams when the gateway dies?",
            "What happens without the gateway?",
        ),
        (
            "When the gateway dies, its streams end, and workers stop working for it within a lease.",
            "The streams of that gateway end, because the journal is there. Workers free what they held for it within a lease.",
        ),
    ),
    Fact(
        "prefill dies",
        "",
        (
            "What happens when a prefill instance dies?",
            "What if prefill fails?",
            "What if the prefill worker dies during the transfer?",
            "What happens to a prompt when its worker dies?",
            "Who reads the prompt when prefill dies?",
        ),
        (
            "The gateway sends the request to another prefill instance as a new attempt.",
            (
                "A new attempt starts on another prefill instance. Decode drops the KV that was not complete, because only a "
                "whole transfer may run."
            ),
        ),
    ),
    Fact(
        "noticed",
        "",
        (
            "How is a dead worker noticed?",
            "How does the gateway notice a death?",
            "How fast is a dead worker noticed?",
            "How long until a death is noticed?",
            "When does a worker count as dead?",
        ),
        (
            "By its heartbeats: a worker that is silent for a second and a half is dead to the gateway.",
            "Workers send a heartbeat five times a second. One that is silent for a second and a half counts as dead.",
        ),
    ),
    Fact(
        "stuck",
        "a stuck worker",
        ("When is a worker stuck?", "What does stuck mean?", "What happens to a worker that hangs?", "What if a worker hangs?"),
        (
            "A stuck worker still beats but makes no progress; its work moves elsewhere and it is replaced.",
            (
                "A worker is stuck when its heart beats but its work shows no sign of life for three seconds. Its work moves "
                "elsewhere, and the controller replaces it."
            ),
        ),
    ),
    Fact(
        "replacement",
        "",
        (
            "Who replaces a dead worker?",
            "How is a dead instance replaced?",
            "Does a dead worker come back?",
            "Who starts a new worker?",
            "Does Ray restart workers?",
        ),
        (
            "The controller starts a replacement with a higher incarnation.",
            (
                "Ray tells the controller, and the controller starts a replacement with a higher incarnation. Messages of the "
                "old one are refused from then on."
            ),
        ),
    ),
    Fact(
        "incarnation",
        "an incarnation",
        (
            "What are incarnations?",
            "What does incarnation mean?",
            "Why do instances have incarnations?",
            "What is an incarnation number?",
        ),
        (
            "An incarnation is the number of lives of an instance; each replacement has a higher one.",
            (
                "An incarnation counts the lives of an instance. A replacement has a higher one, and messages of the old one "
                "are refused."
            ),
        ),
    ),
    Fact(
        "heartbeat",
        "a heartbeat",
        (
            "What are heartbeats for?",
            "What does a heartbeat say?",
            "Why do workers send heartbeats?",
            "How often do workers beat?",
        ),
        (
            "A heartbeat is a message that a worker sends five times a second to say that it is alive.",
            (
                "A heartbeat says that a worker is alive and how busy it is. It comes five times a second, and the router "
                "decides by it."
            ),
        ),
    ),
    Fact(
        "drain",
        "draining",
        (
            "What does drain mean?",
            "What happens when a worker drains?",
            "How do I stop a cluster?",
            "How does HetServe shut down?",
            "What does SIGTERM do?",
            "Can a drain be taken back?",
        ),
        (
            "A draining instance finishes what it has and takes no new work.",
            (
                "When an instance drains, it finishes its running requests and refuses new ones, which go elsewhere. SIGTERM "
                "drains the whole cluster."
            ),
        ),
    ),
    Fact(
        "overload",
        "",
        (
            "What happens when the cluster is full?",
            "What happens under overload?",
            "What does a 429 mean?",
            "When is a request refused?",
            "What if too many requests come?",
        ),
        (
            "When there is too much work, a request is refused with a 429 and a Retry-After.",
            "The router rejects what the cluster cannot take, and the client gets a 429 with a Retry-After header.",
        ),
    ),
    Fact(
        "cancel",
        "",
        (
            "What happens when a client disconnects?",
            "Can I cancel a request?",
            "What happens when I cancel?",
            "What happens at a deadline?",
            "What if the client goes away?",
        ),
        (
            "The gateway tells both workers, and they stop and free the blocks.",
            (
                "When a client cancels or disconnects, the gateway tells both workers, and they free everything that was held "
                "for the request."
            ),
        ),
    ),
    Fact(
        "tested",
        "",
        (
            "How is HetServe tested?",
            "What do the tests show?",
            "Is HetServe well tested?",
            "How do you know that it works?",
            "What is tested in virtual time?",
        ),
        (
            "Tests compare its tokens with transformers.generate and kill workers under load.",
            (
                "Its tokens are compared with transformers.generate, whole clusters run in virtual time with lost messages, "
                "and real workers are killed under load."
            ),
        ),
    ),
)
