"""What can be said of an answer by looking at it: nothing of it is run."""

from __future__ import annotations

import ast
import re
import textwrap
import warnings

_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.M | re.S)
_PYTHON = {"", "py", "python", "python3"}
_LOOK_BACK = 400
"""Words at an answer's end, in which a repetition is looked for."""
_SHORTEST_LOOP = 20
"""Characters that come three times in a row before that is called repeating itself."""


def code_blocks(answer: str) -> list[tuple[str, str]]:
    """Language and content of its fenced blocks, of one that is not closed too."""
    return _FENCE.findall(answer)


def repeats_itself(answer: str) -> bool:
    """Whether it ends in the same words, three times or more in a row."""
    words = answer.split()[-_LOOK_BACK:]
    for period in range(1, len(words) // 3 + 1):
        last = words[-period:]
        thrice = last == words[-2 * period : -period] == words[-3 * period : -2 * period]
        if thrice and 3 * len(" ".join(last)) >= _SHORTEST_LOOP:
            return True
    return False


def is_python(answer: str) -> bool:
    """Whether an answer holds Python, all of which parses.

    That is its fenced blocks, or else the whole of it. A word or a number parses as well, and is
    no Python here: something must be called, defined, assigned or the like.
    """
    fenced = code_blocks(answer)
    if any(language.lower() not in _PYTHON for language, _ in fenced):
        return False
    trees = [parsed(block) for block in ([code for _, code in fenced] or [answer])]
    return None not in trees and any(_does_something(tree) for tree in trees if tree)


def parsed(code: str) -> ast.Module | None:
    """Its syntax tree, if it is Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as of "\d" in a string
            return ast.parse(textwrap.dedent(code).strip())
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # too deep; a NUL
        return None


def _does_something(tree: ast.Module) -> bool:
    return any(
        isinstance(node, ast.Call | ast.Lambda | ast.comprehension)
        or (isinstance(node, ast.stmt) and not isinstance(node, ast.Expr | ast.AnnAssign))
        or (isinstance(node, ast.AnnAssign) and node.value is not None)  # unlike "Answer: 42"
        for node in ast.walk(tree)
    )
