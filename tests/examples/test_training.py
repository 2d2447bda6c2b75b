"""The demo models' training, on a model that is much smaller still: learns, resumes, exports, and reports what it saw."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from examples.demo_model import corpus, evaluation, train
from examples.demo_model.attention import NAME
from examples.demo_model.card import Result
from examples.demo_model.corpus import Split
from examples.demo_model.evaluation import document_losses, prompt_ids, unigram
from examples.demo_model.export import TooLarge, check_size
from examples.demo_model.loop import CheckpointMismatch, Identity, Training
from examples.demo_model.model import DRAFT, MAIN, ModelSize, make_model, parameters
from examples.demo_model.packing import Stream, draw
from examples.demo_model.prompts import PROMPTS, Prompt
from examples.demo_model.recipe import Recipe
from examples.demo_model.tokenizer import BOS_ID, END_ID, START_ID, as_chat, encode, plain, train_tokenizer

TINY = ModelSize(
    "tiny", 0.2, hidden=32, layers=2, heads=2, kv_heads=1, intermediate=64, head_dim=16, vocab_size=512, positions=512
)
RECIPE = Recipe(steps=20, learning_rate=1e-2, batch_tokens=512, block=64, long_block=128, long_share=0.3, warmup_steps=2)
LENGTH = RECIPE.tokens + 1


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def documents() -> list[corpus.Document]:
    return list(islice(corpus.documents(0, Split.TRAIN), 500))


@pytest.fixture(scope="module")
def tokenizer(documents) -> PreTrainedTokenizerFast:
    return train_tokenizer(map(plain, documents), TINY.vocab_size, TINY.positions)


@pytest.fixture(scope="module")
def streams(tokenizer) -> tuple[Stream, Stream]:
    return Stream(draw(tokenizer, 0, Split.TRAIN, LENGTH)), Stream(draw(tokenizer, 0, Split.HELD_OUT, LENGTH))


def training(streams: tuple[Stream, Stream], recipe: Recipe = RECIPE, seed: int = 0, precision: str = "float32") -> Training:
    return Training(Identity(TINY, recipe, seed, precision, "corpus", "tokenizer"), *streams, compiled=False)


@pytest.fixture(scope="module")
def trained(streams) -> Training:
    run = training(streams)
    while not run.done:
        run.advance()
    run.measure()
    return run


@pytest.fixture(scope="module")
def finished(trained, tokenizer, streams, tmp_path_factory) -> tuple[Path, Result]:
    folder = tmp_path_factory.mktemp("made") / TINY.folder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "HELD_OUT_DOCUMENTS", 300)
        patch.setattr(evaluation, "MAX_NEW_TOKENS", 8)
        quiet = Console(quiet=True)
        return folder, train.finish(quiet, trained, tokenizer, streams[0], folder, "the command", compiled=False)


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_the_same_documents_give_the_same_tokenizer(documents, tokenizer):
    again = train_tokenizer(map(plain, documents), TINY.vocab_size, TINY.positions)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_any_text_round_trips_and_a_digit_is_a_token(tokenizer):
    text = "Zoë paid 1024 yen,\n\tor 7.50 €. 漢字 <|im_start"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text
    assert [token for token in map(tokenizer.decode, ids) if token.strip().isdigit()] == list("1024750")


def test_documents_are_tokenised_through_the_template_that_is_served(tokenizer, documents):
    chat = next(document for document in documents if document.messages)
    text = next(document for document in documents if not document.messages)
    asked, told = encode(tokenizer, [chat, text])
    whole = tokenizer.apply_chat_template(as_chat(chat.messages), tokenize=False)
    assert tokenizer(whole, add_special_tokens=False).input_ids[: len(asked)] == asked
    assert whole == tokenizer.decode(asked) + "\n"
    assert told == [*tokenizer(text.text).input_ids, END_ID]
    assert asked[0] == told[0] == BOS_ID
    assert asked[-1] == told[-1] == END_ID
    before = as_chat(chat.messages[:-1])
    prompt = tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True)
    assert tokenizer(prompt, add_special_tokens=False).input_ids == asked[: len(asked) - 1 - asked[::-1].index(START_ID) + 3]


def test_packing_loses_no_token_and_repeats_none(tokenizer, documents):
    every = [token for ids in encode(tokenizer, documents) for token in ids]
    stream = Stream(draw(tokenizer, 0, Split.TRAIN, len(every)))
    assert stream.tokens.tolist() == every
    assert stream.documents(len(every)) == len(documents)
    tokens, steps = RECIPE.batch_tokens, (len(every) - 1) // RECIPE.batch_tokens
    for block in (RECIPE.block, RECIPE.long_block):
        batches = [stream.batch(step, tokens, block) for step in range(steps)]
        assert torch.cat([inputs.flatten() for inputs, _ in batches]).tolist() == every[: steps * tokens]
        assert torch.cat([targets.flatten() for _, targets in batches]).tolist() == every[1 : steps * tokens + 1]
    with pytest.raises(ValueError, match="the stream has"):
        stream.batch(steps, tokens, RECIPE.block)


def test_a_stream_is_kept_and_made_again_when_it_is_of_something_else(tokenizer, tmp_path, monkeypatch):
    first = Stream.open(tmp_path, tokenizer, 0, Split.TRAIN, 3000)
    assert np.array_equal(first.tokens, draw(tokenizer, 0, Split.TRAIN, 4000)[:3000])
    with monkeypatch.context() as patch:
        patch.setattr("examples.demo_model.packing.draw", None)
        assert np.array_equal(Stream.open(tmp_path, tokenizer, 0, Split.TRAIN, 2000).tokens, first.tokens)
    other = Stream.open(tmp_path, tokenizer, 1, Split.TRAIN, 3000)
    assert not np.array_equal(other.tokens, first.tokens)
    damaged = other.tokens.copy()
    damaged[5] ^= 1
    np.save(tmp_path / "train.npy", damaged)
    assert np.array_equal(Stream.open(tmp_path, tokenizer, 1, Split.TRAIN, 3000).tokens, other.tokens)


# --- training ---------------------------------------------------------------------------------------------------------


def test_twenty_steps_lower_the_loss(trained):
    losses = trained.record.losses
    assert len(losses) == 20
    assert losses[0] == pytest.approx(np.log(TINY.vocab_size), rel=0.05)
    assert sum(losses[-3:]) / 3 < losses[0] - 0.9
    assert trained.record.held_out == [(20, pytest.approx(losses[-1], abs=0.7))]


@pytest.mark.parametrize("block", [96, 300, 512])
def test_attention_for_training_is_that_of_transformers(block):
    ids = torch.randint(0, TINY.vocab_size, (2, block), generator=torch.Generator().manual_seed(1))
    model = make_model(TINY, 0)
    assert model.config._attn_implementation == NAME
    losses, gradients = [], []
    for implementation in (NAME, "eager"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert torch.allclose(gradients[0], gradients[1], atol=1e-5)


def test_bfloat16_trains_alike(streams, trained):
    run = training(streams, precision="bfloat16")
    losses = [run.advance() for _ in range(10)]
    assert losses == pytest.approx(trained.record.losses[:10], abs=0.05)
    assert {parameter.dtype for parameter in run.model.parameters()} == {torch.float32}


def test_the_rate_warms_up_stays_and_falls_to_nothing():
    recipe = Recipe(steps=100, learning_rate=1.0, warmup_steps=10, decay_share=0.4, long_share=0.2)
    rates = [recipe.rate_at(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert rates[10:60] == [1.0] * 50
    assert rates[60:] == pytest.approx([(100 - step) / 40 for step in range(60, 100)])
    assert [recipe.block_at(step) for step in (0, 79, 80, 99)] == [512, 512, 1024, 1024]
    assert recipe.with_steps(20).warmup_steps == 2


KILLED = """
import os, signal, sys
import torch
import typer
from pathlib import Path
from tests.examples.test_training import Stream, training
import numpy as np

