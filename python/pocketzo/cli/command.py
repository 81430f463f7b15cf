"""Behaviour of all commands: one-line errors, exit codes, ``--debug``."""

from __future__ import annotations

import os
from typing import Any

import click

from pocketzo.errors import Error

_DEBUG = "pocketzo.debug"


class _Failure(click.ClickException):
    """An error in the user's input: printed as one line, exit code 1."""

    def show(self, file: Any = None) -> None:
        click.echo(f"pocketzo: error: {self.message}", err=True)


def _debug(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        context.meta[_DEBUG] = True


_DEBUG_OPTION = click.Option(
    ["--debug"], is_flag=True, expose_value=False, callback=_debug, help="Show the traceback of an error."
)


class Text(click.types.StringParamType):
    """Text in UTF-8, whatever the locale is. Paths are left as they are: Python opens them by the same bytes."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the text of an argument that Python may have decoded by another encoding."""
        try:
            return os.fsencode(super().convert(value, param, ctx)).decode()
        except UnicodeDecodeError:
            self.fail(f"{value!a} is not UTF-8", param, ctx)


class Command(click.Command):
    """A command that also takes ``--debug``, and whose strings are UTF-8."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for param in self.params:
            if param.type is click.STRING:
                param.type = Text()
        self.params.append(_DEBUG_OPTION)


class Commands(click.Group):
    """The group of all commands, which prints an error as one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(_DEBUG_OPTION)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; print an error in the user's input as one line."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # click handles a closed standard output
        except (Error, ValueError, TypeError, OSError, MemoryError, ImportError) as error:
            if ctx.meta.get(_DEBUG):
                raise
            raise _Failure(one_line(error)) from error
        except KeyboardInterrupt:
            click.echo("pocketzo: interrupted", err=True)
            ctx.exit(130)


def one_line(error: BaseException) -> str:
    """Return an error's message as one line; that of the system has its file in front."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError):
        text = "not enough memory for this" + (f": {text}" if text else "")
    elif isinstance(error, OSError) and not isinstance(error, Error) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    return text or type(error).__name__
