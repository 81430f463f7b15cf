"""Options shared by several commands."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import click

from pocketzo.arguments import compile_pattern
from pocketzo.data.columns import COLUMN_ROLES, Columns, option_of
from pocketzo.data.order import BATCH_SIZE
from pocketzo.machine.memory import parse_size
from pocketzo.optim.groups import ParamGroup
from pocketzo.tasks.metrics import METRICS
from pocketzo.tasks.registry import TASKS


def _regex(_: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Check that an option is a regular expression."""
    try:
        compile_pattern(str(param.name), value or "")
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    return value


def learning_rate(_: click.Context, __: click.Parameter, value: str) -> float | Literal["auto"]:
    """Parse a number, or auto."""
    if value == "auto":
        return "auto"
    try:
        return float(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is neither a number nor auto") from None


def _groups(_context: click.Context, _param: click.Parameter, values: tuple[str, ...]) -> tuple[ParamGroup, ...]:
    """Parse ``PATTERN:lr=X,eps=Y`` options."""
    groups = []
    for value in values:
        pattern, _, text = value.rpartition(":")
        settings = {}
        for part in text.split(","):
            name, _, number = (field.strip() for field in part.partition("="))
            try:
                settings[name] = float(number)
            except ValueError:
                name = ""
            if name not in ("lr", "eps") or not pattern:
                raise click.BadParameter(f"{value!r}: expected PATTERN:lr=NUMBER,eps=NUMBER, or one of the two")
        try:
            groups.append(ParamGroup(pattern, **settings))
        except ValueError as error:
            raise click.BadParameter(str(error)) from None
    return tuple(groups)


def metric_names(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """Parse comma-separated names of metrics."""
    names = [name.strip() for value in values for name in value.split(",")]
    for name in names:
        if name not in METRICS:
            raise click.BadParameter(f"{name!r} is not one of {', '.join(METRICS)}")
    return tuple(dict.fromkeys(names))


def names(_: click.Context, __: click.Parameter, value: str | None) -> list[str] | None:
    """Parse names between commas."""
    return None if value is None else [name.strip() for name in value.split(",")]


def escapes(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    r"""Replace ``\n`` and ``\t``, which a shell leaves as they are; ``\\`` is a backslash."""
    return None if value is None else unescaped(value)


def unescaped(text: str) -> str:
    r"""Return a text with line breaks for ``\n``, tabs for ``\t`` and backslashes for ``\\``."""
    found = {"n": "\n", "t": "\t", "\\": "\\"}
    return re.sub(r"\\([nt\\])", lambda match: found[match[1]], text)


PATH = click.Path(path_type=Path)
bundle_out = click.option(
    "-o", "--output", "output", type=PATH, required=True, metavar="BUNDLE", help="Folder to write."
)
force_option = click.option("--force", is_flag=True, help="Replace a bundle at --output.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def threads_option(default: str) -> Callable[[Any], Any]:
    """Return the option ``--threads``; its help text describes the default."""
    return click.option("--threads", type=int, metavar="N", help=f"Number of threads.  [default: {default}]")


def batch_size_option(help_: str = "Examples per step.") -> Callable[[Any], Any]:
    """Return the option ``--batch-size`` of a command that takes steps."""
    return click.option("--batch-size", type=int, default=BATCH_SIZE, help=help_)


trainable_option = click.option(
    "--trainable",
    callback=_regex,
    metavar="REGEX",
    help="Train only weights whose names contain a match.  [default: all]",
)
groups_option = click.option(
    "--group",
    "groups",
    callback=_groups,
    multiple=True,
    metavar="PATTERN:lr=X,eps=Y",
    help="Factors of --lr and --eps for weights whose names match; repeatable, the first match applies. "
    "A new head needs larger ones than a pretrained body: --group classifier:lr=10,eps=10",
)
weight_decay_option = click.option(
    "--weight-decay", type=float, default=0.0, help="Each step subtracts lr times this share of each matrix."
)
group_by_length_option = click.option(
    "--group-by-length/--no-group-by-length",
    default=None,
    help="Batch texts of similar length, which reduces padding.  [default: wherever the examples are texts]",
)
schedule_option = click.option(
    "--schedule",
    type=click.Choice(["constant", "linear", "cosine"]),
    default="linear",
    help="Schedule of the lr; linear and cosine fall to 0.",
)
warmup_option = click.option("--warmup", type=int, default=0, help="Steps over which the lr first rises linearly.")
base_option = click.option("--base", type=PATH, metavar="BUNDLE", help="The run's base bundle, if it was moved.")
step_option = click.option(
    "--step", type=int, metavar="N", help="Use the weights after N steps of a run.  [default: all steps]"
)
average_option = click.option(
    "--average",
    type=float,
    metavar="SHARE",
    help="Use the mean of the weights over the last share of the steps, such as 0.25.",
)
best_option = click.option("--best", is_flag=True, help="Use the weights at the run's best evaluation.")


def memory_size(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    """Parse a size such as 1.5G into bytes."""
    try:
        return None if value is None else parse_size(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


activation_memory_option = click.option(
    "--activation-memory",
    callback=memory_size,
    metavar="SIZE",
    help="Run a batch in parts whose logits and activations take at most SIZE, such as 100M. The results are the same "
    "but for roundings.  [default: 32M for the logits of language models, and no limit else]",
)


def delimiter(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    """Check a delimiter, which may also be a word for a tab."""
    value = "\t" if value in ("tab", "\\t") else value
    try:
        return Columns(delimiter=value).delimiter
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def column_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say where columns are; the command receives them as ``columns``."""

    @functools.wraps(command)
    def with_columns(*arguments: Any, **options: Any) -> Any:
        given = {role: options.pop(f"{role}_column") for role in COLUMN_ROLES}
        return command(*arguments, columns=Columns(**given, delimiter=options.pop("delimiter")), **options)

    with_columns = click.option(
        "--delimiter",
        callback=delimiter,
        metavar="CHARACTER",
        help="Character between the fields of a .tsv or .csv file, such as ';' or tab.  [default: tab for .tsv, comma "
        "for .csv]",
    )(with_columns)
    for role, held in reversed(COLUMN_ROLES.items()):
        names = dict.fromkeys(name for task in TASKS.values() for name in task.columns.get(role, ()))
        with_columns = click.option(
            option_of(role), metavar="NAME", help=f"Column that holds the {held}.  [default: {', '.join(names)}]"
        )(with_columns)
    return with_columns
