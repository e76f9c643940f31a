"""Renders a few conversations with a template of a stranger's, under limits of time and memory.

A program of its own, which `chat_template` runs in isolation: it reads an order from standard
input and writes the number of characters that the template made. It is killed where it takes more
than it may, and imports nothing of ours.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from typing import Any

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds.",
            "parameters": {"type": "object", "properties": {"a": {"type": "number"}}},
        },
    }
]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CODE = "```python\ndef f(x):\n    return {'a': x}  # <b> & \"quotes\" 1,000 é\n```\n"
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi."}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": CODE * 20}],
    [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "<think>\nEasy.\n</think>\n\n2"},
        {"role": "user", "content": ""},
    ],
]


def main() -> None:
    """Render the order's template with every conversation, with and without tools."""
    order = json.load(sys.stdin)
    limit(order["seconds"], order["bytes"])
    sys.path[:] = order["path"]
    texts = rendered(order["template"])
    sys.stdout.write(str(max(map(len, texts), default=0)))


def rendered(source: str) -> Iterator[str]:
    """What the template makes of each conversation that it does not refuse."""
    template = None
    for chat in CHATS:
        for tools in (None, TOOLS):
            try:
                template = template or compiled(source)
                yield template.render(messages=chat, tools=tools, add_generation_prompt=True)
            except MemoryError:
                os.kill(os.getpid(), signal.SIGKILL)
            except Exception:
                continue


def limit(seconds: int, size: int) -> None:
    """Let the kernel end this process."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    with suppress(OSError, ValueError):  # macOS, where the parent counts
        resource.setrlimit(resource.RLIMIT_AS, (size, size))


def compiled(source: str) -> Any:
    """The template as transformers compiles it: the same sandbox, filters and names."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Takes ``{% generation %} … {% endgeneration %}`` as what is between them."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Environment(ImmutableSandboxedEnvironment):
        """Refuses a product that makes a huge text or list, which no limit would stop in time."""

        intercepted_binops = frozenset("*")

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            for value, times in ((left, right), (right, left)):
                sized = isinstance(value, (str, list, tuple)) and isinstance(times, int)
                if sized and len(value) * times > 100_000_000:
                    raise MemoryError
            return super().call_binop(context, operator, left, right)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)


if __name__ == "__main__":
    main()
