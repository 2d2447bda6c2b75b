"""Folders that the factory writes are whole models: weights, tokenizer, chat template, generation config."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from core.errors import ModelError
from engine.model import load_model
from tooling.model_factory import SIZES, architectures, check_served, make_config, make_model
from tooling.tiny_tokenizer import MIN_VOCAB_SIZE, train_tokenizer

TEXTS = ["Hello the world.", "naïve café — 東京 😀👩‍🚀", "  two  spaces\n\ttabs\r\n", "\x00\x7f", ""]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3_text", "gpt2"])
def test_the_tokenizer_loads_by_itself_and_gives_back_any_text(model_folder, architecture):
    tokenizer = AutoTokenizer.from_pretrained(model_folder(architecture))
    assert len(tokenizer) == 512
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id == 1
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.eos_token_id == 2


@pytest.mark.parametrize("vocab_size", [MIN_VOCAB_SIZE, 512, 6000])
def test_every_id_decodes_and_none_is_missing(vocab_size):
    tokenizer = train_tokenizer(vocab_size, 128)
    assert len(tokenizer) == vocab_size
    assert sorted(tokenizer.get_vocab().values()) == list(range(vocab_size))
    assert tokenizer.vocab_size == vocab_size
    words = [tokenizer.decode([i]) for i in range(vocab_size)]
    assert all(words[i] for i in range(vocab_size))


def test_common_words_are_single_tokens():
    tokenizer = train_tokenizer(2000, 128)
    assert len(tokenizer.tokenize(" the of and people water")) == 5


def test_a_vocabulary_smaller_than_the_bytes_is_refused():
    with pytest.raises(ValueError, match="vocab_size"):
        train_tokenizer(MIN_VOCAB_SIZE - 1, 128)


def test_the_chat_template_renders_roles_and_opens_the_answer(model_folder):
    tokenizer = AutoTokenizer.from_pretrained(model_folder("llama"))
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|bos|><|system|>Be kind.<|user|>Hi<|assistant|>Hello<|eos|><|user|>Bye<|assistant|>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[-1] == tokenizer.convert_tokens_to_ids("<|assistant|>")


def test_the_same_seed_makes_the_same_weights_and_another_seed_others(tmp_path):
    folders = [make_model(tmp_path / str(i), "llama", seed=seed) for i, seed in enumerate((3, 3, 4))]
    first, again, other = (load_file(folder / "model.safetensors") for folder in folders)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_dimensions_dtype_and_raw_fields_reach_the_config(tmp_path):
    folder = make_model(
        tmp_path / "m", "qwen3", layers=3, hidden=32, vocab_size=600, dtype="bfloat16", config={"rms_norm_eps": 1e-4}
    )
    config = AutoConfig.from_pretrained(folder)
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size, config.rms_norm_eps) == (3, 32, 600, 1e-4)
    assert config.dtype == torch.bfloat16
    assert GenerationConfig.from_pretrained(folder).eos_token_id == 2
    assert len(AutoTokenizer.from_pretrained(folder)) == 600


def test_the_named_sizes_have_the_parameters_they_are_named_for():
    from transformers import AutoModelForCausalLM

    for name, low, high in (("125m", 120e6, 130e6), ("1b", 1.1e9, 1.6e9), ("8b", 7.5e9, 8.5e9)):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(make_config("llama", size=name))
        assert low < sum(weight.numel() for weight in model.parameters()) < high


def test_wrong_names_are_refused_with_what_was_expected(tmp_path):
    with pytest.raises(ModelError, match="no such architecture") as misspelt:
        make_model(tmp_path, "lama")
    assert "did you mean llama" in str(misspelt.value)
    with pytest.raises(ModelError, match="no such architecture") as strange:
        make_model(tmp_path, "nonsense")
    assert len(str(strange.value)) < 120
    with pytest.raises(ModelError, match=f"expected one of {sorted(SIZES)}".replace("[", r"\[")):
        make_model(tmp_path, "llama", size="huge")
    with pytest.raises(ModelError, match=r"unknown sizes \['depth'\]"):
        make_model(tmp_path, "llama", depth=3)
    with pytest.raises(ModelError, match="cannot build a decoder") as encoder:
        make_model(tmp_path, "t5")
    assert len(str(encoder.value)) < 300


@pytest.mark.parametrize("architecture", ["bert", "mamba"])
def test_an_architecture_that_is_not_served_is_refused_with_the_servers_own_reason(architecture, tmp_path):
    with pytest.raises(ModelError) as served:
        load_model(make_model(tmp_path, architecture))
    with pytest.raises(ModelError, match=f"^{architecture}: cannot be served: ") as checked:
        check_served(architecture)
    assert str(served.value).endswith(str(checked.value).removeprefix(f"{architecture}: cannot be served: "))


def test_an_architecture_that_is_served_passes():
    check_served("qwen3")


def test_every_architecture_with_a_recipe_has_a_config():
    assert {make_config(name).model_type for name in architectures()} == set(architectures())
