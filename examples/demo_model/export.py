"""Writes a trained model as the folder that ships: bf16 safetensors, configs, tokenizer, chat template, licence."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from examples.demo_model.model import ModelSize
from examples.demo_model.tokenizer import BOS_ID, END_ID, PAD_ID

LICENSE = Path(__file__).parents[2] / "LICENSE"
WEIGHTS = "model.safetensors"
MEGABYTE = 1_000_000
MOST_BESIDE = 1.0
"""Megabytes for tokenizer, configs, card and measurements together."""


class TooLarge(ValueError):
    """A model takes more than may ship."""


def export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write everything but the card and the measurements, which are made from what is written here. `model` stays as it is."""
    if folder.exists():
        shutil.rmtree(folder)
    rounded = copy.deepcopy(model).to(torch.bfloat16).eval()
    rounded.generation_config = GenerationConfig(bos_token_id=BOS_ID, eos_token_id=END_ID, pad_token_id=PAD_ID)
    rounded.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shutil.copyfile(LICENSE, folder / "LICENSE")
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes for its owner alone, and packages keep what they find


def check_size(folder: Path, size: ModelSize) -> int:
    """The folder's bytes.

    Raises:
        TooLarge: the weights take more than `size` allows, or all the rest more than a megabyte.
    """
    weights = (folder / WEIGHTS).stat().st_size
    total = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    for what, found, most in (("its weights", weights, size.most_megabytes), ("all the rest", total - weights, MOST_BESIDE)):
        if found > most * MEGABYTE:
            raise TooLarge(f"{folder}: {what} take {found / MEGABYTE:.2f} MB, but at most {most} MB may ship")
    return total
