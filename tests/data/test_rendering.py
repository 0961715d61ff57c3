"""The process that renders chat templates: however it ends, its error is one of the row, and the next text
comes from a new process."""

import os
import signal

import pytest

from fastalign.data import DataError
from fastalign.data.chat_template import rendering, worker
from fastalign.data.chat_template.rendering import Call, Rendered

HELLO = Call([{"role": "user", "content": "hello"}])
TEMPLATE = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"


def render_hello() -> list[Rendered]:
    return rendering.render(TEMPLATE, {}, [HELLO])


def test_a_process_that_is_killed_is_an_error_and_the_next_text_comes_from_another() -> None:
    assert render_hello() == [Rendered("hello")]
    os.kill(rendering._running().process.pid, signal.SIGKILL)
    rendering._running().process.wait()
    with pytest.raises(DataError, match=r"got the end of the process that renders it \(status -9\)"):
        render_hello()
    assert render_hello() == [Rendered("hello")]


def test_messages_that_are_nested_too_deeply_are_an_error_and_the_next_text_comes() -> None:
    content: list[object] = []
    for _ in range(100_000):
        content = [content]
    with pytest.raises(DataError, match="got messages that are nested too deeply"):
        rendering.render(TEMPLATE, {}, [Call([{"role": "user", "content": content}])])
    while content:  # from outside inwards, or freeing it recurses
        content = content.pop()  # type: ignore[assignment]
    assert render_hello() == [Rendered("hello")]


def test_a_text_that_was_interrupted_is_not_taken_for_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    first = rendering._running()

    def interrupt(request: object) -> None:
        first.pipe.send(request)
        raise KeyboardInterrupt

    monkeypatch.setattr(first, "ask", interrupt)
    with pytest.raises(KeyboardInterrupt):
        rendering.render("{{ 'stale' }}", {}, [HELLO])
    assert render_hello() == [Rendered("hello")] and rendering._running() is not first


def test_the_process_renders_marks_and_tells_what_a_template_refuses() -> None:
    call = HELLO._replace(marks=True)._asdict()
    assert worker.render(TEMPLATE, {}, call) == ["hello", [(0, 5)]]
    refused = "{{ raise_exception('not this one') }}"
    assert worker.render(refused, {}, HELLO._asdict()) == ["not this one"]
    assert worker.render("{{ 1 / 0 }}", {}, HELLO._asdict()) == ["ZeroDivisionError: division by zero"]