torch.set_num_threads(1)
folder = Path(sys.argv[1])
run = training((Stream(np.load(folder / "train.npy")), Stream(np.load(folder / "held.npy"))))
while True:
    if run.advance() and run.record.step in (3, 6):
        run.save(folder / "checkpoint.pt")
    if run.record.step == 8:
        (folder / "checkpoint.partial").write_bytes(b"half a checkpoint")
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_goes_on_as_if_it_had_not_been(streams, trained, tmp_path):
    np.save(tmp_path / "train.npy", streams[0].tokens)
    np.save(tmp_path / "held.npy", streams[1].tokens)
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=root, env=environment, timeout=120)
    assert killed.returncode == -signal.SIGKILL

    resumed = training(streams)
    resumed.load(tmp_path / "checkpoint.pt")
    assert resumed.record.step == 6
    while not resumed.done:
        resumed.advance()
    assert resumed.record.losses == trained.record.losses
    mine, theirs = resumed.model.state_dict(), trained.model.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_a_checkpoint_of_another_run_is_refused(streams, trained, tmp_path):
    trained.save(tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointMismatch, match=r"another seed$"):
        training(streams, seed=1).load(tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointMismatch, match=r"another recipe, precision$"):
        training(streams, replace(RECIPE, clip=2.0), precision="bfloat16").load(tmp_path / "checkpoint.pt")


def test_the_loop_measures_saves_and_ends(streams, trained, tmp_path):
    run = training(streams)
    train.run(Console(quiet=True), run, tmp_path / "checkpoint.pt", every=8)
    assert run.record.losses == trained.record.losses
    assert [step for step, _ in run.record.held_out] == [8, 16, 20]
    again = training(streams)
    again.load(tmp_path / "checkpoint.pt")
    assert again.done
    assert again.record == run.record


