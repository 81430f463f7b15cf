"""The model of a pipeline on the device that leads a run: it holds no weights, and its session asks the stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import onnxruntime as ort
from numpy.typing import NDArray

from pocketzo.errors import BundleError
from pocketzo.formats.bundle import Bundle
from pocketzo.formats.safetensors import file_sha256
from pocketzo.pipeline.stage import StageInfo
from pocketzo.runtime.image import Image
from pocketzo.runtime.model import Model
from pocketzo.runtime.weights import Weights


class Workers(Protocol):
    """The devices that hold the stages, and what carries calls to them."""

    @property
    def count(self) -> int:
        """How many stages."""

    def call(self, stage: int, method: str, *arguments: Any) -> Any:
        """Call a method of a stage after all calls of it before, and return a promise of the result at once.

        Arguments may be promises of other calls: their results go from stage to stage.
        """

    def result(self, promise: Any) -> Any:
        """Wait for the result of a promise; raises what the call raised."""


class Chain:
    """A session over the stages of a pipeline.

    Parameters
    ----------
    bundle : Bundle
        The whole bundle, of which only the description is read.
    workers : Workers

    Raises
    ------
    BundleError
        The stages are not those of this bundle, or not all of them, or out of order.

    Attributes
    ----------
    infos : list of StageInfo
    """

    def __init__(self, bundle: Bundle, workers: Workers) -> None:
        self._workers = workers
        calls = [workers.call(stage, "info") for stage in range(workers.count)]
        self.infos: list[StageInfo] = [workers.result(call) for call in calls]
        _check(bundle, self.infos)

    def forward(self, point: int | None, names: Sequence[str], feed: Mapping[str, NDArray[Any]]) -> Any:
        """Begin a forward pass at a point of the current step, and return a promise of the outputs by name."""
        given: Any = {}
        for stage, info in enumerate(self.infos):
            own = {name: array for name, array in feed.items() if name in info.inputs or name in info.slices.feed()}
            given = self._workers.call(stage, "forward", point, own, given, list(names))
        return given

    def run(
        self, names: list[str] | None, feed: Mapping[str, NDArray[Any]], options: ort.RunOptions | None = None, /
    ) -> list[NDArray[Any]]:
        """Return outputs by their names, as a session of the whole graph does."""
        del options  # each stage watches its own memory
        assert names is not None
        found = self.result(self.forward(None, names, feed))
        return [found[name] for name in names]

    def result(self, promise: Any) -> Any:
        """Wait for the result of a promise."""
        return self._workers.result(promise)

    def every(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of all stages, and return promises of the results."""
        return [self._workers.call(stage, method, *arguments) for stage in range(len(self.infos))]

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Set the weights of all stages to those of the bundle, and give them an optimizer's settings."""
        for call in self.every("begin", dict(settings)):
            self.result(call)


def _check(bundle: Bundle, infos: Sequence[StageInfo]) -> None:
    found = (bundle.graph_sha256, file_sha256(bundle.trained_path))
    for number, info in enumerate(infos):
        spec = info.spec
        if (spec.graph_sha256, spec.weights_sha256) != found:
            raise BundleError(f"stage {number}: was split from another bundle than {bundle.path}; split this one again")
        if (spec.number, spec.count) != (number, len(infos)):
            raise BundleError(
                f"stage {number} of {len(infos)}: the device there has stage {spec.number} of {spec.count}; name the "
                "devices of all stages, in order"
            )


def pooled_model(bundle: Bundle, workers: Workers) -> Model:
    """Return the model of a pipeline, which runs on all its stages.

    Parameters
    ----------
    bundle : Bundle
        The whole bundle. Its weights stay in their files.
    workers : Workers

    Raises
    ------
    BundleError
        As for :class:`Chain`.
    """
    chain = Chain(bundle, workers)
    last = chain.infos[-1]
    weights = Weights(bundle, Image.allocate(bundle, without=[tensor.name for tensor in bundle.tensors]))
    weights.read()
    return Model(
        bundle,
        weights,
        chain,
        threads=max(info.threads for info in chain.infos),
        max_memory=None,
        forward_seconds={},
        not_prepacked_because=next(filter(None, (info.not_prepacked_because for info in chain.infos)), None),
        slices=last.slices,
    )


def chain_of(model: Model) -> Chain:
    """Return the session of a model of :func:`pooled_model`."""
    if not isinstance(model._session, Chain):
        raise TypeError(f"{model.bundle.path}: is loaded on this device, and not on the stages of a pipeline")
    return model._session


def busy(stages: int, passes: int) -> float:
    """Return the share of a step in which a stage of a pipeline computes, if all stages take the same time.

    Parameters
    ----------
    stages : int
    passes : int
        Forward passes of a step, of all points and parts of a batch, which follow each other.
    """
    return passes / (passes + stages - 1)
