"""How a function becomes a command of `tightrope`: printing, --json, Ctrl-C."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any, TypeVar

import typer

from tightrope import __version__

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
Json = dict[str, Any]
Verb = TypeVar("Verb", bound=Callable[..., Json | None])


def verb(kept: str = "", app: typer.Typer = app) -> Callable[[Verb], Verb]:
    """Make a function a command of `app`. Its result is printed for --json; `kept`: what Ctrl-C leaves of its
    work.
    """

    def register(function: Verb) -> Verb:
        @wraps(function)
        def command(**options: Any) -> None:
            try:
                result = function(**options)
            except KeyboardInterrupt:
                print(f"interrupted{kept and '; ' + kept}", file=sys.stderr)
                raise typer.Exit(130) from None
            if options.get("as_json") and result is not None:
                print(json.dumps(result))

        app.command()(command)
        return function

    return register


def _version(asked: bool) -> None:
    if asked:
        print(f"tightrope {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Fit a trained vision network to a hard budget, and really execute it: in the clear or in private."""
