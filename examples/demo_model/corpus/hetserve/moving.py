"""How KV moves and what keeps it right (docs/architecture.md, ADR 2, 12 to 16)."""

from __future__ import annotations

from examples.demo_model.corpus.hetserve.fact import Fact

FACTS = (
    Fact(
        "transfer",
        "KV transfer",
        (
            "How does KV move between instances?",
            "How is the KV cache transferred?",
            "How does the KV cache get to the decode instance?",
            "How is KV sent?",
        ),
        (
            "Layer by layer: as soon as a layer's keys and values are written, they are sent to the decode instance.",
            (
                "The prefill instance sends KV while it computes. Each layer goes out as soon as it is written, so the wire "
                "works while the next layers compute."
            ),
        ),
    ),
    Fact(
        "carriers",
        "",
        (
            "What carries the KV?",
            "Which transports does HetServe have?",
            "Does it use TCP or shared memory?",
            "What is the transport setting?",
            "Which ways can KV take?",
        ),
        (
            "On one host KV goes through shared memory, otherwise over TCP.",
            (
                "KV goes through shared memory between processes of one host, and over TCP between hosts. With auto, each pair "
                "takes the best that works."
            ),
        ),
    ),
    Fact(
        "shared memory",
        "",
        (
            "When is shared memory used?",
            "How does shared memory work in HetServe?",
            "What does shm do?",
            "How do two processes share memory?",
            "How does KV move on one host?",
        ),
        (
            "Shared memory is used when both processes prove that they are on one host.",
            "Two instances that prove to be on one host map the same memory, and KV travels through it.",
        ),
    ),
    Fact(
        "faster",
        "",
        (
            "Is shared memory faster than TCP?",
            "How fast is shared memory?",
            "Which transport is the fastest?",
            "Is TCP slower than shared memory?",
            "How fast is the KV transfer?",
        ),
        (
            "Shared memory is about twice as fast as TCP for large transfers.",
            (
                "On one host, shared memory was about twice as fast as TCP for 64 megabytes and more. For small transfers they "
                "are alike."
            ),
        ),
    ),
    Fact(
        "nccl",
        "NCCL",
        ("What does NCCL do?", "What is NCCL for?", "What does NCCL mean?", "Who makes NCCL?"),
        (
            "NCCL is NVIDIA's library for moving data between GPUs.",
            "NCCL moves data between NVIDIA GPUs. What carries the KV is chosen for each pair of instances, when they meet.",
        ),
    ),
    Fact(
        "gloo",
        "",
        (
            "What is the distributed transport?",
            "Does it use torch.distributed?",
            "What is gloo for?",
            "When should I use gloo?",
            "Can KV go over gloo?",
        ),
        (
            "KV can go over torch.distributed with gloo, if that is asked for by name.",
            (
                "The transport called distributed is torch.distributed over gloo. The automatic choice never takes it, because "
                "it is slower than TCP."
            ),
        ),
    ),
    Fact(
        "digest",
        "a digest",
        (
            "What are digests for?",
            "What does a digest prove?",
            "How are KV frames checked?",
            "How does HetServe know that KV is right?",
            "What happens if KV is damaged?",
        ),
        (
            "A digest is a short number made from bytes; each KV frame carries one, so that damage is noticed.",
            (
                "A digest is computed from the bytes of a KV frame. The receiver computes it again before anything is written, "
                "and refuses a frame whose digest is wrong."
            ),
        ),
    ),
    Fact(
        "grant",
        "a grant",
        ("What does a grant say?", "Who sends a grant?", "What are grants?", "When does decode send a grant?"),
        (
            "A grant is the decode side's permission to send KV: it has room for the prompt.",
            (
                "A grant says that the decode side has room. It carries a fencing number, where to send, from which token on, "
                "and a lease."
            ),
        ),
    ),
    Fact(
        "lease",
        "a lease",
        (
            "What are leases?",
            "What does a lease do?",
            "What happens when a lease ends?",
            "How long is a lease?",
            "Why use leases?",
        ),
        (
            "A lease is a time after which a silent peer is no longer waited for, and what was held for it is freed.",
            (
                "A lease limits how long one side keeps blocks for a silent peer, five seconds by default. When it ends, the "
                "blocks are freed."
            ),
        ),
    ),
    Fact(
        "fence",
        "a fence",
        (
            "What is fencing?",
            "What does a fencing number do?",
            "What are fencing numbers for?",
            "How are late messages refused?",
            "Why are messages fenced?",
        ),
        (
            "A fence is a number that is never used twice, so that late messages of an old attempt are refused.",
            (
                "Fencing keeps old messages out. A grant has a number that is never used twice, and what comes late with an "
                "old number is never written."
            ),
        ),
    ),
    Fact(
        "attempt",
        "an attempt",
        (
            "What are attempts?",
            "What does attempt mean in HetServe?",
            "When does a new attempt start?",
            "What is the life of an attempt?",
        ),
        (
            "An attempt is one try to serve a request on a prefill and a decode instance.",
            (
                "An attempt is one try at a request, with an id of its own. When a worker dies, a new attempt starts elsewhere "
                "from the tokens already delivered."
            ),
        ),
    ),
    Fact(
        "phases",
        "",
        (
            "Which phases does an attempt have?",
            "What are the phases of an attempt?",
            "What is the life cycle of an attempt?",
            "What states can an attempt be in?",
            "What comes after admitted?",
        ),
        (
            "An attempt is waiting, admitted, granted, running and ended.",
            "Waiting, admitted, granted, running, ended. Both sides keep the phase and compare it, so lost messages are noticed.",
        ),
    ),
    Fact(
        "journal",
        "the journal",
        (
            "What is in the journal?",
            "What does the journal hold?",
            "Who keeps the journal?",
            "What is the gateway's journal?",
            "Why keep a journal?",
        ),
        (
            "The journal is the gateway's record of each request: its prompt, its sampling and the tokens delivered.",
            (
                "The gateway keeps a journal of every request: the prompt, the tokens delivered and the sampling. A new "
                "attempt starts from it."
            ),
        ),
    ),
    Fact(
        "renew",
        "a renewal",
        ("What does Renew say?", "What are renewals for?", "How do two workers compare phases?", "How is a lost grant noticed?"),
        (
            "A renewal tells the other worker where an attempt stands, several times a lease.",
            (
                "With a renewal each worker says which phase an attempt is in. Comparing the phases shows which message was "
                "lost, and it is sent again."
            ),
        ),
    ),
    Fact(
        "keep",
        "a Keep message",
        (
            "What does Keep say?",
            "What is Keep for?",
            "What does the gateway tell the workers?",
            "How are lost tokens sent again?",
        ),
        (
            "Keep tells a worker which attempts the gateway still waits for, and from which token on.",
            (
                "The gateway sends Keep several times a lease. It lists the attempts that it waits for, so that a worker sends "
                "again what is missing and ends what nobody wants."
            ),
        ),
    ),
    Fact(
        "lost message",
        "",
        (
            "What happens when a message is lost?",
            "Can a lost message block a request?",
            "What if a message comes twice?",
            "What if the network drops a message?",
            "Are messages acknowledged?",
        ),
        (
            "A lost message is noticed within a lease and made up for.",
            (
                "Nothing stays held for it: renewals show what was lost, and it is sent again. A request ends in its exact "
                "tokens or in one typed error."
            ),
        ),
    ),
    Fact(
        "commit",
        "a commit",
        ("When does decode commit?", "When may a sequence run?", "What is committed?", "When is a transfer complete?"),
        (
            "A commit means that all KV has arrived exactly once, with every digest right and the lease alive.",
            (
                "Decode commits when every layer of every token has arrived once, every digest is right and the lease is "
                "alive. Only then may the sequence run."
            ),
        ),
    ),
    Fact(
        "wound-wait",
        "wound-wait",
        (
            "How are deadlocks avoided?",
            "What prevents deadlock?",
            "Can two pools wait for each other?",
            "What happens when all pools are full?",
            "Why do pools not freeze?",
        ),
        (
            "Wound-wait lets an older request take blocks from a younger one that still waits, so nobody waits in a circle.",
            (
                "Claims on KV blocks are met by age, the same on every instance. An older request may take the blocks of a "
                "younger one that still waits, so pools never freeze."
            ),
        ),
    ),
    Fact(
        "ticket",
        "a ticket",
        ("What are tickets?", "What does a ticket say?", "Who gives out tickets?", "How is the age of a request known?"),
        (
            "A ticket is a number from the gateway that says how old a request is; retries keep it.",
            "A ticket tells the age of a request. The gateway gives it, all engines order claims by it, and retries keep it.",
        ),
    ),
    Fact(
        "back-pressure",
        "back-pressure",
        (
            "What happens if decode has no room?",
            "Where does the KV wait?",
            "What if the decode side is full?",
            "How does back-pressure work?",
        ),
        (
            "If decode has no room, the KV waits on the prefill side until there is a grant.",
            (
                "Back-pressure slows down those in front when those behind are full. Here the KV waits on the prefill side "
                "until the decode side has room."
            ),
        ),
    ),
    Fact(
        "first token",
        "",
        (
            "Who makes the first token?",
            "Where is the first token drawn?",
            "Does the first token wait for the transfer?",
            "When does the client see the first token?",
            "Which instance draws the first token?",
        ),
        (
            "The prefill instance draws the first token and sends it straight to the gateway.",
            (
                "The prefill instance does. The first token goes straight to the gateway, so the client sees it before the KV "
                "transfer ends."
            ),
        ),
    ),
)
