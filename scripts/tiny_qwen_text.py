"""The text `builtin:tiny-qwen` is pretrained on: Python's standard library, and talk about it.

Everything is a function of the interpreter's own library and a seed; nothing is downloaded.
"""

import ast
import random
import re
import sysconfig
import textwrap
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

Conversation = list[dict[str, str]]

# Left out: tests, big tables of data, and packages that not every installation or version has.
SKIPPED_FOLDERS = {
    "__pycache__", "distutils", "encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data",
    "site-packages", "test", "tests", "tkinter", "turtledemo",
}  # fmt: skip
# Never trained on: what the recorded held-out loss is measured on.
HELD_OUT = ("bisect.py", "fractions.py", "heapq.py", "shlex.py", "textwrap.py")
MAX_FUNCTION_LINES = 14


def library_sources() -> dict[str, str]:
    """Source text by path from the standard library's folder ("json/decoder.py"), sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    sources = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        generated = any(part.startswith(("config-", "_sysconfigdata")) for part in relative.parts)
        if generated or SKIPPED_FOLDERS.intersection(relative.parts):
            continue
        sources[relative.as_posix()] = path.read_text("utf-8")
    return sources


def function_names(sources: Iterable[str]) -> list[str]:
    """The public functions' names of the sources, sorted."""
    found = (re.findall(r"def ([a-z]\w{2,})\(", source) for source in sources)
    return sorted(set(chain.from_iterable(found)))


