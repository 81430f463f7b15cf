"""Inputs that ``python -m fuzz`` found: each ended in another library's error."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from fuzz.targets import is_own
from onnx import TensorProto, helper, numpy_helper

import pocketzo as pz
from pocketzo.formats import strict_json
from pocketzo.formats.journal import Journal

RUNS = Path(__file__).parent / "golden" / "runs"


def test_metrics_with_a_damaged_line_name_it(tmp_path: Path) -> None:
    run = next(path.parent for path in sorted(RUNS.glob("*/journal.pzj")))
    shutil.copytree(run, tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    good = b'{"step": 1, "eval": {"loss": 0.5}}\n'
    for bad in (b"\xff\n", b"{}\n", b'{"step": 1.5}\n', b'{"step": 2, "eval": {"loss": "low"}}\n', b"[1]\n", b"\n"):
        metrics.write_bytes(good + bad + good)
        with pytest.raises(pz.JournalError, match=r"metrics\.jsonl, line 2: damaged: ") as caught:
            pz.Run(tmp_path / "run").metrics()
        assert is_own(caught.value)
    metrics.write_bytes(good + good + b'{"step": 3, "ev\xff')
    assert [line["step"] for line in pz.Run(tmp_path / "run").metrics()] == [1, 1]


def test_a_constant_node_with_an_unknown_attribute_is_refused(tmp_path: Path, tiny_onnx: Path) -> None:
    model = onnx.load(tiny_onnx)
    node = helper.make_node("Constant", [], ["unused"], value=helper.make_tensor("v", TensorProto.FLOAT, [1], [1.0]))
    node.attribute[0].name = "x"
    model.graph.node.insert(0, node)
    (tmp_path / "bad.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(pz.BundleError, match=r"bad\.onnx: the graph's constants cannot be read: "):
        pz.prepare(tmp_path / "bad.onnx", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_array_with_a_damaged_header_is_refused(tmp_path: Path, tiny_bundle: Path) -> None:
    content = io.BytesIO()
    np.save(content, np.zeros((2, 4), np.int64))
    header = content.getvalue().replace(b"}", b"(", 1)  # numpy hands it to tokenize
    with zipfile.ZipFile(tmp_path / "data.npz", "w") as archive:
        archive.writestr("input_ids.npy", header)
    with pytest.raises(pz.DataError, match=r"data\.npz: not an \.npz of plain arrays: ") as caught:
        pz.load_dataset(tmp_path / "data.npz", pz.Bundle.read(tiny_bundle))
    assert is_own(caught.value)


def test_a_header_with_a_line_break_in_a_name_gives_one_line(tmp_path: Path) -> None:
    run = next(path.parent for path in sorted(RUNS.glob("*/journal.pzj")))
    header = dict(Journal.open(run / "journal.pzj", write=False).header)
    del header["format"], header["spec"]
    header["method"] = {**header["method"], "a\nb": 1}
    Journal.create(tmp_path / "journal.pzj", header).close()
    model = pz.load(RUNS.parent / "bundle", verify="fast")
    with pytest.raises(pz.JournalError) as caught:
        pz.Run(tmp_path).replay_onto(model)
    assert is_own(caught.value)


def test_a_tokenizer_that_fails_on_a_text_is_named(tmp_path: Path, tiny_onnx: Path) -> None:
    pytest.importorskip("tokenizers")
    vocabulary = {"type": "WordLevel", "vocab": {"good": 1}, "unk_token": "[UNK]"}  # which the vocabulary lacks
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": vocabulary}))
    bundle = pz.prepare(tiny_onnx, tmp_path / "bundle", tokenizer=tmp_path / "tokenizer.json")
    with pytest.raises(pz.BundleError, match=r"tokenizer\.json: the tokenizers library cannot use it: ") as caught:
        pz.encode_texts(["bad"], bundle)
    assert is_own(caught.value)


def test_a_probe_with_a_member_that_is_no_array_is_refused(tmp_path: Path, tiny_onnx: Path) -> None:
    with zipfile.ZipFile(tmp_path / "probe.npz", "w") as archive:
        archive.writestr("input_ids", b"no array")
    with pytest.raises(pz.BundleError, match=r"probe\.npz: 'input_ids' is no array") as caught:
        pz.prepare(tiny_onnx, tmp_path / "out", probe=tmp_path / "probe.npz")
    assert is_own(caught.value)
    assert not (tmp_path / "out").exists()


def sealed(bundle: Path, graph: bytes) -> Path:
    """Give a bundle another graph, with the checksum of that."""
    (bundle / "model.onnx").write_bytes(graph)
    description = json.loads((bundle / "bundle.json").read_text())
    description["graph_sha256"] = hashlib.sha256(graph).hexdigest()
    (bundle / "bundle.json").write_text(json.dumps(description))
    return bundle


def test_a_bundle_whose_graph_is_no_protobuf_is_refused(tmp_path: Path, tiny_bundle: Path) -> None:
    bundle = sealed(shutil.copytree(tiny_bundle, tmp_path / "bundle"), b"\xff" * 9)
    with pytest.raises(pz.BundleError, match=r"model\.onnx: not an ONNX model: ") as caught:
        pz.load(bundle, verify="fast")
    assert is_own(caught.value)


def test_what_onnxruntime_says_of_a_graph_in_several_lines_is_one(tmp_path: Path, tiny_bundle: Path) -> None:
    model = onnx.load(tiny_bundle / "model.onnx", load_external_data=False)
    model.graph.output[0].name = "missing"
    bundle = sealed(shutil.copytree(tiny_bundle, tmp_path / "bundle"), model.SerializeToString())
    with pytest.raises(pz.BundleError, match=r"model\.onnx: onnxruntime refuses the graph: ") as caught:
        pz.load(bundle, verify="fast", prepack=False)
    assert is_own(caught.value)


def test_external_data_of_a_name_that_is_too_long_is_refused(tmp_path: Path, tiny_onnx: Path) -> None:
    onnx.save(
        onnx.load(tiny_onnx), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=64
    )
    model = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    next(entry for entry in tensor.external_data if entry.key == "location").value = "x" * 300
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(
        pz.BundleError, match=rf"weight '{tensor.name}' cannot be read: .*x: File name too long"
    ) as caught:
        pz.prepare(tmp_path / "m.onnx", tmp_path / "out")
    assert is_own(caught.value)


def test_an_error_is_own_only_if_a_statement_of_the_package_raises_it() -> None:
    with pytest.raises(ValueError, match="not a JSON object") as caught:
        strict_json.parse(b"[]")
    assert is_own(caught.value)
    with pytest.raises(UnicodeDecodeError) as undecoded:  # by bytes.decode, which is called there
        strict_json.parse(b"\xff")
    assert not is_own(undecoded.value)


def linear_then(path: Path, *nodes: onnx.NodeProto, **constants: list[int]) -> Path:
    """Write a model that computes ``h`` = x w, and from that ``y`` by the nodes."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["h"]), *nodes],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])],
        [
            numpy_helper.from_array(np.ones((4, 3), np.float32), "w"),
            *(numpy_helper.from_array(np.array(values), name) for name, values in constants.items()),
        ],
    )
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    )
    return path


