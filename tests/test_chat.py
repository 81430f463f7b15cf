"""Chat templates: the text that transformers renders, and errors in one line."""

from __future__ import annotations

import re
from datetime import datetime

import pytest

from pocketzo.data.chat import render
from pocketzo.errors import DataError

pytest.importorskip("jinja2", reason="chat templates are Jinja")

HELLO = [{"role": "user", "content": "Hello <you> & é"}]
CHATML = """{% for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' -}}
{% endfor %}
{% if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' -}}
{% endif %}
"""


def of(template: str, messages: list[dict[str, str]] = HELLO, *, prompt: bool = True) -> str:
    return render(template, {"bos_token": "<s>", "eos_token": "</s>"}, messages, add_generation_prompt=prompt)


def test_blocks_leave_no_white_space() -> None:
    start = "<|im_start|>user\nHello <you> & é<|im_end|>\n"
    assert of(CHATML, prompt=False) == start
    assert of(CHATML) == f"{start}<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}", "<s>Hello <you> & é</s>"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "Hello <you> & é"}]'),  # nothing escaped
        ("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}", '{\n "a": 2,\n "b": 1\n}'),
        ("{% for n in range(9) %}{% if n == 2 %}{% break %}{% endif %}{{ n }}{% endfor %}", "01"),
        ("{% generation %}{{ 'said' }}{% endgeneration %}.", "said."),
        ("{{ tools is none }} {{ documents is none }} {{ pad_token is defined }}", "True True False"),
        ("{% set ns = namespace(n=0) %}{% set ns.n = 3 %}{{ ns.n }}", "3"),
    ],
)
def test_a_template_has_what_transformers_gives_to_it(template: str, expected: str) -> None:
    assert of(template) == expected


def test_a_template_may_name_the_date() -> None:
    assert of("{{ strftime_now('%Y') }}") in {str(datetime.now().year + late) for late in (-1, 0)}


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('Roles must alternate') }}", "(of user): Roles must alternate"),
        ("{{ messages[0].content + 1 }}", "(of user): can only concatenate str"),
        ("{{ missing.content }}", "'missing' is undefined"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "'__class__'"),
        ("{{ messages.append(1) }}", "'append'"),
        ("{% for x in range(99999999) %}{% endfor %}", "too big"),
        ("a\n{% if %}", "is not Jinja: Expected an expression"),
        ("a\n{% endfor %}", "(line 2)"),
    ],
)
def test_a_template_that_fails_is_named_with_its_reason(template: str, reason: str) -> None:
    with pytest.raises(DataError, match=f"^the chat template .*{re.escape(reason)}"):
        of(template)
