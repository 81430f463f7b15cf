"""Epsilon of a client's noise, by dp-accounting."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import pocketzo as pz
from pocketzo.cli.app import cli
from pocketzo.federated.client import Client
from pocketzo.federated.privacy import epsilon
from pocketzo.federated.server import Server


def delta_of(epsilon: float, mu: float) -> float:
    """The delta of Gaussian mechanisms with sum (1 / noise)^2 = mu^2 (Dong, Roth and Su, 2019, corollary 2.13)."""

    def below(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    return below(-epsilon / mu + mu / 2) - math.exp(epsilon) * below(-epsilon / mu - mu / 2)


@pytest.mark.parametrize(("noise", "answers"), [(1.0, 1), (10.0, 100), (2.0, 5)])
def test_epsilon_is_that_of_composed_gaussian_mechanisms(noise: float, answers: int) -> None:
    found = epsilon(noise, answers)
    mu = math.sqrt(answers) / noise
    assert delta_of(found, mu) == pytest.approx(1e-5, rel=0.02)
    assert epsilon(noise, answers, 1e-7) > found


def test_nothing_sent_costs_nothing() -> None:
    assert epsilon(1.0, 0) == 0
    with pytest.raises(ValueError, match="noise must be finite and greater than 0"):
        epsilon(0.0, 1)


def test_the_command_counts_the_answers(tmp_path: Path, tiny_bundle: Path, data: pz.Dataset, model: pz.Model) -> None:
    server = Server.begin(tmp_path / "server", tiny_bundle, steps=3, batch_size=8, lr=1e-3, queries=2, noise=2.0)
    with server, Client(tmp_path / "client", model, data) as client:
        for _ in range(2):
            server.receive("one", client.handle(server.open(["one"])["one"]))
            server.close_round()
    done = CliRunner().invoke(cli, ["federate", "epsilon", str(tmp_path / "client")])
    assert done.exit_code == 0, done.output
    assert f"2 answers with noise 2: epsilon {epsilon(2.0, 2):.4g}, delta 1e-05" in done.output
    assert np.isfinite(epsilon(2.0, 2))
