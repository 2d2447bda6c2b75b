"""The `hetserve` command: one function per subcommand, in `hetserve.commands`.

Exit codes: 0 done, 1 it failed, 2 the command line or the configuration is wrong, 130 interrupted. An error that HetServe
knows by name is one line on stderr; anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import sys
from typing import Any

import typer
from typer.core import TyperGroup

from hetserve._app_path import ServerMissing
from hetserve.bench.workload import TraceError
from hetserve.commands.bench import bench
from hetserve.commands.chat import chat
from hetserve.commands.check import check
from hetserve.commands.demo import demo
from hetserve.commands.make_model import make_model
from hetserve.commands.serve import serve
from hetserve.commands.status import status
from hetserve.commands.usage import UsageError
from hetserve.commands.version import version
from hetserve.errors import APIError

FAILED, MISUSED, INTERRUPTED = 1, 2, 130
SERVER_PACKAGES = frozenset(
    {"fastapi", "jinja2", "msgpack", "msgspec", "numpy", "psutil", "pydantic", "ray", "tokenizers", "torch", "transformers"}
    | {"uvicorn", "uvloop", "xxhash", "yaml", "zmq", "accelerate", "prometheus_client", "safetensors", "structlog"}
)


class Boundary(TyperGroup):
    """Where errors that have a name become one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            code = exit_code(error)
            if code is None:
                raise
            typer.secho(f"hetserve: {_said(error)}", err=True, fg=typer.colors.RED)
            raise typer.Exit(code) from error


def exit_code(error: Exception) -> int | None:
    """The exit code of an error that HetServe knows by name, None for any other."""
    if isinstance(error, UsageError | TraceError):
        return MISUSED
    if isinstance(error, APIError | ServerMissing):
        return FAILED
    if isinstance(error, ModuleNotFoundError):
        return FAILED if (error.name or "").partition(".")[0] in SERVER_PACKAGES else None
    known = sys.modules.get("core.errors")  # only a command that uses the server can have raised one of its errors
    if known is None or not isinstance(error, known.HetServeError):
        return None
    return MISUSED if isinstance(error, known.ConfigError) else FAILED


def _said(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f'this command needs the server ({error.name} is missing): pip install "hetserve[server]"'
    return " ".join(str(error).split()) or type(error).__name__


app = typer.Typer(
    cls=Boundary,
    help="Serve large language models on mixed GPUs: prefill and decode on separate pools.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (serve, demo, chat, status, bench, make_model, check, version):
    app.command(command.__name__.replace("_", "-"))(command)


def main() -> None:
    """The console script."""
    app()
