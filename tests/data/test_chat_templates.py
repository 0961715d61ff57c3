"""Chat templates that fail, compute without end or try to escape."""

from pathlib import Path

import pytest
from datasets import Dataset

from fastalign.data import DataError, Tokenized, tokenize_sft
from fastalign.data.chat_template import rendering
from tests.data.chats import CHATML, HEADER, PROMPT, build
from tests.data.messages import ASKED, GOOD, TALK

# Templates that fail


def row_of(template: str, content: str = "bad") -> list[Tokenized]:
    talk = [ASKED | {"content": content}, GOOD]
    return tokenize_sft(
        Dataset.from_list([{"messages": TALK}, {"messages": talk}]), build(template), max_length=64
    )


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("{{ 1 / 0 }}", "got the error ZeroDivisionError: division by zero"),
        ("{{ 1 % (messages | length - 2) }}", "got the error ZeroDivisionError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "got the error RecursionError"),
        ("{{ raise_exception('not this one') }}", "got the error not this one"),
        ("{{ messages['x']['y'] }}", "got the error "),
        ("{{ [] | first + 3 }}", "got the error "),
        ("{{ range(10 ** 9) | list }}", "got the error OverflowError: Range too big"),
        ("{{ 'x' * 10 ** 11 }}", "got the error MemoryError"),
        ("{{ 'x' | int('x') + 1 }}", "got the error TypeError"),
    ],
)
def test_a_template_that_fails_is_an_error_of_the_row(fault: str, message: str) -> None:
    with pytest.raises(DataError, match=rf"^row 2: chat template of .*: {message}"):
        row_of("{% if messages[0]['content'] == 'bad' %}" + fault + "{% endif %}" + CHATML)


@pytest.mark.parametrize(
    ("fault", "row"),
    [
        (
            (
                "{% for i in range(99999) %}{% for j in range(99999) %}{% if i + j < 0 %}x{% endif %}"
                "{% endfor %}{% endfor %}"
            ),
            2,
        ),
        (
            "{{ 9 ** (9 ** (7 + messages | length)) }}",
            2,
        ),  # one operation of C, which no signal handler of Python would interrupt
        ("{{ 9 ** (9 ** 9) }}", 1),  # which Jinja computes when it reads the template
    ],
)
def test_a_template_that_computes_for_minutes_ends_within_seconds_and_the_next_one_works(
    monkeypatch: pytest.MonkeyPatch, fault: str, row: int
) -> None:
    monkeypatch.setattr(rendering, "SECONDS", 0.5)
    with pytest.raises(
        DataError,
        match=rf"^row {row}: chat template of .*: got no text in 0\.5 s of processor time, expected one$",
    ):
        row_of("{% if messages[0]['content'] == 'bad' %}" + fault + "{% endif %}" + CHATML)
    assert len(row_of(CHATML)) == 2


def test_a_template_that_writes_the_date_is_told() -> None:
    """As Llama 3's. A run that resumes on another day would go on with other tokens."""
    with pytest.warns(UserWarning, match="^chat template of .*: it writes the date .* on another day"):
        row_of("{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}" + CHATML)


# Ways out of Jinja's sandbox that are known; each tries to write a file.
WRITE = "open('{path}', 'w').close()"


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''.__class__.__base__.__subclasses__() | map(attribute='__init__.__globals__') | list }}",
    "{{ cycler.__init__.__globals__.os.system('touch {path}') }}",
    "{{ joiner.__init__.__globals__['__builtins__']['open']('{path}', 'w') }}",
    "{{ namespace.__init__.__globals__['__builtins__']['exec'](\"{write}\") }}",
    "{{ raise_exception.__globals__['__builtins__']['exec'](\"{write}\") }}",
    "{{ strftime_now.__globals__['__builtins__'].open('{path}', 'w') }}",
    "{{ self.__init__.__globals__.__builtins__.open('{path}', 'w') }}",
    "{{ (messages | attr('__class__')).__mro__ | last | attr('__subclasses__')() }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages[0]) }}",
    "{{ ('{0.__class__.__mro__}' | attr('format'))(messages) }}",
    "{{ lipsum.__globals__['os'].popen('touch {path}').read() }}",
    "{% set f = messages.__class__.append %}{{ f(messages, 1) }}{{ messages.append({'role': 'user'}) }}",
    "{% import 'os' as os %}{{ os.system('touch {path}') }}",
    "{% include '/etc/passwd' %}",
]


@pytest.mark.parametrize("escape", ESCAPES)
def test_the_sandbox_holds(tmp_path: Path, escape: str) -> None:
    path = tmp_path / "escaped"
    template = escape.replace("{write}", WRITE).replace("{path}", str(path)) + CHATML
    with pytest.raises(DataError, match=r"^rows 1, 2: chat template of .*: got the error "):
        row_of(template)
    assert not path.exists()


def test_unreadable_templates_are_refused() -> None:
    with pytest.raises(
        DataError, match="rows 1, 2: chat template of .*: got the error .*unknown tag 'nothing'"
    ):
        row_of("{% nothing %}" + HEADER + PROMPT)
