"""Who does what in a cluster (docs/architecture.md, ADR 1 and 11)."""

from __future__ import annotations

from examples.demo_model.corpus.hetserve.fact import Fact

FACTS = (
    Fact(
        "router",
        "the router",
        (
            "What does the router do?",
            "How does the router choose?",
            "Who decides where a request goes?",
            "How are requests routed?",
            "What does the router know?",
        ),
        (
            "The router decides which prefill and which decode instance serve a request.",
            (
                "The router chooses a prefill and a decode instance for each request, from what their heartbeats say. It does "
                "no I/O: it only decides."
            ),
        ),
    ),
    Fact(
        "policy",
        "least-ttft",
        (
            "Which routing policies are there?",
            "What is the default policy?",
            "What does least-ttft do?",
            "How does least TTFT work?",
            "Is there round-robin?",
        ),
        (
            "The policy least-ttft picks the pair of instances with the shortest expected wait.",
            (
                "There are two policies: least-ttft, which picks the pair with the shortest expected wait, and round-robin, "
                "which takes each in turn."
            ),
        ),
    ),
    Fact(
        "local prefill",
        "",
        (
            "Are short prompts moved too?",
            "What is local_prefill_tokens?",
            "What happens to very short prompts?",
            "Can a prompt be read where it is decoded?",
            "Does every request use two instances?",
        ),
        (
            "Short prompts can be read where they decode, so that no KV has to move.",
            (
                "With local_prefill_tokens, prompts up to that length are read on the decode instance itself. No KV has to "
                "move then."
            ),
        ),
    ),
    Fact(
        "gateway",
        "the gateway",
        (
            "What does the gateway do?",
            "What is the job of the gateway?",
            "Who talks to the clients?",
            "What runs in the gateway?",
        ),
        (
            "The gateway is the HTTP door: it speaks the OpenAI API, keeps the journal and streams the tokens.",
            (
                "The gateway checks requests, turns text into tokens, asks the router, keeps the journal and streams the "
                "answer to the client."
            ),
        ),
    ),
    Fact(
        "controller",
        "the controller",
        (
            "What does the controller do?",
            "Who starts the instances?",
            "What is the job of the controller?",
            "Is the controller on the path of a request?",
        ),
        (
            "The controller starts, watches and replaces the actors; it is never on the path of a request.",
            (
                "The controller compares the instances that should exist with those that do, and starts what is missing. "
                "Requests never pass through it."
            ),
        ),
    ),
    Fact(
        "instance",
        "an instance",
        ("What are instances?", "What is a worker?", "What does an instance hold?", "What runs in an instance?"),
        (
            "An instance is a worker: a Ray actor with an engine, a KV cache and a mailbox.",
            "An instance is a Ray actor that holds a model, an engine and a KV cache. Its role is prefill, decode or mixed.",
        ),
    ),
    Fact(
        "pool",
        "a pool",
        ("What are pools?", "What is in a pool?", "Which pools are there?", "What is a prefill pool?"),
        (
            "A pool is a group of instances with the same role on the same kind of accelerator.",
            "A pool is a group of instances of one role, prefill, decode or mixed, on one kind of accelerator.",
        ),
    ),
    Fact(
        "role",
        "a role",
        (
            "Which roles are there?",
            "Can an instance change its role?",
            "What is a mixed instance?",
            "What does mixed mean?",
            "Can a prefill instance also decode?",
        ),
        (
            "A role says what an instance takes work for: prefill, decode or mixed.",
            "The roles are prefill, decode and mixed. Every instance can read and write, and its role can change while it runs.",
        ),
    ),
    Fact(
        "ray",
        "Ray",
        ("What does Ray do in HetServe?", "What is Ray's role?", "Why does HetServe use Ray?", "What is Ray for?"),
        (
            "Ray starts actors, places them by accelerator and tells the controller when one dies.",
            (
                "Ray starts the actors, places them on the right accelerators and says when one dies. It is not on the path of "
                "a request, because messages of our own are much faster."
            ),
        ),
    ),
    Fact(
        "ray path",
        "",
        (
            "Is Ray on the path of a request?",
            "Do tokens go through Ray?",
            "Does a request pass through Ray?",
            "Is Ray slow?",
            "Why do tokens not go through Ray?",
        ),
        (
            "Ray is not on the path of a request: tokens travel through mailboxes of our own.",
            (
                "Requests and tokens do not go through Ray. An actor call takes about a millisecond, a message of ours tens of "
                "microseconds."
            ),
        ),
    ),
    Fact(
        "several gateways",
        "",
        (
            "Whom do clients speak to?",
            "How many gateways are there?",
            "Where is the door of the cluster?",
            "Where does a request come in?",
            "Which part of HetServe speaks HTTP?",
        ),
        (
            "Clients speak to a gateway, which takes requests in and streams the answers out.",
            "The gateway is what clients speak to. How many a cluster has is a matter of its configuration.",
        ),
    ),
    Fact(
        "kuberay",
        "KubeRay",
        (
            "Does HetServe run on Kubernetes?",
            "How do I deploy on Kubernetes?",
            "Are there Kubernetes manifests?",
            "Can I use KubeRay?",
            "What is in the deploy folder?",
        ),
        (
            "KubeRay runs Ray clusters on Kubernetes; the deploy folder has a RayCluster and a RayJob for HetServe.",
            (
                "HetServe runs on Kubernetes with KubeRay. The deploy folder has two manifests, a RayCluster and a RayJob, "
                "with one H100 that reads and three L40S that write."
            ),
        ),
    ),
    Fact(
        "zeromq",
        "ZeroMQ",
        (
            "How do processes talk to each other?",
            "What is a mailbox?",
            "Why not use Ray calls?",
            "What carries the messages?",
            "How do workers and gateway communicate?",
        ),
        (
            "ZeroMQ carries our messages: every process has one mailbox, and messages go one way.",
            (
                "Every process owns a mailbox on ZeroMQ and sends one-way messages. That takes tens of microseconds, while an "
                "actor call takes about a millisecond."
            ),
        ),
    ),
    Fact(
        "security",
        "",
        (
            "Is the traffic authenticated?",
            "Is HetServe secure?",
            "Are the sockets encrypted?",
            "Is anything unpickled?",
            "Do I need an API key?",
        ),
        (
            "Every socket of HetServe between processes is authenticated, and nothing is unpickled from a wire.",
            (
                "Sockets between processes are authenticated, and nothing is unpickled from a wire. To listen beyond loopback "
                "the gateway needs an API key."
            ),
        ),
    ),
    Fact(
        "streaming",
        "streaming",
        (
            "How are tokens streamed?",
            "How does streaming work?",
            "What are server-sent events?",
            "Do tokens come one by one?",
            "How do I stream an answer?",
        ),
        (
            "Tokens are sent to the client one by one as server-sent events.",
            "With streaming, each token is sent to the client as soon as it is there, as a server-sent event.",
        ),
    ),
    Fact(
        "life of a request",
        "",
        (
            "What happens to a request?",
            "What is the life of a request?",
            "Walk me through a request.",
            "How does a request travel?",
            "How does a request pass through HetServe?",
        ),
        (
            (
                "The gateway takes it, the router picks two instances, prefill reads the prompt, the KV moves, and decode "
                "writes the answer."
            ),
            (
                "The gateway takes the request and the router picks a prefill and a decode instance. Prefill reads the prompt "
                "and draws the first token, the KV moves over, and decode writes the rest."
            ),
        ),
    ),
    Fact(
        "engine loop",
        "",
        (
            "Why is there one thread per engine?",
            "Which thread owns the engine?",
            "Does the engine need locks?",
            "What does the engine loop do?",
            "How many threads does an instance have?",
        ),
        (
            "One thread owns the engine and all attempts, so that no locks are needed.",
            (
                "One thread owns the engine: it reads mail, launches steps and sends. The device has a thread of its own, so a "
                "long step blocks nobody's mail."
            ),
        ),
    ),
)
