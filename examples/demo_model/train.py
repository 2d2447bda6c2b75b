"""Trains a demo model from nothing, on a CPU, and writes the folder that ships.

    python -m examples.demo_model.train --output build/demo-model                 # the model that answers
    python -m examples.demo_model.train --output build/demo-model --model draft   # the one that guesses ahead for it

Into the output folder go `stream/` (the tokenised corpus, shared by both), `main/` or `draft/` (the checkpoint), and the exported
model, `demo/` or `demo-draft/`, with its card and measurements. A run that was killed goes on with `--resume`.

On a machine that has other work too, OMP_WAIT_POLICY=PASSIVE in the environment makes it half as slow again: threads then sleep
where they would spin for one that is not running. It changes no number.
"""

from __future__ import annotations

import time
from collections import deque
from datetime import UTC, datetime
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from examples.demo_model import corpus, model, recipe
from examples.demo_model.card import Result, write_card, write_json
from examples.demo_model.corpus import Split
from examples.demo_model.evaluation import DTYPES, answers, scores
from examples.demo_model.export import MEGABYTE, check_size, export
from examples.demo_model.loop import HELD_OUT_BATCHES, CheckpointMismatch, Identity, Training
from examples.demo_model.packing import Stream, corpus_digest, tokenizer_digest
from examples.demo_model.prompts import PROMPTS
from examples.demo_model.tokenizer import plain, train_tokenizer

TOKENIZER_DOCUMENTS = 50_000
HELD_OUT_DOCUMENTS = 3000
CHECKPOINT_EVERY = 200
"""Steps; the held-out loss is measured as often."""


class Which(StrEnum):
    MAIN = "main"
    DRAFT = "draft"


SIZES = {Which.MAIN: model.MAIN, Which.DRAFT: model.DRAFT}
RECIPES = {Which.MAIN: recipe.MAIN, Which.DRAFT: recipe.DRAFT}


def main(
    output: Annotated[Path, typer.Option(help="Folder for everything that is made.", file_okay=False)],
    which: Annotated[Which, typer.Option("--model", help="Which of the two to train.")] = Which.MAIN,
    seed: Annotated[int, typer.Option(min=0, help="Of the corpus and of the first weights.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Fewer or more than the recipe's.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="That compute.")] = 2,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Compile the step: a minute well spent.")] = True,
) -> None:
    """Train a demo model, measure it, export it."""
    checkpoint = output / which / "checkpoint.pt"
    if resume != checkpoint.exists():
        lacks = f"{checkpoint}: there is no checkpoint to resume from"
        raise typer.BadParameter(lacks if resume else f"{checkpoint} exists: --resume goes on from it; or take another --output")
    console = Console()
    torch.set_num_threads(threads)
    disable_progress_bar()
    size, plan = SIZES[which], RECIPES[which] if steps is None else RECIPES[which].with_steps(steps)
    tokenizer, train, held_out = prepare(console, output, size, plan, seed)
    identity = Identity(size, plan, seed, precision(), corpus_digest(), tokenizer_digest(tokenizer))
    training = Training(identity, train, held_out, compiled=compiled)
    if resume:
        try:
            training.load(checkpoint)
        except CheckpointMismatch as error:
            raise typer.BadParameter(str(error)) from error
    run(console, training, checkpoint)
    command = f"python -m examples.demo_model.train --output DIR --model {which} --seed {seed}"
    command += "" if steps is None else f" --steps {steps}"
    finish(console, training, tokenizer, train, output / size.folder, command, compiled=compiled)


def prepare(
    console: Console, output: Path, size: model.ModelSize, plan: recipe.Recipe, seed: int
) -> tuple[PreTrainedTokenizerFast, Stream, Stream]:
    """The tokenizer, and both splits' tokens as many as `plan` reads, made or found in the output folder."""
    began_s = time.monotonic()
    drawn = islice(corpus.documents(seed, Split.TRAIN), TOKENIZER_DOCUMENTS)
    tokenizer = train_tokenizer(map(plain, drawn), size.vocab_size, size.positions)
    console.print(f"Tokenizer: {len(tokenizer):,} entries ({time.monotonic() - began_s:.0f} s).")
    began_s = time.monotonic()
    train = Stream.open(output / "stream", tokenizer, seed, Split.TRAIN, plan.tokens + 1)
    held_out = Stream.open(output / "stream", tokenizer, seed, Split.HELD_OUT, HELD_OUT_BATCHES * plan.batch_tokens + 1)
    console.print(
        f"Corpus: {plan.tokens:,} tokens of {train.documents(plan.tokens):,} documents ({time.monotonic() - began_s:.0f} s).",
        soft_wrap=True,
    )
    return tokenizer, train, held_out


def precision() -> str:
    """bfloat16 where the CPU multiplies in it, else float32."""
    return "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"


def run(console: Console, training: Training, checkpoint: Path, every: int = CHECKPOINT_EVERY) -> None:
    """Take the steps that are left, with a bar; a checkpoint and a held-out loss every so often and at the end."""
    plan = training.recipe
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:,.0f} tokens/s"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console, speed_estimate_period=60.0) as progress:
        bar = progress.add_task("training", total=plan.steps, completed=training.record.step, rate=0.0)
        recent: deque[float] = deque(maxlen=20)
        while not training.done:
            began_s = time.perf_counter()
            loss = training.advance()
            recent.append(time.perf_counter() - began_s)
            rate = plan.batch_tokens * len(recent) / sum(recent)
            progress.update(bar, advance=1, description=f"loss {loss:.4f}", rate=rate)
            if training.record.step % every == 0 or training.done:
                held_out = training.measure()
                training.save(checkpoint)
                progress.console.print(
                    f"step {training.record.step:,}: loss {loss:.4f}, held out {held_out:.4f}, {rate:,.0f} tokens/s, "
                    f"{training.record.seconds / 60:.1f} min",
                    soft_wrap=True,
                )


def finish(
    console: Console,
    training: Training,
    tokenizer: PreTrainedTokenizerFast,
    train: Stream,
    folder: Path,
    command: str,
    *,
    compiled: bool,
) -> Result:
    """Export, measure what was exported, and write down what was seen.

    Raises:
        TooLarge: the folder takes more than may ship.
    """
    identity = training.identity
    export(training.model, tokenizer, folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    result = Result(
        identity=identity,
        record=training.record,
        documents=train.documents(identity.recipe.tokens),
        parameters=model.parameters(loaded),
        command=command,
        date=datetime.now(UTC).date().isoformat(),
        threads=torch.get_num_threads(),
        compiled=compiled,
        scores=scores(loaded, tokenizer, identity.seed, train.tokens[: identity.recipe.tokens], HELD_OUT_DOCUMENTS),
        prompts=PROMPTS,
        answers={dtype: answers(folder, dtype) for dtype in DTYPES},
    )
    (folder / "evaluation.json").write_text(write_json(result))
    (folder / "README.md").write_text(write_card(result))
    overall, taken = result.overall, check_size(folder, identity.size)
    console.print(
        f"{folder}: {taken / MEGABYTE:.1f} MB; training loss {training.record.final_loss:.4f}, held out {overall.loss:.4f}: "
        f"perplexity {overall.perplexity:.2f}, a unigram model's {overall.unigram_perplexity:.1f}.",
        soft_wrap=True,
    )
    return result


if __name__ == "__main__":
    typer.run(main)