SOFTMAX = helper.make_node("Softmax", ["h"], ["s"])


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ([helper.make_node("Cast", ["h"], ["y"], "cast")], "node 'cast' (Cast) has no attribute 'to'"),
        ([helper.make_node("Cast", [], ["y"], "cast", to=1)], "node 'cast' (Cast) has 0 inputs and 1 outputs"),
        ([helper.make_node("Add", ["h", "h", "h"], ["y"], "add")], "node 'add' (Add) has 3 inputs and 1 outputs"),
        ([helper.make_node("Add", ["h", ""], ["y"], "add")], "node 'add' (Add) has 2 inputs, one of them empty, and"),
        (
            [helper.make_node("Softmax", ["h"], ["y"], "soft", axis="one")],
            "node 'soft' (Softmax): the attribute 'axis' is of type STRING, its operator takes INT",
        ),
        (
            [
                SOFTMAX,
                helper.make_node("MatMulNBits", ["s"], ["y"], "bits", accuracy_level="4", domain="com.microsoft"),
            ],
            "node 'bits' (MatMulNBits): the attribute 'accuracy_level' is of type STRING, its operator takes INT",
        ),
        ([SOFTMAX, helper.make_node("Transpose", ["s"], ["y"], perm=[0, 5])], "(Transpose)"),
        ([SOFTMAX, helper.make_node("Transpose", ["s"], ["y"], perm=[0])], "runs on none of the batches"),
        ([SOFTMAX, helper.make_node("Squeeze", ["s", "axes"], ["y"])], "(Squeeze)"),
        (
            [helper.make_node("Reshape", ["w", "sizes"], ["v"]), helper.make_node("MatMul", ["x", "v"], ["y"])],
            "(Reshape)",
        ),
        ([helper.make_node("Gather", ["w", "x"], ["y"], axis=9)], "(Gather)"),
    ],
)
def test_a_node_that_does_not_fit_its_operator_is_refused(
    tmp_path: Path, nodes: list[onnx.NodeProto], reason: str
) -> None:
    model = linear_then(tmp_path / "m.onnx", *nodes, axes=[7], sizes=[4, 3, 0])
    with pytest.raises(pz.BundleError, match=re.escape(reason)) as caught:
        pz.prepare(model, tmp_path / "out")
    assert is_own(caught.value)


