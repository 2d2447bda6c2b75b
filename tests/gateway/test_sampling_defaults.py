"""Sampling defaults of a model's own."""

from __future__ import annotations

import json
import shutil

import pytest

from core.config import ConfigError, parse_config
from core.errors import ModelError
from gateway.serving.sampling_defaults import SamplingDefaults, sampling_defaults
from tests.gateway.conftest import Stage
from tests.gateway.test_generating import post

GIVEN = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1}


@pytest.fixture
def folder(model_path, tmp_path):
    made = tmp_path / "tiny"
    shutil.copytree(model_path, made)
    (made / "generation_config.json").write_text(
        json.dumps({**GIVEN, "max_new_tokens": 7, "do_sample": False, "eos_token_id": 1})
    )
    return made


@pytest.fixture
def play(folder, letters):
    stages = []

    def start(**gateway):
        stages.append(Stage(folder, letters, {"gateway": {"port": 0, **gateway}}))
        stages[-1].worker("m0")
        return stages[-1]

    yield start
    for stage in stages:
        stage.close()


def test_they_stand_in_for_what_a_request_leaves_out(play):
    stage = play()
    assert post(stage.http, "/v1/chat/completions").json()["usage"]["completion_tokens"] == 7
    assert post(stage.http).json()["usage"]["completion_tokens"] == 16
    asked = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    post(stage.http, "/v1/chat/completions", max_tokens=9, **asked)
    first, second, third = (submit.sampling for submit in stage.workers[0].submits)
    assert {name: getattr(first, name) for name in GIVEN} == {name: getattr(second, name) for name in GIVEN} == GIVEN
    assert {name: getattr(third, name) for name in asked} == asked
    assert third.max_tokens == 9


def test_they_can_be_left_out(play):
    stage = play(generation_config="off")
    assert post(stage.http, "/v1/chat/completions").json()["usage"]["total_tokens"] == 512
    sampling = stage.workers[0].submits[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (1.0, 1.0, 0, 0.0)


def test_a_default_length_beyond_the_context_is_cut(folder, play):
    (folder / "generation_config.json").write_text('{"max_new_tokens": 100000}')
    assert post(play().http, "/v1/chat/completions").json()["usage"]["total_tokens"] == 512


def test_a_folder_without_the_file_has_the_plain_ones(tmp_path):
    assert sampling_defaults(tmp_path) == SamplingDefaults()
    (tmp_path / "generation_config.json").write_text('{"top_k": null, "temperature": 1}')
    assert sampling_defaults(tmp_path) == SamplingDefaults()


@pytest.mark.parametrize("text", ["", "[]", '{"temperature": "hot"}', '{"top_p": 3}', '{"max_new_tokens": 0}'])
def test_a_file_that_cannot_be_meant_is_an_error_that_names_it(tmp_path, text):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ModelError, match="generation_config: off") as refused:
        sampling_defaults(tmp_path)
    assert str(tmp_path) in str(refused.value)


@pytest.mark.parametrize(("value", "means"), [("auto", "auto"), ("off", "off"), (False, "off")])
def test_yaml_reads_a_bare_off_as_false(value, means):
    config = parse_config({"model": "m", "pools": [{"role": "mixed"}], "gateway": {"generation_config": value}})
    assert config.gateway.generation_config == means


@pytest.mark.parametrize(("given", "names"), [("a", ("a",)), (["a", "b", "a"], ("a", "b")), (None, ())])
def test_served_names_are_one_or_several(given, names):
    config = parse_config({"model": "m", "pools": [{"role": "mixed"}], "gateway": {"served_model_name": given}})
    assert config.gateway.served_model_names == names


@pytest.mark.parametrize("given", ["", [], ["a", ""], 3])
def test_served_names_are_not_empty(given):
    with pytest.raises(ConfigError, match="served_model_name"):
        parse_config({"model": "m", "pools": [{"role": "mixed"}], "gateway": {"served_model_name": given}})
