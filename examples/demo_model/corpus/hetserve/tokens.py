"""Tokens: how they are drawn, and how long one waits for them (docs/architecture.md, ADR 6; docs/benchmarks.md)."""

from __future__ import annotations

from examples.demo_model.corpus.hetserve.fact import Fact

FACTS = (
    Fact(
        "token",
        "a token",
        ("What are tokens?", "How long is a token?", "What does token mean?", "Is a token a word?"),
        (
            "A token is a piece of text, often a word or a part of one.",
            "A token is a piece of text, often a word or a part of a word. Models read and write tokens.",
        ),
    ),
    Fact(
        "tokenizer",
        "a tokenizer",
        ("What does a tokenizer do?", "Who turns text into tokens?", "Where does tokenising happen?", "What is tokenising?"),
        (
            "A tokenizer turns text into tokens and back; the gateway does that.",
            "A tokenizer cuts text into tokens and joins tokens to text again. In HetServe the gateway does it.",
        ),
    ),
    Fact(
        "greedy",
        "greedy decoding",
        (
            "What does greedy mean?",
            "What does temperature zero do?",
            "How does greedy decoding choose?",
            "When is decoding greedy?",
        ),
        (
            "Greedy decoding always takes the most likely token.",
            "Greedy decoding takes the most likely token at every step, so the same prompt always gives the same answer.",
        ),
    ),
    Fact(
        "sampling",
        "sampling",
        ("How are tokens sampled?", "How does sampling work in HetServe?", "What is drawn at random?", "How are tokens drawn?"),
        (
            "Sampling draws the next token at random by its probability, keyed by seed and position.",
            (
                "Sampling draws tokens by their probability. In HetServe a draw depends on the seed and the position only, so "
                "any worker draws the same token."
            ),
        ),
    ),
    Fact(
        "seed",
        "a seed",
        (
            "What does the seed do?",
            "What are seeds for?",
            "Does the same seed give the same tokens?",
            "How do seeds work?",
            "What happens if I set a seed?",
        ),
        (
            "The same seed gives the same tokens on any worker.",
            (
                "A seed fixes the random draws. They are keyed by seed and position, so the same seed gives the same tokens on "
                "any worker, even after a failure."
            ),
        ),
    ),
    Fact(
        "speculative",
        "speculative decoding",
        (
            "What does speculative decoding do?",
            "What is a draft model?",
            "How does speculative decoding work?",
            "What is the draft model for?",
        ),
        (
            "In speculative decoding a small draft model proposes tokens and the large model checks several of them at once.",
            "A small draft model guesses a few tokens, and the large model checks them in one step.",
        ),
    ),
    Fact(
        "ttft",
        "TTFT",
        ("What does TTFT mean?", "What is time to first token?", "What does TTFT stand for?", "How long until the first token?"),
        (
            "TTFT is the time to first token: how long a client waits for the first token.",
            "TTFT means time to first token. It is the wait from the request to the first token of the answer.",
        ),
    ),
    Fact(
        "tpot",
        "TPOT",
        ("What does TPOT mean?", "What is time per output token?", "What does TPOT stand for?", "How is TPOT measured?"),
        (
            "TPOT is the time per output token, the mean time between tokens after the first.",
            "TPOT means time per output token. It is the average time that each token after the first takes.",
        ),
    ),
    Fact(
        "itl",
        "ITL",
        ("What does ITL mean?", "What is inter-token latency?", "What does ITL stand for?", "How does ITL differ from TPOT?"),
        (
            "ITL is the inter-token latency: the gap between one token and the next.",
            "ITL means inter-token latency. It is each single gap between two tokens, while TPOT is their mean.",
        ),
    ),
    Fact(
        "slo",
        "an SLO",
        ("What does SLO mean?", "What does SLO stand for?", "What are SLOs?", "Which targets can a request have?"),
        (
            "An SLO is a service level objective, such as a first token within one second.",
            (
                "SLO means service level objective. It is a target for latency, such as a TTFT of one second and a TPOT of 40 "
                "milliseconds."
            ),
        ),
    ),
    Fact(
        "goodput",
        "goodput",
        (
            "What does goodput mean?",
            "How is goodput measured?",
            "What is the difference between goodput and throughput?",
            "Why does goodput matter?",
        ),
        (
            "Goodput is the number of requests per second that meet their latency targets.",
            (
                "Goodput counts only the requests per second that met their targets for TTFT and TPOT. Throughput counts all "
                "of them."
            ),
        ),
    ),
)
