"""What HetServe is, what it promises, and what it cannot do yet (README.md)."""

from __future__ import annotations

from examples.demo_model.corpus.hetserve.fact import Fact

FACTS = (
    Fact(
        "hetserve",
        "HetServe",
        ("What does HetServe do?", "What is HetServe for?", "Tell me what HetServe is.", "Describe HetServe in a sentence."),
        (
            "HetServe serves language models on mixed GPUs: it reads prompts on one pool and writes tokens on another.",
            (
                "HetServe is LLM serving for the GPUs that you happen to own. It runs prefill and decode on separate pools of "
                "Ray actors and streams KV caches between them."
            ),
            (
                "HetServe serves large language models. It runs prefill and decode on separate pools, sends the KV cache from "
                "one to the other, and speaks the OpenAI API."
            ),
        ),
    ),
    Fact(
        "name",
        "",
        (
            "What does the name HetServe mean?",
            "Why is it called HetServe?",
            "What does Het in HetServe stand for?",
            "Where does the name HetServe come from?",
            "What does the het mean?",
        ),
        (
            "Het stands for heterogeneous: HetServe serves models on GPUs of different kinds.",
            "The name comes from heterogeneous serving. The GPUs need not be alike.",
        ),
    ),
    Fact(
        "disaggregation",
        "disaggregation",
        (
            "What does disaggregated mean?",
            "What is disaggregated serving?",
            "How does disaggregated serving work?",
            "What does it mean to disaggregate prefill and decode?",
        ),
        (
            "Disaggregation means that prefill and decode run on separate instances.",
            (
                "Disaggregation means that one instance reads the prompt and another writes the answer. The KV cache is sent "
                "from the first to the second."
            ),
        ),
    ),
    Fact(
        "why separate",
        "",
        (
            "Why are prefill and decode separate?",
            "Why does HetServe split prefill and decode?",
            "Why use separate pools?",
            "Why not run prefill and decode on the same GPU?",
            "What is the point of separate pools?",
            "Why are there two pools?",
        ),
        (
            (
                "Reading a prompt is bound by arithmetic and writing tokens by memory bandwidth, so each runs on the hardware "
                "that suits it."
            ),
            (
                "Prefill needs arithmetic, and decode needs memory bandwidth. In separate pools each can use the kind of "
                "accelerator that suits it, and long prompts do not slow down running answers."
            ),
            (
                "The two are limited by different things. Prefill is bound by arithmetic, decode by memory bandwidth, so "
                "HetServe gives each its own pool."
            ),
        ),
    ),
    Fact(
        "what it buys",
        "",
        (
            "What does disaggregation buy?",
            "What do I gain from separate pools?",
            "What is better when prefill and decode are apart?",
            "Is disaggregation worth it?",
            "What are the benefits of disaggregation?",
        ),
        (
            "It buys a steady stream: long prompts do not interrupt the tokens of others.",
            (
                "It buys steadier gaps between tokens, because no long prompt gets in the way of decoding. Which layout is "
                "right depends on the targets and the hardware."
            ),
        ),
    ),
    Fact(
        "who uses which gpu",
        "",
        (
            "Which GPUs can I use?",
            "Which GPUs does HetServe need?",
            "Can I mix different GPUs?",
            "Does HetServe work with different GPUs?",
            "What hardware does HetServe use?",
            "Can prefill and decode run on different cards?",
        ),
        (
            "You can mix GPUs: each pool names the accelerator it wants, such as H100 for prefill and L40S for decode.",
            "Any mix that you have. Each pool names its accelerator, for example H100 for prompts and L40S or A10G for tokens.",
        ),
    ),
    Fact(
        "without gpu",
        "",
        (
            "Does it run without a GPU?",
            "Can I run HetServe without a GPU?",
            "Do I need a GPU?",
            "Does HetServe work on a CPU?",
            "Can it run on my laptop?",
        ),
        ("Everything also runs without a GPU, on CPUs.", "No GPU is needed. HetServe also runs on CPUs, only slower."),
    ),
    Fact(
        "gpu tested",
        "",
        (
            "Has HetServe run on a GPU?",
            "Was it tested on GPUs?",
            "Is HetServe tested on CUDA?",
            "How fast is it on a GPU?",
            "Are there GPU benchmarks?",
        ),
        (
            "The benchmarks page of HetServe says for each figure on which machine it was measured, and when.",
            "Look at the page about benchmarks: each figure comes with its machine, its command and its date.",
        ),
    ),
    Fact(
        "models",
        "",
        (
            "Which models can it run?",
            "What models does HetServe support?",
            "Which models does HetServe serve?",
            "Can it run Llama?",
            "What kinds of models run?",
            "Does it run Qwen and Gemma?",
        ),
        (
            "It runs decoders from transformers, such as Llama, Qwen, Mistral, Gemma and gpt-oss.",
            (
                "Any transformers decoder that goes through the library's attention interface, such as Llama, Qwen, Mistral, "
                "Gemma, Phi and Mixtral. Models that it cannot run exactly are refused by name."
            ),
        ),
    ),
    Fact(
        "refused models",
        "",
        (
            "Which models are refused?",
            "What models does HetServe not run?",
            "Can it run Mamba?",
            "Which models do not work?",
            "Why was my model refused?",
        ),
        (
            "Models that keep state outside attention, such as Mamba, are refused by name.",
            (
                "It refuses what it could not compute exactly, such as Mamba or RWKV, which keep state outside attention. The "
                "error names the reason."
            ),
        ),
    ),
    Fact(
        "exact",
        "",
        (
            "How are the tokens exact?",
            "Are the tokens exact?",
            "What does exact mean in HetServe?",
            "How exact is HetServe?",
            "Are the answers the same as with transformers?",
            "Is the output right?",
        ),
        (
            "In fp32, greedy tokens equal those of transformers.generate through the whole path.",
            (
                "Exact means that greedy tokens in fp32 equal those of transformers.generate, through HTTP, prefill, KV "
                "transfer and decode. Tests hold it."
            ),
        ),
    ),
    Fact(
        "licence",
        "",
        (
            "What licence does HetServe have?",
            "Is HetServe open source?",
            "Under which licence is it?",
            "Which license does HetServe use?",
            "May I use HetServe at work?",
        ),
        ("HetServe is licensed under Apache-2.0.", "It is open source under the Apache-2.0 licence."),
    ),
    Fact(
        "not built",
        "",
        (
            "What is not built yet?",
            "What can HetServe not do yet?",
            "What is missing in HetServe?",
            "What are the limits of HetServe?",
            "What is still to be built?",
            "Which features are missing?",
        ),
        (
            "The README says what is built and what is not.",
            "I do not know what is built by now. Asking HetServe for something that is not there is an error that names it.",
        ),
    ),
    Fact(
        "this model",
        "",
        (
            "Which model is this?",
            "How were you trained?",
            "How large are you?",
            "What are you trained on?",
            "How many parameters do you have?",
            "What kind of model are you?",
        ),
        (
            "I am a small Llama-style model with about six million parameters, trained on text that HetServe generates itself.",
            (
                "I am the demo model of HetServe: about six million parameters, trained on a CPU with generated stories, sums, "
                "lists and facts about HetServe."
            ),
        ),
    ),
    Fact(
        "what do you know",
        "",
        (
            "What do you know?",
            "What can you do?",
            "What can I ask you?",
            "What are you good at?",
            "Help.",
            "What do you know about?",
            "What should I ask you?",
        ),
        (
            "I can tell stories, add small numbers, count, make lists and JSON, and answer questions about HetServe.",
            (
                "I can tell short stories, do small sums, count, make lists and JSON objects, and explain HetServe. Ask me "
                "what prefill is, for example."
            ),
        ),
    ),
    Fact(
        "where am i",
        "",
        (
            "Where was this token made?",
            "Where do you run?",
            "Who writes your tokens?",
            "Which machine answers me?",
            "How was this answer made?",
        ),
        (
            "A prefill instance read your prompt and drew my first token; a decode instance wrote the others.",
            (
                "Your prompt was read by a prefill instance. Its KV cache went to a decode instance, which writes these words "
                "one token at a time."
            ),
        ),
    ),
)
