"""The model card: `card.md` filled with what was measured, and nothing that was not."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from string import Template
from typing import Any

from examples.demo_model.evaluation import OVERALL, Answer, Score
from examples.demo_model.loop import FINAL_STEPS, Identity, Record
from examples.demo_model.model import MAIN
from examples.demo_model.prompts import MAX_NEW_TOKENS, Prompt

TEMPLATE = Path(__file__).with_name("card.md")
Answers = Sequence[tuple[list[int], Answer]]


@dataclass(frozen=True)
class Result:
    """A run and what its exported model was seen to do. `answers` maps a dtype's name to one answer a prompt."""

    identity: Identity
    record: Record
    documents: int
    parameters: int
    command: str
    date: str
    threads: int
    compiled: bool
    scores: Sequence[Score]
    prompts: Sequence[Prompt]
    answers: dict[str, Answers]

    @property
    def overall(self) -> Score:
        return next(score for score in self.scores if score.kind == OVERALL)


def write_card(result: Result) -> str:
    size, recipe, record = result.identity.size, result.identity.recipe, result.record
    unlike = _unlike(result)
    fields = {
        "title": size.folder,
        "what": (
            "A small decoder for HetServe's demo and tests."
            if size == MAIN
            else "A still smaller decoder with the demo model's tokenizer, to guess ahead for it in speculative decoding."
        ),
        "parameters": f"{result.parameters:,}",
        "hidden": size.hidden,
        "layers": size.layers,
        "heads": size.heads,
        "head_dim": size.head_dim,
        "kv_heads": size.kv_heads,
        "intermediate": size.intermediate,
        "vocab_size": f"{size.vocab_size:,}",
        "positions": f"{size.positions:,}",
        "long_block": f"{recipe.long_block:,}",
        "command": result.command,
        "date": result.date,
        "machine": f"{processor()}, {os.cpu_count()} cores, {result.threads} threads",
        "software": software(),
        "steps": f"{record.step:,}",
        "batch_tokens": f"{recipe.batch_tokens:,}",
        "tokens": f"{recipe.tokens:,}",
        "documents": f"{result.documents:,}",
        "recipe": (
            f"AdamW {recipe.betas[0]}/{recipe.betas[1]}, rate {recipe.learning_rate:g} after {recipe.warmup_steps} steps, "
            f"linear to 0 in the last {recipe.decay_share:.0%}, decay {recipe.weight_decay:g}, clip {recipe.clip:g}; "
            f"blocks of {recipe.block}, of {recipe.long_block} in the last {recipe.long_share:.0%}"
        ),
        "precision": f"{result.identity.precision}{', compiled' if result.compiled else ''}; weights and optimiser in float32",
        "minutes": f"{record.seconds / 60:.1f}",
        "rate": f"{recipe.tokens / max(record.seconds, 1e-9):,.0f}",
        "train_loss": f"{record.final_loss:.4f}",
        "final_steps": min(FINAL_STEPS, record.step),
        "held_out_loss": f"{result.overall.loss:.4f}",
        "held_out_documents": f"{result.overall.documents:,}",
        "scores": _table(result.scores),
        "max_new_tokens": MAX_NEW_TOKENS,
        "unlike": f" In bfloat16, those of {unlike} differ." if unlike else " In bfloat16, all are the same.",
        "answers": "\n\n".join(
            _shown(number, prompt, answer)
            for number, (prompt, (_, answer)) in enumerate(zip(result.prompts, result.answers["float32"], strict=True), 1)
        ),
    }
    return Template(TEMPLATE.read_text()).substitute(fields)


def write_json(result: Result) -> str:
    """`as_json` as text, with a row of numbers on one line."""
    text = json.dumps(as_json(result), indent=1)
    return re.sub(r"\[\n([\d,.\s-]+)\n\s*\]", lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"


def as_json(result: Result) -> dict[str, Any]:
    """What `evaluation.json` holds: the measurements, and the prompts and answers, token by token."""
    prompts = []
    for at, prompt in enumerate(result.prompts):
        ids, _ = result.answers["float32"][at]
        said: dict[str, Any] = {"kind": prompt.kind}
        if prompt.messages:
            said["messages"] = [{"role": message.role, "content": message.content} for message in prompt.messages]
        else:
            said["text"] = prompt.text
        said["prompt_ids"] = ids
        said |= {dtype: _answer_json(answered[at][1]) for dtype, answered in result.answers.items()}
        prompts.append(said)
    return {
        "date": result.date,
        "seed": result.identity.seed,
        "steps": result.record.step,
        "tokens": result.identity.recipe.tokens,
        "train_loss": round(result.record.final_loss, 4),
        "held_out_loss": round(result.overall.loss, 4),
        "held_out": {score.kind: score.as_json() for score in result.scores},
        "held_out_while_training": [[step, round(loss, 4)] for step, loss in result.record.held_out],
        "max_new_tokens": MAX_NEW_TOKENS,
        "prompts": prompts,
    }


def processor() -> str:
    """The CPU's name, where the system tells it."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def software() -> str:
    packages = ("torch", "transformers", "tokenizers")
    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages)])


def _unlike(result: Result) -> str:
    """Numbers of the prompts whose answers differ between the dtypes, in words; empty if none do."""
    full, half = result.answers["float32"], result.answers["bfloat16"]
    pairs = enumerate(zip(full, half, strict=True), 1)
    return ", ".join(str(number) for number, (one, other) in pairs if one[1].ids != other[1].ids)


def _answer_json(answer: Answer) -> dict[str, Any]:
    return {
        "ids": list(answer.ids),
        "text": answer.text,
        "finish_reason": "stop" if answer.finished else "length",
        "smallest_gap": round(answer.smallest_gap, 4),
    }


def _table(scores: Sequence[Score]) -> str:
    lines = [
        "| kind | documents | tokens | loss | perplexity | unigram's | times better |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for score in scores:
        better = score.unigram_perplexity / score.perplexity
        lines.append(
            f"| {score.kind} | {score.documents:,} | {score.tokens:,} | {score.loss:.4f} "
            f"| {score.perplexity:.2f} | {score.unigram_perplexity:.1f} | {better:.1f} |"
        )
    return "\n".join(lines)


def _shown(number: int, prompt: Prompt, answer: Answer) -> str:
    """One prompt and its answer, as text that Markdown leaves alone."""
    asked = [f"> {message.content}" if message.role == "user" else message.content for message in prompt.messages]
    lines = [*asked, answer.text] if prompt.messages else [f"{prompt.text}[...]{answer.text}"]
    ending = "" if answer.finished else " (cut at the limit)"
    return f"{number}. {prompt.kind}{ending}\n\n```text\n" + "\n".join(lines) + "\n```"