def library_conversations(source: str, rng: random.Random) -> Iterator[Conversation]:
    """A request and its answer for each short, documented function of one module."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef) or node.end_lineno is None:
            continue
        documentation = ast.get_docstring(node)
        if not documentation or node.end_lineno - node.lineno >= MAX_FUNCTION_LINES:
            continue
        summary = " ".join(documentation.split("\n\n")[0].split())
        code = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
        arguments = ", ".join(argument.arg for argument in node.args.args)
        kind = "method" if arguments.startswith(("self", "cls")) else "function"
        yield from (
            conversation(
                rng.choice(
                    (
                        f"Write a Python {kind} {node.name}({arguments}). {summary}",
                        f"Write {node.name}({arguments}) in Python: {summary}",
                        f"{summary}\n\nName the {kind} {node.name}.",
                    )
                ),
                fenced(code),
            ),
            conversation(
                rng.choice(
                    (
                        f"What does {node.name}({arguments}) do?",
                        f"Explain the {kind} {node.name}.",
                        f"What is this for?\n\n{code}",
                    )
                ),
                summary,
            ),
        )


def conversation(request: str, answer: str) -> Conversation:
    return [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]


def fenced(code: str) -> str:
    return f"```python\n{code}\n```"


# The parts of the made-up functions: how a request words each, and how Python writes it.
LISTS = ("numbers", "values", "data", "xs", "items", "samples")
TEXTS = ("text", "word", "line", "name", "s")
SCALARS = (("a", "b"), ("x", "y"), ("n", "m"), ("left", "right"), ("first", "second"))
MAPS = {
    "{x}": "{x}",
    "the square of {x}": "{x} ** 2",
    "{x} times {n}": "{x} * {n}",
    "{x} plus {n}": "{x} + {n}",
    "{x} minus {n}": "{x} - {n}",
    "the absolute value of {x}": "abs({x})",
    "{x} as a string": "str({x})",
    "the remainder of {x} by {n}": "{x} % {n}",
}
FILTERS = {
    "": "",
    " greater than {n}": "{x} > {n}",
    " less than {n}": "{x} < {n}",
    " other than {n}": "{x} != {n}",
    " that is a multiple of {n}": "{x} % {n} == 0",
    " of at least {n}": "{x} >= {n}",
}
CHECKS = {
    "{a} is greater than {b}": "{a} > {b}",
    "{a} equals {b}": "{a} == {b}",
    "{a} is a multiple of {b}": "{a} % {b} == 0",
    "{a} and {b} are both positive": "{a} > 0 and {b} > 0",
    "{a} or {b} is zero": "{a} == 0 or {b} == 0",
    "{a} is not {b}": "{a} != {b}",
}
RESULTS = {
    "{a}": "{a}",
    "{b}": "{b}",
    "the sum of {a} and {b}": "{a} + {b}",
    "the product of {a} and {b}": "{a} * {b}",
    "the difference of {a} and {b}": "{a} - {b}",
    "{n}": "{n}",
    "None": "None",
    "True": "True",
    "False": "False",
}
TEXT_STEPS = {
    "in lower case": ".lower()",
    "in upper case": ".upper()",
    "without spaces at its ends": ".strip()",
    'with every "{c}" replaced by "{d}"': '.replace("{c}", "{d}")',
    'split at every "{c}"': '.split("{c}")',
    "without its first {n} characters": "[{n}:]",
    "cut after {n} characters": "[:{n}]",
    "repeated {n} times": " * {n}",
}


def made_up_conversations(
    count: int, names: list[str], rng: random.Random
) -> Iterator[Conversation]:
    """`count` requests for small functions put together from the parts above, with answers.

    Their names are drawn from `names`: many, so that a name is learned to be copied from a request.
    """
    makers = (_about_a_list, _about_a_total, _about_two_values, _about_a_text)
    for _ in range(count):
        name = rng.choice(names)
        arguments, wish, body = rng.choice(makers)(rng)
        request = rng.choice(
            (
                f"Write a Python function {name}({arguments}) that returns {wish}.",
                f"Write a Python function `{name}` that returns {wish}.",
                f"Write {name}({arguments}) in Python: return {wish}.",
                f"I need a function called {name}. It should take {arguments} and return {wish}.",
            )
        )
        code = (
            f'def {name}({arguments}):\n    """Return {wish}."""\n{textwrap.indent(body, "    ")}'
        )
        yield conversation(request, fenced(code))


def _about_a_list(rng: random.Random) -> tuple[str, str, str]:
    """Arguments, what is returned in words, and the body: here a list made from a list."""
    slots = {"xs": rng.choice(LISTS), "x": rng.choice("xivn"), "n": rng.randint(2, 20)}
    (words, expression), (filter_words, condition) = _pick(MAPS, rng), _pick(FILTERS, rng)
    wish = f"a list of {words} for each {{x}} in {{xs}}{filter_words}"
    if rng.random() < 0.5:
        body = f"return [{expression} for {{x}} in {{xs}}{' if ' * bool(condition)}{condition}]"
    else:
        body = _loop("result", "[]", f"result.append({expression})", condition)
    return slots["xs"], wish.format(**slots), body.format(**slots)


def _about_a_total(rng: random.Random) -> tuple[str, str, str]:
    slots = {"xs": rng.choice(LISTS), "x": rng.choice("xivn"), "n": rng.randint(2, 20)}
    filter_words, condition = _pick(FILTERS, rng)
    if rng.random() < 0.5:
        wish, body = "how many {x} in {xs} there are", _loop("count", "0", "count += 1", condition)
    else:
        wish, body = "the sum of each {x} in {xs}", _loop("total", "0", "total += {x}", condition)
    return slots["xs"], (wish + filter_words).format(**slots), body.format(**slots)


def _about_two_values(rng: random.Random) -> tuple[str, str, str]:
    a, b = rng.choice(SCALARS)
    slots = {"a": a, "b": b, "n": rng.randint(0, 20)}
    (yes_words, yes), (no_words, no), (check_words, check) = (
        _pick(parts, rng) for parts in (RESULTS, RESULTS, CHECKS)
    )
    wish = f"{yes_words} if {check_words}, otherwise {no_words}"
    if rng.random() < 0.5:
        body = f"return {yes} if {check} else {no}"
    else:
        body = f"if {check}:\n    return {yes}\nreturn {no}"
    return f"{a}, {b}", wish.format(**slots), body.format(**slots)


def _about_a_text(rng: random.Random) -> tuple[str, str, str]:
    slots = {"n": rng.randint(2, 9), "c": rng.choice("abcxyz,.-_"), "d": rng.choice("0123 +*/#")}
    text = rng.choice(TEXTS)
    words, step = _pick(TEXT_STEPS, rng)
    return text, f"{text} {words}".format(**slots), f"return {text}{step}".format(**slots)


def _loop(name: str, start: str, action: str, condition: str) -> str:
    """The lines of a loop over {xs} that starts from `start` and acts on each {x} that fits."""
    inner = f"if {condition}:\n        {action}" if condition else action
    return f"{name} = {start}\nfor {{x}} in {{xs}}:\n    {inner}\nreturn {name}"


def _pick(parts: dict[str, str], rng: random.Random) -> tuple[str, str]:
    return rng.choice(list(parts.items()))
