"""The words of ``--train``."""

from __future__ import annotations

import pytest

from pocketzo.trainable.spec import Adapter, Choice, Ia3, Lora, Prefix, parse


def test_each_set_is_understood() -> None:
    parts = parse(r"all+head+bias+norm+last:2+prefix:5+adapter:16+ia3+lora+query\.(weight|bias)")
    assert [part.text for part in parts] == [
        *("all", "head", "bias", "norm", "last:2", "prefix:5", "adapter:16", "ia3", "lora", r"query\.(weight|bias)")
    ]
    assert [part.kind for part in parts if isinstance(part, Choice)] == ["all", "head", "bias", "norm", "last", "regex"]
    assert (parts[4], parts[5]) == (Choice("last:2", "last", layers=2), Prefix("prefix:5", 5))
    assert parts[6:9] == (Adapter("adapter:16", 16), Ia3("ia3"), Lora("lora", 8, 16.0))


def test_lora_has_options() -> None:
    (part,) = parse("lora:r=4,alpha=2.5,targets=q_proj|c{1,2},layers=0,2-3,5-,train=B")
    assert isinstance(part, Lora)
    assert (part.rank, part.alpha, part.both) == (4, 2.5, False)
    assert part.targets is not None
    assert part.targets.pattern == "q_proj|c{1,2}"
    assert part.layers.of(7) == {0, 2, 3, 5, 6}


@pytest.mark.parametrize(
    ("spec", "texts"),
    [
        ("bias+norm", ["bias", "norm"]),
        (r"a\+b", [r"a\+b"]),
        ("(a+b)+[+c]", ["(a+b)", "[+c]"]),
        (r"a\\+b", [r"a\\", "b"]),
        ("layer.*", ["layer.*"]),
    ],
)
def test_parts_are_joined_by_plus(spec: str, texts: list[str]) -> None:
    assert [part.text for part in parse(spec)] == texts


@pytest.mark.parametrize(
    ("spec", "fault"),
    [
        ("", "empty part: expected all, head, bias"),
        ("bias+", "empty part"),
        ("bias+bias", "names a part twice"),
        ("last:0", "'last:0': expected an integer from 1 to .*, got '0'"),
        ("last", "'last': expected an integer from 1 .*, got ''"),
        ("prefix:five", "'prefix:five': expected an integer"),
        ("adapter:-1", "'adapter:-1': expected an integer"),
        ("parallel-adapter", "'parallel-adapter': expected an integer from 1 .*, got ''"),
        ("parallel-adapter:4+norm", "'parallel-adapter:4' is trained alone, beside a frozen model"),
        ("lora:rank=8", "'rank=8' of lora: expected r=, alpha=, targets=, layers=, train="),
        ("lora:", "'' of lora: expected r="),
        ("lora:r=8,r=4", "'r=4' of lora: r is given twice"),
        ("lora:r=0", "'r=0': expected an integer"),
        ("lora:alpha=0", "'alpha=0': expected a number greater than 0"),
        ("lora:train=A", "'train=A': expected B or AB, got 'A'"),
        ("lora:layers=3-1", "'layers=3-1': the range '3-1' ends before it begins"),
        ("lora:layers=-3", "'layers=-3': expected numbers and ranges from 0, such as 3,5-7 or 20-, got '-3'"),
        ("lora:targets=(", "targets must be a regular expression"),
        ("a[", "train must be a regular expression"),
    ],
)
def test_what_is_not_understood_is_named(spec: str, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        parse(spec)
