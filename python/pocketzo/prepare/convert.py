"""Convert an exported ONNX file to a bundle whose weights can be trained in place."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pocketzo.errors import BundleError, DeadWeightError
from pocketzo.formats.bundle import ADAPTER, FLOATS, MODEL, TOKENIZER, WEIGHTS, Bundle, files_of, tensor_ids
from pocketzo.formats.bundle_writer import share_weights, staged_bundle
from pocketzo.formats.files import copy_file, write_file
from pocketzo.formats.probe import PROBE, given_probe, write_probe
from pocketzo.formats.safetensors import read_header, write
from pocketzo.packages import require
from pocketzo.prepare.base import check_base, quantised
from pocketzo.prepare.options import (
    HEAD_ONLY,
    LOSSES,
    PER,
    SIDE_HEAD,
    check_class_names,
    check_tokenizer,
    checked_names,
)
from pocketzo.tasks.registry import loss_text, task_for
from pocketzo.trainable.spec import Choice, ParallelAdapter, Prefix, parse

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pocketzo.formats.bundle import TaskSpec
    from pocketzo.graph.weight import Weight


def prepare(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    labels: Sequence[str] | None = None,
    max_length: int | None = None,
    train: str | None = None,
    dtype: Literal["float32", "float16"] | None = None,
    base: str | None = None,
    loss: Literal["cross-entropy", "bce", "mse", "none"] | None = None,
    task: Literal["prompt", "causal-lm", "choice", "classification", "multi-label", "regression"] | None = None,
    template: str | None = None,
    label_words: Sequence[str] | None = None,
    per: Literal["sum", "token"] = "sum",
    calibrate: str | os.PathLike[str] | None = None,
    probe: str | os.PathLike[str] | Mapping[str, NDArray[Any]] | None = None,
    note: Callable[[str], None] | None = None,
    share_base: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> Bundle:
    """Turn an ONNX model into a bundle.

    With a task, the model is a language model, and the graph that is trained is derived from it: see `task`.

    The graph computes the same function, from weights in a file of their own, stored as its nodes read them. If it
    has no ``loss``, it gets an input ``labels`` and an output ``loss``, the mean over the batch of a function of the
    output ``logits``, or else of the only float output. The loss is the stated one; by default it follows from what
    computes that output:

    ==================================  =============  =========================================================
    output                              default        labels
    ==================================  =============  =========================================================
    [batch, classes]: ``logits``, or    cross-entropy  int64 [batch]
    by Softmax or a linear layer
    [batch, sequence, classes]:         cross-entropy  int64 [batch, sequence]; tokens labelled -100 are ignored
    ``logits``, or by Softmax
    [batch] or [batch, 1]: by Sigmoid   bce            int64 [batch], 0 or 1
    [batch, labels]: by Sigmoid         bce            float32 [batch, labels], 0 or 1
    [batch] or [batch, 1]: others       an error       float32 [batch] for ``mse``
    others                              none           float32 [batch, values] for ``mse``
    ==================================  =============  =========================================================

    Cross-entropy and bce (binary cross-entropy) are computed from the input of a Softmax, LogSoftmax or Sigmoid that
    computes the output, else from the output itself. A causal model's labels have to be the tokens shifted by one; the
    graph does not shift them.

    Model and bundle are run on a small batch, and their outputs have to agree: to 1e-4 of the largest element of each,
    or to 5 % where 16-bit floats or quantised activations round them. Outputs that differ from run to run, as of
    operators that draw random numbers, are not compared, with a warning. The bundle keeps the batch, and :func:`load`
    uses it too.

    Weights are read through memory maps and written one at a time. A model with external data never has more than its
    largest tensor in memory; one without has its file twice. The two runs come after that, one after the other, and
    take as much, and the activations and outputs of the batch.

    Parameters
    ----------
    model : path-like
        An ONNX file of opset 13 or later, or of one that onnx can convert, with external data files in the same folder.
        Weights of float32 and float16 can be trained; all others are frozen.
    out : path-like
        The folder to write.
    tokenizer : path-like, optional
        The model's ``tokenizer.json``, copied into the bundle. With a task, that beside the model is the default.
    labels : sequence of str, optional
        The names of the classes, as many as the logits have.
    max_length : int, optional
        Texts are truncated to this number of tokens.
    train : str, optional
        What is trained. ``"side-head"``: the model is frozen, and a small head reads the outputs of its last layers,
        which :func:`pocketzo.train_head` fits in seconds; it has the options `task`, `template`, `tokenizer`, `labels`,
        `max_length`, `dtype` and `probe`. That is the default of the tasks ``"classification"``, ``"multi-label"`` and
        ``"regression"``, and of ``"prompt"`` without `label_words`. ``"parallel-adapter:R"``, of the same tasks and
        options, is a network beside the last layers that is trained in steps: one block of R units a layer, which reads
        the layer's output and the block before. It needs `labels`. Else the default is ``"all"``. Or sets, joined by
        ``+``. The others of the model's tensors are counted in :attr:`Bundle.frozen`, with the reason. Those that
        choose among its weights are

        - ``all``: matrices, embedding tables, biases and scales, if the runtime sees their changes,
        - ``bias``, ``norm``: the biases; the scales and biases of norms,
        - ``last:K``: the last K layers; ``head``: what comes after the last layer,
        - any other text: a regular expression that is searched for in the names of weights.

        Those that add small float32 tensors, which change nothing at first unless it says so, are

        - ``lora:r=8,alpha=16,targets=REGEX,layers=20-,train=AB``: matrices A [rows, r] and B [r, columns] beside
          projections, by default those of queries and values in all layers, however they are named. `targets` is
          searched for in the names of the projections' weights. With ``train=B``, A is frozen.
        - ``adapter:R``: a bottleneck of R units after the feed-forward part of each layer,
        - ``ia3``: a factor for each key, value and inner activation of a feed-forward part,
        - ``prefix:N``: keys and values of each layer before those of a text; they begin as those of N tokens, and so
          change something, of a decoder with caches that is prepared with a task.
    dtype : {"float32", "float16"}, optional
        The storage type of the weights; also the type of the arithmetic where the CPU supports fp16 arithmetic. By
        default it is that of the file. float16 halves the memory of float32. Inputs, outputs and the added loss keep
        their types. float16 is slow on x86-64, because the runtime converts each weight at every use.
    base : str, optional
        ``"int4"`` or ``"int8"``: quantise the matrices of a float32 export, and the table of tokens, as
        :func:`pocketzo.export.export` does, in blocks of 32 numbers; ``"int4:block=64"`` in blocks of another size: 16,
        32, 64, 128 or 256. They are frozen: what is trained has to be sets that are added, ``norm`` or ``bias``.
    loss : {"cross-entropy", "bce", "mse", "none"}, optional
        The loss to add. ``"none"`` adds none, for training by an objective of your own.
    task : {"prompt", "causal-lm", "choice", "classification", "multi-label", "regression"}, optional
        The last three are for side heads: each text has a class, several labels, or numbers. The names of the classes
        are those of the training data if `labels` are left out; ``"multi-label"`` needs `labels`. The others prepare
        a language model, with an input ``input_ids`` [batch, sequence] and an output ``logits`` [batch, sequence,
        vocabulary]. The graph that is trained has no caches, and computes logits only at the positions that
        an int64 input ``positions`` [n] names, as row * sequence + column. For ``"causal-lm"``, continuing texts, and
        ``"choice"``, choosing between continuations, it has an int64 input ``targets`` [n], the token that each
        position should predict, and the outputs ``token_losses``, float32 [n], and ``loss``, their mean. For
        ``"prompt"``, classifying a text in a template by the word that follows or, in a masked model, is masked, it has
        the output ``logits`` [batch, label words], and input and loss of a classification. The export of a decoder is
        kept as ``generate.onnx``, over the same weights, with the tokens that end a text and the chat template of the
        files beside the model.
    template : str, optional
        For the task ``"prompt"``: contains ``{text}``, and ``{mask}`` for a masked model.
    label_words : sequence of str, optional
        For the task ``"prompt"``: a word for each class, which is one token there. `labels` are these by default.
    per : {"sum", "token"}
        For the task ``"choice"``: the log-likelihood of a choice is the sum over its tokens, or their mean.
    calibrate : path-like, optional
        For the task ``"prompt"``: a file of examples. The mean logit of each label word over their texts is subtracted
        from then on.
    probe : path-like or mapping of str to ndarray, optional
        The batch: an ``.npz`` file or a mapping with an array for each input, of its type and shape. Needed if the
        model does not run on a batch that is made up from its declared inputs: 2 examples of 8 tokens or so.
    share_base : path-like, optional
        Another bundle of the same export: its ``weights.safetensors`` gets a second name in this one, a hard link. So
        several bundles take the storage of one base. Needs a set that is added, or a quantised base.
    note : callable, optional
        Called with a line of text for each choice that was made: which loss, and why.
    overwrite : bool
        Whether a bundle at ``out`` is replaced, when the new one is complete. A folder that holds anything besides a
        bundle's files is never replaced.

    Returns
    -------
    Bundle
        The bundle written.

    Raises
    ------
    BundleError
        If the model, its external data, the tokenizer or the file of the batch cannot be used, the labels do not match,
        the weights of ``share_base`` are others, the stated loss cannot be added, or one has to be stated, the model
        does not run on the batch, its outputs or those of the bundle exceed the range of float16 or differ, or ``out``
        exists and may not be replaced. Nothing is written in these cases.
    DeadWeightError
        If the runtime would not see changes of a weight that ``train`` names.
    MissingExtraError, BrokenPackageError
        If the package onnx or onnx-ir is not installed, or cannot be imported.
    TypeError, ValueError
        If an option is of the wrong type, or out of range, or ``probe`` does not fit to the model's inputs.
    """
    if train is None:
        train = SIDE_HEAD if task in HEAD_ONLY or (task == "prompt" and label_words is None) else "all"
    if train == SIDE_HEAD or isinstance(parse(train)[0], ParallelAdapter):
        from pocketzo.prepare.head import prepare_head

        refused: dict[str, object] = {"base": base, "share_base": share_base, "loss": loss, "label_words": label_words}
        refused |= {"calibrate": calibrate, "per": None if per == PER[0] else per}
        if name := next((name for name, value in refused.items() if value is not None), None):
            raise ValueError(f"{name} is not an option of train={train!r}: its backbone is frozen, its loss the task's")
        return prepare_head(
            model,
            out,
            task=task,
            template=template,
            tokenizer=tokenizer,
            labels=labels,
            max_length=max_length,
            train=train,
            dtype=dtype,
            probe=probe,
            note=note,
            overwrite=overwrite,
        )
    if task in HEAD_ONLY:
        raise ValueError(
            f"the task {task!r} is for train={SIDE_HEAD!r}, got {train!r}: state the loss instead of a task"
        )
    require("onnx", "onnx-ir")
    from pocketzo.graph.compare import Origin, begin_as_tokens, check_language_graphs, check_same_function
    from pocketzo.graph.extract import extract_weights, point_to_weights
    from pocketzo.graph.float16 import needs_conversion, to_float16
    from pocketzo.graph.frozen import count_frozen
    from pocketzo.graph.loss import add_loss
    from pocketzo.graph.read import describe, drop_provenance, read_model, to_bytes
    from pocketzo.graph.transposed import separate_transposes
    from pocketzo.graph.weight import Weight
    from pocketzo.prepare.language import LanguageTask, check_task
    from pocketzo.trainable.add import add
    from pocketzo.trainable.prefix import NAME
    from pocketzo.trainable.select import select

    source = Path(model)
    if not source.is_file():
        raise BundleError(f"{source}: no such file")
    if dtype is not None and dtype not in FLOATS:
        raise ValueError(f"dtype must be {' or '.join(map(repr, FLOATS))}, got {dtype!r}")
    if loss not in (None, *LOSSES):
        raise ValueError(f"loss must be {', '.join(map(repr, LOSSES))} or None, got {loss!r}")
    class_names = checked_names("labels", labels)
    if max_length is not None and (type(max_length) is not int or max_length < 1):
        raise ValueError(f"max_length must be a positive integer or None, got {max_length!r}")
    if tokenizer is not None:
        check_tokenizer(Path(tokenizer))
    parts = parse(train)
    shared = None
    scheme = None if base is None else check_base(base, parts, dtype)
    if share_base is not None:
        if scheme is None and all(isinstance(part, Choice) for part in parts):
            raise ValueError(f"share_base is for sets that are added, such as 'lora'; train is {train!r}")
        shared = Bundle.read(share_base)
    prefix = next((part for part in parts if isinstance(part, Prefix)), None)
    if prefix is not None and task is None:
        raise ValueError(f"train={prefix.text!r} is for a decoder that is prepared with a task, such as 'causal-lm'")
    words = checked_names("label_words", label_words)
    check_task(task, {"template": template, "label_words": words, "calibrate": calibrate}, loss, per)
    texts = None if calibrate is None else Path(calibrate)
    if texts is not None and not texts.is_file():
        raise BundleError(f"{texts}: no such file")
    language = None
    if task is not None:
        language = LanguageTask.of(
            task,
            source,
            tokenizer=None if tokenizer is None else Path(tokenizer),
            labels=class_names,
            template=template,
            label_words=words,
            per=per,
            calibrated=texts is not None,
            note=note,
        )
        tokenizer = language.tokenizer

    with staged_bundle(out, overwrite=overwrite) as folder, ExitStack() as stack:
        try:
            file = source
            if scheme is not None:
                file = stack.enter_context(quantised(source, scheme, Path(out).resolve().parent, note))
            onnx_model = read_model(file)
            origin = Origin.of(file, onnx_model)
            weights = extract_weights(onnx_model, file.parent)
            if language is not None:
                language.mark_unread(onnx_model, weights)
            sets = select(onnx_model.graph, weights, parts)
            chosen = {name for names in sets.values() for name in names}
            frozen = count_frozen(onnx_model.graph, weights, chosen)
            weights = [weight for weight in weights if not weight.inline]
            drop_provenance(onnx_model)
            converted = needs_conversion(weights, chosen, dtype)
            if converted:
                onnx_model = to_float16(onnx_model, weights)
            separate_transposes(onnx_model)
            added, places = add(onnx_model, parts)
            kept = [str(value.name) for value in onnx_model.graph.outputs]
            generating = onnx_model.clone() if language is not None and language.graph.causal else None
            if language is None:
                found = add_loss(onnx_model, loss, labels=class_names is not None)
            else:
                found = language.graph.reduce(onnx_model)
            inputs = tuple(map(describe, onnx_model.graph.inputs))
            outputs = tuple(map(describe, onnx_model.graph.outputs))
            if language is not None:
                spec: TaskSpec | None = language.spec
            else:
                spec = task_for(
                    inputs, outputs, found.scores, labels=class_names, loss=found.kind, threshold=found.threshold
                )
                if class_names is not None:
                    scores = next((value for value in outputs if value.name == found.scores), None)
                    check_class_names(class_names, scores, spec)
        except (BundleError, DeadWeightError) as error:
            raise type(error)(f"{source}: {error}") from None
        given = None if probe is None else given_probe(probe, origin.inputs, inputs)
        front: tuple[int, ...] = ()
        if prefix is not None:
            front, starts = begin_as_tokens(origin, prefix.tokens)
            for tensor in added:
                tensor.fill = starts.get(tensor.name.removeprefix(NAME), tensor.fill)

        if generating is None and language is not None:
            weights = [weight for weight in weights if weight.name in onnx_model.graph.initializers]
        for tensor in added:
            if tensor.trained:
                sets.setdefault(tensor.part, []).append(tensor.name)
        ids = tensor_ids([*(weight.name for weight in weights), *(tensor.name for tensor in added)])
        files = {WEIGHTS: weights}
        if added or scheme is not None:  # then the base is the same for all sets
            files[ADAPTER] = [weight for weight in weights if weight.name in chosen]
            files[ADAPTER] += [Weight(tensor.name, tensor.initial(ids[tensor.name])) for tensor in added]
        for name, stored in files.items():
            _write(folder / name, stored)
            for graph in (onnx_model, generating):
                if graph is not None:
                    point_to_weights(graph, name, read_header(folder / name))
        if shared is not None:
            share_weights(shared, folder, out)
        write_file(folder / MODEL, to_bytes(onnx_model))
        generation = None
        if language is not None and generating is not None:
            generation = language.write_generation(folder, to_bytes(generating))
        if tokenizer is not None:
            copy_file(Path(tokenizer), folder / TOKENIZER)
        bundle = Bundle(
            path=folder,
            **files_of(folder, {name: [part.text for part in parts if name in sets[part.text]] for name in ids}),
            frozen=(*frozen, *(tensor.frozen for tensor in added if not tensor.trained)),
            inputs=inputs,
            outputs=outputs,
            loss=found.output,
            logits=found.scores,
            task=spec,
            max_length=max_length,
            tokenizer=TOKENIZER if tokenizer is not None else None,
            generation=generation,
            added=places,
        )
        del onnx_model, graph, generating, weights, files, stored  # onnxruntime needs their memory
        if language is None:
            names = dict(zip(kept, (value.name for value in outputs), strict=False))  # a loss that was added comes last
            batch = check_same_function(origin, bundle, names, given)
        else:
            batch = check_language_graphs(origin, bundle, kept, language.graph, given, front)
        write_probe(folder / PROBE, batch)
        bundle = replace(bundle, probe=batch)
        bundle.write_description()
        if language is not None and texts is not None:
            language.calibrate(folder, texts, note)
    if note is not None:
        note(f"loss: {loss_text(bundle)} ({found.reason})")
    return Bundle.read(out)


def _write(path: Path, weights: Sequence[Weight]) -> None:
    write(
        path,
        ((weight.name, weight.array) for weight in weights),
        {weight.name: weight.dtype for weight in weights},
    )
