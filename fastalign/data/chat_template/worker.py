"""Renders chat templates in a process of its own: `python worker.py FD`.

FD is one end of a multiprocessing pipe.

A template is a program that came with a model. Here it can divide by zero, recurse, fill the memory or run
forever without harm to the run. The kernel ends this process after the processor time that a request
allows, and rendering.py reports it.
"""

import json
import resource
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

MEMORY = 2 * 2**30  # bytes, beyond what Python and transformers take


def render(source: str, variables: dict[str, Any], call: dict[str, Any]) -> list[Any]:
    """[text, spans of characters that {% generation %} marks] of one call, or [what went wrong]."""
    try:
        rendered: Any = render_jinja_template(  # annotated as str; texts, and lists of spans
            [call["messages"]],
            tools=call["tools"],
            chat_template=source,
            return_assistant_tokens_mask=call["marks"],
            add_generation_prompt=call["prompt"],
            **variables,
        )
    except Exception as error:
        # Templates and the sandbox say what they refuse; other errors say what happened.
        told = any(kind.__module__.startswith("jinja2") for kind in type(error).__mro__) and str(error)
        return [told or f"{type(error).__name__}: {error}".removesuffix(": ")]
    texts, spans = rendered
    return [texts[0], spans[0] if call["marks"] else []]


def limit_memory() -> None:
    """Refuse memory beyond what the process holds now plus MEMORY, if the system can limit it."""
    used = Path("/proc/self/statm")
    if used.exists():
        limit = int(used.read_text().split()[0]) * resource.getpagesize() + MEMORY
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(
            resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard)
        )


def main() -> None:
    """Answer requests until the other end closes."""
    pipe = Connection(int(sys.argv[1]))
    for number in (signal.SIGINT, signal.SIGTERM):  # they are for the run, which closes the pipe
        signal.signal(number, signal.SIG_IGN)
    # Its default ends the process, also within an operation of C
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    limit_memory()
    while True:
        try:
            source, variables, calls, seconds = pipe.recv()
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_PROF, seconds)
        replies = [render(source, variables, call) for call in calls]
        signal.setitimer(signal.ITIMER_PROF, 0)
        pipe.send_bytes(json.dumps(replies).encode())


if __name__ == "__main__":
    main()
