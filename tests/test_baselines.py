from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pocketzo.train.baselines import Majority


class Labelled:
    fingerprint = ""

    def __init__(self, *labels: int) -> None:
        self.label_ids = np.array(labels, np.int64)

    def __len__(self) -> int:
        return len(self.label_ids)

    def batch(self, indices: Any) -> dict[str, Any]:
        return {"labels": self.label_ids[indices]}


def test_the_class_is_that_of_the_training_data() -> None:
    found = Majority.of(Labelled(2, 0, 2, 1), Labelled(0, 0, 2, 1, 0))
    assert found == Majority(2, 0.2)
    assert Majority.of(Labelled(1, 0), Labelled(0, 0, 1, 0)) == Majority(0, 0.75)  # the first of several


def test_there_is_none_without_classes() -> None:
    without: Any = SimpleNamespace(label_ids=None)
    assert Majority.of(without, Labelled(1)) is None
    assert Majority.of(Labelled(1), without) is None
    assert Majority.of(Labelled(1), None) is None


@pytest.mark.parametrize(("accuracy", "beaten"), [(0.5, False), (0.4, False), (0.51, True), (None, True)])
def test_a_run_that_is_no_better_is_named(accuracy: float | None, beaten: bool) -> None:
    text = Majority(1, 0.5).text(("no", "yes"), {"accuracy": accuracy})
    assert text.startswith("always 'yes', the most frequent class of the training data: accuracy 50.0 %")
    assert ("no better" in text) != beaten
    assert Majority(1, 0.5).text(None, {}).startswith("always class 1,")
