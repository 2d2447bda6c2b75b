"""The command line: what each command prints, and how it fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from core.errors import ModelError
from hetserve import __version__, cli
from hetserve.commands.pools import PoolFlags
from hetserve.commands.serve import serve_config
from tests.hetserve.fake_server import Exchange, completion_chunk, serving, usage_chunk

INSTANCE = {
    "name": "decode-0",
    "role": "decode",
    "accelerator": "L40S",
    "node": "n1",
    "incarnation": 2,
    "state": "ready",
    "last_seen_s": 0.2,
    "running": 3,
    "waiting": 1,
    "waiting_tokens": 77,
    "context_tokens": 1234,
    "free_blocks": 75,
    "held_blocks": 0,
    "total_blocks": 100,
    "steps": 9,
    "block_size": 16,
}


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli.app, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def model_server(x: Exchange) -> None:
    """A one-model server that answers with as many tokens as were asked for."""
    match x.path:
        case "/v1/models":
            x.answer(body={"data": [{"id": "m"}]})
        case "/tokenize":
            x.answer(body={"tokens": [11, 12, 13], "count": 3})
        case "/debug/instances":
            x.answer(body={"instances": [INSTANCE]})
        case "/v1/completions":
            body = x.json()
            assert set(body["prompt"]) <= {11, 12, 13}
            x.begin_stream()
            for index in range(body["max_tokens"]):
                x.event(completion_chunk("a", "length" if index + 1 == body["max_tokens"] else None))
            x.event(usage_chunk(len(body["prompt"]), body["max_tokens"]))
            x.event("[DONE]")


# --- failing ----------------------------------------------------------------------------------------------------------


def test_version_is_printed() -> None:
    assert run("version") == (0, f"{__version__}\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("serve",),
        ("serve", "m", "--port", "99999"),
        ("serve", "m", "--dtype", "int3"),
        ("serve", "m", "--host", "0.0.0.0"),
        ("serve", "--config", "/nonexistent.yaml"),
        ("check", "/nonexistent.yaml"),
        ("bench", "--rate", "0"),
        ("bench", "--trace", "/nonexistent.csv"),
        ("bench", "--url", "ftp://x"),
        ("status", "--url", "nonsense"),
        ("make-model", "/tmp/x", "--dtype", "int3"),
        ("demo", "--model", "/tmp", "--size", "tiny"),
        ("chat", "--url", "nonsense"),
    ],
)
def test_wrong_usage_exits_2_with_no_traceback(arguments: tuple[str, ...]) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err
    assert "Traceback" not in err


def test_serve_without_a_model_says_which_there_is() -> None:
    code, _, err = run("serve")
    assert code == 2
    assert "demo is the small one that comes with HetServe" in err


def test_a_wrong_key_is_named_by_its_path(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("model: m\npools: [{role: decode, replicaz: 1}]\n")
    code, _, err = run("serve", "--config", str(file))
    assert (code, err) == (2, "hetserve: pools[0].replicaz: unknown key\n")


def test_no_server_is_one_line_and_exit_1() -> None:
    with serving(lambda x: None) as server:
        url = server.url
    code, _, err = run("status", "--url", url)
    assert code == 1
    assert err.startswith("hetserve: GET " + url)
    assert err.count("\n") == 1


def test_errors_by_kind_have_their_exit_codes() -> None:
    assert cli.exit_code(ModelError("not a model")) == 1
    assert cli.exit_code(ModuleNotFoundError("no ray", name="ray")) == 1
    assert cli.exit_code(ModuleNotFoundError("ours", name="hetserve.nope")) is None
    assert cli.exit_code(ZeroDivisionError()) is None


def test_a_folder_that_is_not_a_model_is_one_line(tmp_path: Path) -> None:
    code, _, err = run("serve", str(tmp_path), "--port", "0")
    assert code == 1
    assert err.startswith("hetserve: model: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("architecture", "said"),
    [("lama", "did you mean llama"), ("bert", "bert: cannot be served: layer 0 attends to later tokens")],
)
def test_a_model_that_could_not_be_served_is_not_made(tmp_path: Path, architecture: str, said: str) -> None:
    code, out, err = run("make-model", str(tmp_path / "made"), "--architecture", architecture)
    assert (code, out) == (1, "")
    assert said in err.splitlines()[-1]
    assert len(err.splitlines()[-1]) < 200
    assert not (tmp_path / "made").exists()


# --- configuration ----------------------------------------------------------------------------------------------------


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("model: m\ngateway: {port: 1234}\npools: [{role: prefill}, {role: decode, replicas: 2}]\n")
    flags = PoolFlags(replicas={"decode": 5})
    config = serve_config({"gateway.port": 4321, "model": str(tmp_path)}, flags, file, None)
    assert (config.gateway.port, config.model) == (4321, str(tmp_path))
    assert [pool.replicas for pool in config.pools] == [1, 5]


def test_a_model_alone_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    config = serve_config({"model": "model", "engine.max_num_seqs": 3}, PoolFlags(), None, None)
    assert config.model == str(tmp_path / "model")
    assert config.engine.max_num_seqs == 3
    assert [(pool.role.value, pool.replicas) for pool in config.pools] == [("prefill", 1), ("decode", 1)]


@pytest.mark.parametrize("names", [(), ("a",), ("a", "b")])
def test_a_model_is_served_under_every_name_that_is_given(monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]) -> None:
    import cluster.launch

    seen = []
    monkeypatch.setattr(cluster.launch, "serve", lambda config, **rest: seen.append(config.gateway))
    options = [word for name in names for word in ("--served-model-name", name)]
    assert run("serve", "model", "--mixed", "1", "--generation-config", "off", *options)[0] == 0
    assert [(gateway.served_model_names, gateway.generation_config) for gateway in seen] == [(names, "off")]


def test_demo_is_the_model_that_comes_with_hetserve_and_a_folder_of_that_name_is_asked_for_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "demo").mkdir()
    file = tmp_path / "cluster.yaml"
    file.write_text("model: demo\npools: [{role: mixed}]\n")
    monkeypatch.chdir(tmp_path)
    assert serve_config({"model": "demo"}, PoolFlags(), None, None).model == "demo"
    assert serve_config({}, PoolFlags(), file, None).model == "demo"
    assert serve_config({"model": "./demo"}, PoolFlags(), None, None).model == str(tmp_path / "demo")


def test_check_prints_what_a_file_comes_to_without_its_key(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("model: m\ngateway: {api_key: very-secret}\npools: [{role: mixed}]\n")
    code, out, _ = run("check", str(file))
    shown = yaml.safe_load(out)
    assert code == 0
    assert shown["gateway"]["api_key"] == "***"
    assert shown["pools"][0]["role"] == "mixed"
    assert shown["engine"]["max_num_seqs"] == 64
    assert "very-secret" not in out


# --- against a server -------------------------------------------------------------------------------------------------


def test_status_shows_the_instances() -> None:
    with serving(model_server) as server:
        code, out, _ = run("status", "--once", "--url", server.url)
        json_code, json_out, _ = run("status", "--json", "--url", server.url)
    assert (code, json_code) == (0, 0)
    assert "decode-0" in out
    assert json.loads(json_out) == [INSTANCE]


def test_bench_reports_and_writes_json(tmp_path: Path) -> None:
    out_file = tmp_path / "report.json"
    sizes = ("--requests", "5", "--rate", "200", "--input-tokens", "9", "--output-tokens", "4")
    with serving(model_server) as server:
        code, out, err = run("bench", "--url", server.url, *sizes, "--ttft-ms", "10000", "--json", str(out_file))
    assert code == 0, err
    data = json.loads(out_file.read_text())
    assert (data["requests"], data["completed"], data["attainment"]) == (5, 5, 1.0)
    assert (data["input_tokens"], data["output_tokens"]) == (45, 20)
    assert data["spreads"]["itl"]["count"] == 15
    assert "goodput" in out


def test_bench_replays_a_trace_and_fails_when_nothing_was_answered(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    rows = "2024-01-01 00:00:00.0,5,2\n2024-01-01 00:00:00.01,6,2\n"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows)

    def refusing(x: Exchange) -> None:
        if x.path == "/v1/completions":
            x.answer(429, {"error": {"message": "full", "code": "overloaded"}})
        else:
            model_server(x)

    with serving(refusing) as server:
        code, out, _ = run("bench", "--url", server.url, "--trace", str(trace))
        sent = [len(x.json()["prompt"]) for x in server.seen if x.path == "/v1/completions"]
    assert (code, sorted(sent)) == (1, [5, 6])
    assert "RateLimited (overloaded)" in out
