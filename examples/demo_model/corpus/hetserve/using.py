"""How one runs and uses HetServe (README.md)."""

from __future__ import annotations

from examples.demo_model.corpus.hetserve.fact import Fact

FACTS = (
    Fact(
        "api",
        "",
        (
            "Which API does HetServe speak?",
            "What API does it have?",
            "Is it compatible with OpenAI?",
            "Can I use the OpenAI client?",
            "How do clients talk to HetServe?",
            "Which clients work?",
        ),
        (
            "It speaks the OpenAI API, so any OpenAI client works.",
            "HetServe speaks the OpenAI API. Point any OpenAI client at the gateway, by default on port 8000.",
        ),
    ),
    Fact(
        "start",
        "",
        (
            "How do I start a cluster?",
            "How do I start HetServe?",
            "How do I run HetServe?",
            "How can I serve a model?",
            "What command starts a cluster?",
            "How do I serve Llama?",
        ),
        (
            "Run hetserve serve with a model, for example: hetserve serve my-model --prefill 1 --decode 2.",
            (
                "Use the command hetserve serve. It takes a model and the number of instances, or a file: hetserve serve "
                "--config cluster.yaml."
            ),
        ),
    ),
    Fact(
        "demo",
        "",
        (
            "What does the demo do?",
            "What is make demo?",
            "What does make demo show?",
            "What is hetserve demo?",
            "How do I try HetServe?",
            "What is the quickest way to try it?",
        ),
        (
            "The demo starts a local cluster, streams prompts through it and shows where each was served.",
            (
                "Run make demo. It sets everything up, starts a small cluster on this machine, streams prompts through it, and "
                "shows where each was served."
            ),
        ),
    ),
    Fact(
        "bench",
        "",
        (
            "What does hetserve bench do?",
            "How do I measure goodput?",
            "How do I benchmark HetServe?",
            "How can I measure latency?",
            "Is there a load generator?",
        ),
        (
            "It sends requests to an OpenAI server and reports goodput, TTFT, TPOT and ITL.",
            (
                "Use hetserve bench. It sends requests at random or recorded times to an OpenAI server and reports goodput and "
                "latencies."
            ),
        ),
    ),
    Fact(
        "status",
        "",
        (
            "What does hetserve status show?",
            "How do I see the workers?",
            "How can I see which instances run?",
            "How do I watch the cluster?",
            "Which command shows the instances?",
        ),
        (
            "It shows who is there, how busy they are, and in which incarnation.",
            "The command hetserve status shows every instance live: its role, how busy it is, and its incarnation.",
        ),
    ),
    Fact(
        "check",
        "",
        (
            "What does hetserve check do?",
            "How do I check a cluster file?",
            "How can I validate my configuration?",
            "Is my YAML file right?",
            "Which command validates a cluster file?",
        ),
        (
            "It validates a cluster file and prints what it resolves to.",
            "The command hetserve check reads a cluster file, names any wrong key, and prints what the file resolves to.",
        ),
    ),
    Fact(
        "make-model",
        "",
        (
            "What does hetserve make-model do?",
            "How do I make a random model?",
            "Where do I get a test model?",
            "How can I make a toy model?",
            "What is make-model?",
        ),
        (
            "It makes a model folder with random weights, of a named architecture and size.",
            "The command hetserve make-model writes a model folder with random weights and a tokenizer, which is good for tests.",
        ),
    ),
    Fact(
        "config",
        "",
        (
            "What is in cluster.yaml?",
            "What does a cluster file say?",
            "How do I configure HetServe?",
            "What is a cluster file?",
            "What happens with unknown keys in the configuration?",
        ),
        (
            "It names the model, the pools, the gateway and the router; unknown keys are errors.",
            (
                "A cluster file names the model, its pools with their roles and accelerators, the gateway and the router. An "
                "unknown key is an error that names its path."
            ),
        ),
    ),
    Fact(
        "install",
        "",
        (
            "How do I install HetServe?",
            "What do I need to install?",
            "How is HetServe installed?",
            "How do I set it up?",
            "What does HetServe need to run?",
        ),
        (
            "In a checkout, run pip install '.[server]'.",
            "Run pip install '.[server]' in a checkout. Without the server extra you get only the client.",
        ),
    ),
    Fact(
        "python",
        "",
        (
            "Which Python does HetServe need?",
            "What are the requirements?",
            "Does it run on Linux?",
            "Which operating system does it need?",
            "Which Python version do I need?",
        ),
        ("It needs Linux and Python 3.11 or newer.", "HetServe needs Linux, Python 3.11 or newer, make and a C++ compiler."),
    ),
    Fact(
        "client",
        "",
        (
            "Is there a Python client?",
            "How do I call HetServe from Python?",
            "What does the client need?",
            "What is the HetServe client?",
            "How do I use the client?",
        ),
        (
            "Use the Python client: from hetserve import Client.",
            "There is a Client in the hetserve package. It streams chats and completions, and needs neither torch nor Ray.",
        ),
    ),
)