def test_an_unknown_setting_with_a_line_break_gives_one_line(tmp_path: Path) -> None:
    run = next(path.parent for path in sorted(RUNS.glob("*/journal.pzj")))
    header = dict(Journal.open(run / "journal.pzj", write=False).header)
    del header["format"], header["spec"]
    header["loop"] = {**header["loop"], "a\nb": 1}
    Journal.create(tmp_path / "journal.pzj", header).close()
    with pytest.raises(pz.JournalError, match=r"header\.loop has 'a\\nb', a setting that this version") as caught:
        pz.Run(tmp_path)
    assert is_own(caught.value)


@pytest.mark.parametrize("old", [b"dense_0", b"MatMul", b"embedding.weight"])
def test_a_text_of_a_graph_that_is_not_utf8_is_refused(tmp_path: Path, tiny_onnx: Path, old: bytes) -> None:
    data = tiny_onnx.read_bytes()
    assert old in data
    (tmp_path / "bad.onnx").write_bytes(data.replace(old, b"\xff" + old[1:]))
    with pytest.raises(pz.BundleError, match=r"bad\.onnx: .*b'\\xff.*' in it is not UTF-8") as caught:
        pz.prepare(tmp_path / "bad.onnx", tmp_path / "out")
    assert is_own(caught.value)


def test_a_remark_in_a_graph_may_be_in_any_encoding(tmp_path: Path, tiny_onnx: Path) -> None:
    model = onnx.load(tiny_onnx)
    model.graph.node[0].doc_string = "remark"
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString().replace(b"remark", b"\xffemark"))
    pz.prepare(tmp_path / "m.onnx", tmp_path / "out")


def test_a_weight_without_an_element_type_is_refused(tmp_path: Path, tiny_onnx: Path) -> None:
    model = onnx.load(tiny_onnx)
    model.graph.initializer[0].data_type = TensorProto.UNDEFINED
    (tmp_path / "bad.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(pz.BundleError, match=r"weight 'embedding.weight' has no element type") as caught:
        pz.prepare(tmp_path / "bad.onnx", tmp_path / "out")
    assert is_own(caught.value)


def with_own_loss(path: Path, operator: str) -> Path:
    """Write a model whose loss an operator computes from x w, and which declares that it is one number."""
    nodes = [helper.make_node(operator, ["h"], ["m"]), helper.make_node("Reshape", ["m", "one"], ["loss"])]
    model = onnx.load(linear_then(path, *nodes, one=[-1]))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("loss", TensorProto.FLOAT, [1]))
    path.write_bytes(model.SerializeToString())
    return path


def test_a_loss_with_an_axis_is_taken_if_it_is_one_number(tmp_path: Path) -> None:
    batch = {"x": np.ones((2, 4), np.float32)}
    pz.prepare(with_own_loss(tmp_path / "one.onnx", "ReduceMean"), tmp_path / "one")
    assert pz.load(tmp_path / "one", verify="fast").loss(batch) == 4
    pz.prepare(with_own_loss(tmp_path / "more.onnx", "Relu"), tmp_path / "more")
    with pytest.raises(pz.BundleError, match=r"the loss 'loss' has the shape \[6\], expected one number") as caught:
        pz.load(tmp_path / "more", verify="fast").loss(batch)
    assert is_own(caught.value)
