"""The weights in memory, without a session: plain, prepacked, and both."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

import pocketzo as pz
from pocketzo.errors import BundleError
from pocketzo.runtime.image import Image
from pocketzo.runtime.layout import Layout, Location
from pocketzo.runtime.weights import Weights

LAYOUT = Layout(depth=64, pad=32)
# By name, the prepacked weights, and of these the ones that the image has, too.
KEPT: list[tuple[list[str], list[str]]] = [
    ([], []),
    (["dense.weight"], []),
    (["dense.weight"], ["dense.weight"]),
    (["embedding.weight", "dense.weight", "classifier.weight"], ["embedding.weight"]),
    (["embedding.weight", "dense.weight", "classifier.weight"], []),
]


def made(bundle: pz.Bundle, prepacked: Iterable[str], shared: Iterable[str]) -> Weights:
    locations = {}
    for tensor in bundle.tensors:
        if tensor.name in prepacked:
            packing = LAYOUT.packing(*tensor.shape, transposed=False)
            locations[tensor.name] = Location(np.zeros(packing.size, np.float32), packing)
    return Weights(bundle, Image.allocate(bundle, without=set(prepacked) - set(shared)), locations)


@pytest.fixture
def bundle(tiny_bundle: Path) -> pz.Bundle:
    return pz.Bundle.read(tiny_bundle)


@pytest.mark.parametrize(("prepacked", "shared"), KEPT, ids=str)
def test_weights_are_usable_when_made(
    bundle: pz.Bundle, prepacked: list[str], shared: list[str], tmp_path: Path
) -> None:
    weights = made(bundle, prepacked, shared)
    floats = [tensor for tensor in bundle.tensors if tensor.dtype == "float32"]
    assert list(weights) == [tensor.name for tensor in floats]
    for tensor in floats:
        np.testing.assert_array_equal(weights[tensor.name], np.zeros(tensor.shape, np.float32))
        assert len(weights.segments(tensor.name)) == 1 + (tensor.name in shared)
    weights.read()
    whole = Weights(bundle)
    whole.read()
    for name, stored in whole.items():
        np.testing.assert_array_equal(weights[name], stored)
    weights.save(tmp_path / "saved")
    assert (tmp_path / "saved").read_bytes() == bundle.weights_path.read_bytes()
    rng = np.random.default_rng(1)
    for tensor in floats:
        value = rng.standard_normal(tensor.shape, np.float32)
        weights[tensor.name] = whole[tensor.name] = value
        for memory, _, packing in weights.segments(tensor.name):
            out = np.empty_like(value)
            if packing is None:
                out[...] = memory
            else:
                packing.unpack(memory, out, 0)
            np.testing.assert_array_equal(out, value)
    assert weights.sha256() == whole.sha256()
    weights.read(tmp_path / "saved")
    weights.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == bundle.weights_path.read_bytes()


@pytest.mark.parametrize(("prepacked", "shared"), KEPT, ids=str)
def test_an_image_has_no_bytes_of_weights_that_are_elsewhere(
    bundle: pz.Bundle, prepacked: list[str], shared: list[str]
) -> None:
    image = made(bundle, prepacked, shared).image
    elsewhere = set(prepacked) - set(shared)
    assert {part for part in image.parts if isinstance(part, str)} == elsewhere
    size = bundle.weights_path.stat().st_size - sum(
        4 * int(np.prod(tensor.shape)) for tensor in bundle.tensors if tensor.name in elsewhere
    )
    assert sum(part.size for part in image.parts if not isinstance(part, str)) == size
    assert elsewhere.isdisjoint(image.views)
    for name, value in image.values.items():  # a session reads the memory of the views
        image.views[name][...] = 3
        np.testing.assert_array_equal(value.numpy(), image.views[name])


def test_what_is_pending_comes_before_every_access(bundle: pz.Bundle, tmp_path: Path) -> None:
    weights = made(bundle, ["dense.weight"], [])
    calls: list[int] = []
    weights.defer(lambda: calls.append(1))
    accesses: list[Callable[[], object]] = [
        lambda: weights["dense.bias"],
        lambda: weights.__setitem__("dense.bias", 0),
        lambda: weights.fill("dense.bias", 0),
        lambda: weights.read(),
        lambda: weights.save(tmp_path / "saved"),
        lambda: weights.sha256(),
        lambda: weights.flush(),
        lambda: weights.defer(lambda: None),  # of another optimizer
    ]
    for count, access in enumerate(accesses, 1):
        access()
        assert len(calls) == count
    weights.flush()
    assert len(calls) == len(accesses)


def test_a_file_that_is_not_the_bundles_is_refused(bundle: pz.Bundle, tmp_path: Path) -> None:
    weights = Weights(bundle)
    shutil.copyfile(bundle.weights_path, tmp_path / "long")
    with (tmp_path / "long").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(BundleError, match=r"long: expected \d+ bytes, the size of the bundle's weights"):
        weights.read(tmp_path / "long")
    with pytest.raises(BundleError, match=r"nothing: cannot be read: No such file"):
        weights.read(tmp_path / "nothing")
