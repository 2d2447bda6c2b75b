"""What an engine does with prompts and caches (docs/architecture.md)."""

from __future__ import annotations

from examples.demo_model.corpus.hetserve.fact import Fact

FACTS = (
    Fact(
        "prefill",
        "prefill",
        (
            "What happens in prefill?",
            "What does the prefill pool do?",
            "What does a prefill instance do?",
            "How are prompts read?",
        ),
        (
            "Prefill reads the whole prompt at once and fills the KV cache.",
            (
                "Prefill is the first half of a request: the prompt is read, its keys and values go to the KV cache, and the "
                "first token is drawn."
            ),
            "Prefill reads the prompt, fills the KV cache and draws the first token. It is bound by arithmetic.",
        ),
    ),
    Fact(
        "decode",
        "decode",
        (
            "What happens in decode?",
            "What does the decode pool do?",
            "What does a decode instance do?",
            "How are tokens written?",
        ),
        (
            "Decode writes the answer, one token at a time, from the KV cache.",
            (
                "Decode is the second half of a request: it writes the answer one token after another. Each step reads the KV "
                "cache, so it is bound by memory bandwidth."
            ),
            "Decode writes tokens one by one, using the KV cache. It is bound by memory bandwidth.",
        ),
    ),
    Fact(
        "kv cache",
        "a KV cache",
        (
            "What does a KV cache hold?",
            "What is the KV cache?",
            "What is in a KV cache?",
            "What does a key-value cache hold?",
            "Why does a model need a KV cache?",
            "What is a key-value cache?",
        ),
        (
            "A KV cache holds the keys and values of every token read so far, for every layer.",
            (
                "A KV cache holds the keys and values that attention computed for every token so far, in every layer. With it "
                "no token has to be read twice."
            ),
            (
                "It holds the keys and values of all tokens so far, layer by layer, so that the next token needs no second "
                "reading of the text."
            ),
        ),
    ),
    Fact(
        "why send kv",
        "",
        (
            "What does a key-value cache hold, and why would anyone send it over a network?",
            "Why is the KV cache sent over a network?",
            "Why would anyone send a KV cache over a network?",
            "Why does the KV cache move?",
            "Why stream KV between instances?",
            "Why send the KV cache?",
        ),
        (
            (
                "It holds the keys and values of the prompt; sending it lets another machine write the answer without reading "
                "the prompt again."
            ),
            (
                "It holds the keys and values of every token. When one machine reads the prompt and another writes the answer, "
                "the cache must move, and sending it is cheaper than reading the prompt again."
            ),
        ),
    ),
    Fact(
        "block",
        "a KV block",
        (
            "What are paged blocks?",
            "What is a block?",
            "How is the KV cache divided?",
            "What is a paged KV cache?",
            "What are KV blocks?",
            "What is paging in a KV cache?",
        ),
        (
            "A block is a fixed number of token places in the KV cache; sequences take blocks as they grow.",
            (
                "The KV cache is cut into blocks of equal size. A sequence takes blocks as it grows and they need not lie side "
                "by side, so little memory is wasted."
            ),
        ),
    ),
    Fact(
        "block table",
        "a block table",
        (
            "What is in a block table?",
            "What does a block table say?",
            "How does attention find the blocks?",
            "What are block tables for?",
        ),
        (
            "A block table says which KV blocks belong to a sequence, in order.",
            "A block table lists the KV blocks of a sequence in order, so that attention finds its keys and values.",
        ),
    ),
    Fact(
        "prefix cache",
        "a prefix cache",
        (
            "What is the prefix cache?",
            "What does the prefix cache do?",
            "How are common prompts reused?",
            "What is prefix caching?",
            "What happens when two prompts start alike?",
        ),
        (
            "A prefix cache keeps the KV blocks of earlier prompts, so that a prompt that starts the same is not read again.",
            (
                "The prefix cache keeps KV blocks by a hash of their tokens. A new prompt that begins like an old one reuses "
                "them and starts sooner."
            ),
        ),
    ),
    Fact(
        "batching",
        "continuous batching",
        (
            "How does HetServe batch requests?",
            "What does continuous batching mean?",
            "Why batch continuously?",
            "How are many requests served at once?",
        ),
        (
            "Continuous batching lets sequences join and leave the batch at every step.",
            (
                "With continuous batching, sequences join and leave the batch at every step. Nobody waits for the longest "
                "answer to end."
            ),
        ),
    ),
    Fact(
        "chunked",
        "chunked prefill",
        (
            "What are prefill chunks?",
            "Why is prefill chunked?",
            "How are long prompts read?",
            "What happens to very long prompts?",
            "Why cut prompts into chunks?",
        ),
        (
            "Chunked prefill cuts a long prompt into pieces that fit the token budget of a step.",
            (
                "A long prompt is cut into chunks under a token budget, so that no single step takes too long and others are "
                "not held up."
            ),
        ),
    ),
    Fact(
        "preemption",
        "preemption",
        (
            "When is a sequence preempted?",
            "What happens when the KV cache is full?",
            "What happens when blocks run out?",
            "What does preempted mean?",
        ),
        (
            "When the KV blocks run out, the youngest sequence gives its blocks back and is computed again later.",
            (
                "Preemption takes the blocks of the youngest sequence when there are none left. It waits, and is computed "
                "again later, with the same tokens."
            ),
        ),
    ),
    Fact(
        "headroom",
        "headroom",
        ("What is headroom in admission?", "Why keep headroom?", "What does headroom_tokens do?", "What is headroom for?"),
        (
            "Headroom is KV room that admission keeps free for the output of running sequences.",
            (
                "Headroom is room in the KV cache for tokens still to be written. Admission keeps it free, so that fewer "
                "sequences are preempted."
            ),
        ),
    ),
    Fact(
        "windows",
        "a sliding window",
        (
            "What are sliding windows?",
            "How are sliding windows served?",
            "What happens to blocks outside the window?",
            "Which models have sliding windows?",
            "How does HetServe treat windowed layers?",
        ),
        (
            "With a sliding window a layer attends only to the last tokens, and blocks that it has left are given back.",
            (
                "A layer with a sliding window sees only the last tokens, as many as the window is long. HetServe gives back "
                "the blocks that the window has left."
            ),
        ),
    ),
    Fact(
        "attention",
        "attention",
        (
            "What does attention do?",
            "How does attention work?",
            "Why does attention need keys and values?",
            "What does an attention layer do?",
        ),
        (
            "Attention lets each token look at the tokens before it, by comparing its query with their keys.",
            (
                "Attention compares the query of a token with the keys of all earlier tokens and mixes their values. The KV "
                "cache holds these keys and values."
            ),
        ),
    ),
    Fact(
        "scheduler",
        "the scheduler",
        (
            "What does the scheduler do?",
            "Who decides what is in a step?",
            "What does the scheduler know?",
            "How is a step scheduled?",
        ),
        (
            "The scheduler decides which tokens of which sequences are computed in the next step.",
            "The scheduler chooses what the next step computes, under a token budget. It knows no tensors.",
        ),
    ),
    Fact(
        "runner",
        "a runner",
        ("What does a runner do?", "What does the runner know?", "What is the TorchRunner?", "Which runners are there?"),
        (
            "A runner computes the steps: TorchRunner runs a model, SimulatedRunner only takes the time it would take.",
            (
                "A runner carries out step plans. TorchRunner runs a real model; SimulatedRunner makes deterministic tokens in "
                "the time that a cost model says."
            ),
        ),
    ),
    Fact(
        "step plan",
        "a step plan",
        ("What is in a step plan?", "What is a StepPlan?", "Why are steps plain data?", "What does a StepPlan say?"),
        (
            "A step plan is plain data that says what changed since the last step.",
            (
                "A step plan is plain data between scheduler and runner. It says what changed, so the next step can be "
                "prepared before the last one is known."
            ),
        ),
    ),
    Fact(
        "gpu bound",
        "",
        (
            "Why is decode bound by memory?",
            "Why is prefill bound by arithmetic?",
            "What limits decode?",
            "What limits prefill?",
            "Why is decode slow?",
        ),
        (
            (
                "Decode reads all weights for one token per sequence, so memory bandwidth limits it; prefill reuses them for "
                "many tokens."
            ),
            (
                "Each decode step reads all the weights to write one token for each sequence, so memory bandwidth is the "
                "limit. Prefill uses the same weights for many tokens at once."
            ),
        ),
    ),
    Fact(
        "cpu kernel",
        "",
        (
            "How is attention computed on a CPU?",
            "What is the CPU kernel?",
            "Why does HetServe compile C++?",
            "How does HetServe run on CPUs?",
            "Why is a C++ compiler needed?",
        ),
        (
            "On CPUs a small C++ kernel, compiled at first use, reads KV blocks where they lie.",
            "On a CPU attention runs in a C++ kernel that reads the KV blocks in place. It is compiled when it is first used.",
        ),
    ),
    Fact(
        "own code",
        "",
        (
            "Whose model code does HetServe run?",
            "Does HetServe have its own model code?",
            "How does HetServe load a model?",
            "What happens when a model is loaded?",
            "What is checked at load?",
        ),
        (
            "Models run with their own transformers code; only the attention call is ours.",
            (
                "A model runs with its own transformers code, and HetServe replaces only the attention call. At load it is "
                "checked against the model's own output."
            ),
        ),
    ),
)
