"""``pocketzo info``."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from pocketzo.cli.command import Command
from pocketzo.cli.console import evaluation_table, evaluations_of, fact, out, print_facts, say
from pocketzo.cli.frozen import tensor_lines
from pocketzo.cli.head import is_head_run
from pocketzo.cli.options import PATH, json_option
from pocketzo.cli.runs import as_run
from pocketzo.doctor import prepacking
from pocketzo.errors import Error, NotCuttableError
from pocketzo.formats.bundle import Bundle
from pocketzo.formats.frozen import elements_by_kind
from pocketzo.formats.safetensors import file_sha256
from pocketzo.runtime.cut import plan_cut
from pocketzo.tasks.registry import loss_text, task_of
from pocketzo.train.cached import WORTHWHILE
from pocketzo.train.head.run import PARAMETERS, RECORD, HeadRun
from pocketzo.train.run import JOURNAL, Run
from pocketzo.train.verdict import verdict

_TOKENS = 32  # of a text, for which the share of a forward pass is told that a cache saves


@click.command(cls=Command)
@click.argument("path", type=PATH, metavar="BUNDLE|RUN")
@json_option
@click.option("--tensors", is_flag=True, help="List a bundle's weights, whose names --trainable and --group match.")
def info(path: Path, as_json: bool, tensors: bool) -> None:
    """Show what a bundle or a run, of steps or of a side head, holds.

    \b
    Example:
      pocketzo info base --tensors
    """
    if is_head_run(path):
        _print_head(_head_facts(path), as_json=as_json)
        return
    run = as_run(path)
    if run is not None:
        facts = _run_facts(run)
    else:
        bundle = Bundle.read(path)
        facts = bundle_facts(bundle)
        facts["tuned"] = file_sha256(bundle.trained_path) != bundle.prepared_sha256
        facts["prepacking"] = prepacking(bundle)
        facts["before_trained"] = _before_trained(bundle)
        if as_json:
            facts["tensors"] = [asdict(tensor) | {"trainable": tensor.trainable} for tensor in bundle.tensors]
            facts["frozen_tensors"] = [asdict(tensor) for tensor in bundle.frozen]
    if as_json:
        say(json.dumps(facts))
        return
    if facts.get("task"):
        labels = {name: value for name, value in facts["task"]["settings"].items() if name == "labels"}
        facts["task"] = ", ".join([facts["task"]["name"], fact("", labels)]).removesuffix(", ")
    if run is not None:
        _print_run(run, facts)
        return
    facts["loss"] = loss_text(bundle)
    if facts["before_trained"] is not None:
        facts["before_trained"] = f"{facts['before_trained']:.0%} of a forward pass, see train --cache"
    print_facts({name: value for name, value in facts.items() if value is not None})
    if tensors:
        click.echo("\n".join(tensor_lines(bundle)))


def _before_trained(bundle: Bundle) -> float | None:
    """Return the share of a forward pass that comes before all that is trained; None if it is not worth keeping."""
    try:
        cut = plan_cut(bundle, least=WORTHWHILE / 2)
    except NotCuttableError:
        return None
    return round(cut.saved(1, _TOKENS), 3)


def _print_head(facts: dict[str, Any], *, as_json: bool) -> None:
    """Print the facts of a head's run, and its evaluations as `pocketzo train` does at its end."""
    if as_json:
        say(json.dumps(facts))
        return
    evaluations = {"linear probe": facts.pop("probe_eval"), "side head": facts.pop("eval")}
    print_facts({name: value for name, value in facts.items() if value is not None})
    if columns := {name: found for name, found in evaluations.items() if found is not None}:
        say()
        out.print(evaluation_table(columns))


def _print_run(run: Run, facts: dict[str, Any]) -> None:
    """Print the facts of a run, and what it achieved as `pocketzo train` does at its end."""
    facts["steps"] = f"{facts.pop('steps_done'):,} of {facts['steps']:,}"
    facts["trained"] = f"{facts['trained']} tensors"
    for name in ("before", "last_step", "last", "best_step", "best"):
        del facts[name]
    print_facts(facts)
    try:
        untrained = task_of(Bundle.read(run.recipe.model.bundle)).untrained
    except Error:  # it was moved
        untrained = None
    if columns := evaluations_of(run, untrained):
        say()
        out.print(evaluation_table(columns))
    for line in verdict(run):
        say(line)


def bundle_facts(bundle: Bundle) -> dict[str, Any]:
    """Return the facts about a bundle that ``pocketzo info`` prints."""
    trainable = sum(math.prod(tensor.shape) for tensor in bundle.tensors if tensor.trainable)
    return {
        "kind": "bundle" if bundle.stage is None else f"stage {bundle.stage.number} of {bundle.stage.count}",
        "path": os.fspath(bundle.path),
        "parameters": trainable + sum(tensor.elements for tensor in bundle.frozen if tensor.is_weight),
        "trainable": trainable,
        "frozen": elements_by_kind(bundle.frozen),
        "sets": {
            name: sum(math.prod(tensor.shape) for tensor in bundle.tensors if name in tensor.sets)
            for name in bundle.trainable
        },
        "bytes": sum(path.stat().st_size for path in bundle.path.iterdir() if path.is_file()),
        "inputs": [vars(value) for value in bundle.inputs],
        "outputs": [vars(value) for value in bundle.outputs],
        "task": None if bundle.task is None else asdict(bundle.task),
        "loss": bundle.loss,
        "logits": bundle.logits,
        "max_length": bundle.max_length,
        "tokenizer": bundle.tokenizer,
        "base_sha256": bundle.base_sha256,
    }


def _head_facts(path: Path) -> dict[str, Any]:
    run, head = HeadRun.read(path)
    trials = run.results.get("trials")
    return {
        "kind": "side head",
        "path": os.fspath(path),
        "bytes": sum((path / name).stat().st_size for name in (RECORD, PARAMETERS)),
        "parameters": sum(array.size for array in head.tensors().values()),
        "layers": run.layers,
        "labels": run.labels,
        "held_out_loss": trials[0]["loss"] if trials else None,
        "base": {"bundle": run.bundle, "graph_sha256": run.graph_sha256, "weights_sha256": run.weights_sha256},
        "probe_eval": run.results.get("probe_eval"),
        "eval": run.results.get("eval"),
    }


def _run_facts(run: Run) -> dict[str, Any]:
    evaluations, best = run.evaluations(), run.best_step
    recipe = run.recipe
    source = recipe.data.source
    method = {name: value for name, value in recipe.method.items() if name != "trained"}
    return {
        "kind": "run",
        "path": os.fspath(run.path),
        "steps_done": run.steps,
        "steps": recipe.loop.steps,
        "journal_bytes": (run.path / JOURNAL).stat().st_size,
        "method": method,
        "trained": len(recipe.method["trained"]),
        "loop": asdict(recipe.loop),
        "session": asdict(recipe.session),
        "base": asdict(recipe.model),
        "data": {"train": source.train, "eval": source.eval},
        "before": evaluations.get(0),
        "last_step": max(evaluations, default=None),
        "last": evaluations[max(evaluations)] if evaluations else None,
        "best_step": best,
        "best": None if best is None else evaluations[best],
        "spec": run.spec,
    }