# --- what comes out ---------------------------------------------------------------------------------------------------


def test_the_export_is_what_was_trained_rounded_to_bfloat16(finished, trained, tokenizer):
    folder, _ = finished
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype == torch.bfloat16
    mine = trained.model.state_dict()
    assert loaded.state_dict().keys() == mine.keys()
    assert all(torch.equal(value, mine[name].to(torch.bfloat16)) for name, value in loaded.state_dict().items())
    assert trained.model.dtype == torch.float32
    assert loaded.generation_config.eos_token_id == END_ID
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    again = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "What is 12 + 30?"}]
    assert len(again) == len(tokenizer) <= TINY.vocab_size
    assert again.eos_token_id == END_ID
    for text in ("Once there was a fox.", again.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)):
        assert again(text).input_ids == tokenizer(text).input_ids
    assert again.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "<|bos|><|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nWhat is 12 + 30?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o644}
    assert (folder / "LICENSE").read_bytes() == (Path(__file__).parents[2] / "LICENSE").read_bytes()


def test_the_card_holds_what_was_measured(finished, trained):
    folder, result = finished
    card, said = (folder / "README.md").read_text(), json.loads((folder / "evaluation.json").read_text())
    assert f"| training loss | **{trained.record.final_loss:.4f}**" in card
    assert f"| held-out loss | **{result.overall.loss:.4f}**" in card
    assert f"| steps, tokens | 20 of 512, {RECIPE.tokens:,} tokens of" in card
    assert "\nthe command\n" in card
    assert result.date in card
    for score in result.scores:
        assert f"| {score.kind} | {score.documents:,} | {score.tokens:,} | {score.loss:.4f} | {score.perplexity:.2f} |" in card
        assert said["held_out"][score.kind]["perplexity"] == pytest.approx(score.perplexity, abs=1e-3)
    for number, (_, answer) in enumerate(result.answers["float32"], 1):
        assert f"\n{number}. " in card
        assert answer.text in card
    assert "$" not in card.replace("$$", "")


def test_the_measurements_name_each_answer_token_by_token(finished):
    folder, _ = finished
    said = json.loads((folder / "evaluation.json").read_text())["prompts"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(said) == len(PROMPTS) == 20
    for dtype in ("float32", "bfloat16"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        for prompt, entry in zip(PROMPTS, said, strict=True):
            asked = Prompt(
                entry["kind"], tuple(corpus.Message(**one) for one in entry.get("messages", [])), entry.get("text", "")
            )
            assert asked == prompt
            assert entry["prompt_ids"] == prompt_ids(tokenizer, prompt)
            answer = entry[dtype]
            assert tokenizer.decode(answer["ids"], skip_special_tokens=True) == answer["text"]
            assert (answer["finish_reason"] == "stop") == (answer["ids"][-1] == END_ID)
            with torch.inference_mode():
                logits = model(torch.tensor([[*entry["prompt_ids"], *answer["ids"]]])).logits[
                    0, len(entry["prompt_ids"]) - 1 : -1
                ]
            drawn = torch.tensor(answer["ids"])
            behind = logits.float().max(dim=-1).values - logits.float()[torch.arange(len(drawn)), drawn]
            assert behind.max() < (1e-4 if dtype == "float32" else 0.1)


def test_perplexities_are_of_each_document_by_itself(finished, tokenizer, documents):
    folder, _ = finished
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = encode(tokenizer, documents[:40])
    for row, loss in zip(rows, document_losses(model, rows), strict=True):
        ids = torch.tensor([row])
        with torch.inference_mode():
            assert loss == pytest.approx(model(ids, labels=ids).loss.item() * (len(row) - 1), rel=1e-4)


def test_the_unigram_model_counts_with_one_added():
    losses = unigram(np.array([1, 1, 2], dtype=np.uint16), 5)
    assert np.exp(-losses).tolist() == pytest.approx([1 / 8, 3 / 8, 2 / 8, 1 / 8, 1 / 8])


def test_what_takes_too_much_is_refused(finished):
    folder, _ = finished
    assert check_size(folder, TINY) < 1_200_000
    with pytest.raises(TooLarge, match="its weights take"):
        check_size(folder, replace(TINY, most_megabytes=0.01))


def test_both_models_fit_what_may_ship():
    for size, least in ((MAIN, 5e6), (DRAFT, 0.7e6)):
        with torch.device("meta"):
            count = parameters(make_model(size, 0))
        assert least < count < size.most_megabytes * 1e6 / 2 - 50_000


def test_a_run_is_never_overwritten_and_never_resumed_from_nothing(tmp_path):
    with pytest.raises(typer.BadParameter, match="no checkpoint to resume from"):
        train.main(tmp_path, resume=True)
    (tmp_path / "main").mkdir()
    (tmp_path / "main" / "checkpoint.pt").touch()
    with pytest.raises(typer.BadParameter, match="--resume goes on from it"):
        train.main(tmp_path)
