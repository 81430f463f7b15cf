"""Checks of arguments."""

from __future__ import annotations

import pytest

from pocketzo.arguments import compile_pattern


def test_a_regular_expression_is_compiled() -> None:
    assert compile_pattern("trainable", r"layer\.\d").search("layer.7.weight")


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("(", "missing )"),
        ("a{99999999999}", "the repetition number is too large"),
        ("(" * 9999 + ")" * 9999, "maximum recursion depth exceeded"),
    ],
    ids=["re.error", "OverflowError", "RecursionError"],
)
def test_what_is_no_regular_expression_is_named_with_the_reason(pattern: str, reason: str) -> None:
    with pytest.raises(ValueError, match=r"^trainable must be a regular expression, got '") as caught:
        compile_pattern("trainable", pattern)
    assert reason in str(caught.value)


@pytest.mark.parametrize("pattern", [None, 5, b"a"])
def test_a_pattern_that_is_no_string_is_refused(pattern: object) -> None:
    with pytest.raises(TypeError, match=r"^a group's pattern must be a str, got "):
        compile_pattern("a group's pattern", pattern)
