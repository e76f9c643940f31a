"""Programming tasks in HumanEval's format: what a model writes is run against their tests.

Chen et al. 2021, arXiv:2107.03374. One answer a task, the likeliest, so that pass@1 is the share of
tasks whose program passes. An instruct model is asked in EvalPlus's words and ended where EvalPlus
ends it (Liu et al. 2023, arXiv:2305.01210), so that figures can be set beside published ones.
"""

from __future__ import annotations

import ast
import gzip
import json
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from mlx_tuner.commands import task_guard
from mlx_tuner.commands.quality import code_blocks, parsed
from mlx_tuner.errors import DataError, Fault, RunError

SECONDS = 10
"""Of CPU, and of the clock, that a program may take."""
MEMORY_BYTES = 1 << 30
_PASSED = 93
"""Exit code of a program that has come to the end of its test."""
_FIELDS = ("task_id", "prompt", "test", "entry_point")
BEGINNING = (
    "Below is a Python script with a self-contained function that solves the problem and passes "
    "corresponding tests:\n```python\n"
)
"""How every answer begins: the model goes on with code."""
ENDS = ("\n```", "\nif __name__", "\ndef main(", "\nprint(")
"""Where the program ends, and with it the answer."""
_AFTER = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(")
"""Where what comes after a completed function begins."""

Outcome = Literal["passed", "failed", "raised", "timed out", "ended early", "no Python"]
_OUTCOMES: dict[int, Outcome] = {
    _PASSED: "passed",
    task_guard.FAILED: "failed",
    task_guard.RAISED: "raised",
    1: "no Python",
}


@dataclass(frozen=True)
class Task:
    """A function to write, and its test."""

    task_id: str
    prompt: str
    """Imports, signature and docstring."""
    test: str
    """Defines `check(candidate)`."""
    entry_point: str
    """The function's name."""

    @property
    def question(self) -> str:
        """What an instruct model is asked."""
        return (
            "Please provide a self-contained Python script that solves the following problem in a "
            f"markdown code block:\n```\n{self.prompt.strip()}\n```\n"
        )

    def program(self, answer: str) -> str:
        """The answer's code, or the prompt with the answer after it, and then the test.

        Args:
            answer: with `BEGINNING` left off, or with a beginning and fences of its own.
        """
        defines = f"def {self.entry_point}"
        blocks = [code for _, code in code_blocks(answer) if defines in code] or [answer]
        code = blocks[0]
        if defines in code:
            # What the prompt defines before the function may be left out of the answer.
            code = f"{self.prompt}\n    pass\n\n{_definitions(code)}"
        else:
            ends = [at for end in _AFTER if (at := code.find(end)) >= 0]
            code = self.prompt + code[: min(ends, default=None)]
        return f"{code}\n\n{self.test}\n\ncheck({self.entry_point})\n"


def _definitions(code: str) -> str:
    """What a program imports and defines: its own tests are left out, and an end that was cut."""
    lines = code.splitlines()
    while lines and (tree := parsed("\n".join(lines))) is None:
        lines.pop()
    if not lines or tree is None:
        return code
    tree.body = [each for each in tree.body if not isinstance(each, ast.Expr | ast.Assert)]
    return ast.unparse(tree)


def read_tasks(path: Path, limit: int | None = None) -> list[Task]:
    """The tasks of a JSONL file, gzipped or not.

    Raises:
        DataError: it cannot be read, or lines are no tasks.
    """
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(Fault(str(path), "", f"cannot be read: {error}")) from None
    tasks, faults = [], []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            tasks.append(_task(json.loads(line)))
        except (ValueError, RecursionError) as error:
            what = f"is no task in HumanEval's format: {error}"
            faults.append(Fault(f"{path}:{number}", "", what))
    if faults:
        raise DataError(*faults)
    if not tasks:
        raise DataError(Fault(str(path), "", "has no tasks"))
    return tasks[:limit]


def _task(values: Any) -> Task:
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    for name in _FIELDS:
        if not isinstance(values.get(name), str):
            raise ValueError(f"{name} must be a string")
    if not values["entry_point"].isidentifier():
        raise ValueError("entry_point must be a function's name")
    return Task(**{name: values[name] for name in _FIELDS})


def require_runs() -> None:
    """Refuse a machine on which not even an empty program passes, before a model writes any.

    Raises:
        RunError: such as where macOS starts no sandbox, since this process is in one already.
    """
    try:
        done = _ended("", stderr=subprocess.PIPE)
        if done.returncode == _PASSED:
            return
        why = done.stderr.decode("utf-8", "replace").strip() or f"exit code {done.returncode}"
    except (OSError, subprocess.TimeoutExpired) as error:
        why = str(error)
    what = f"programs cannot be run here: {why}; run it in a terminal that is in no sandbox"
    raise RunError(Fault("", "--tasks", what))


def run(program: str) -> Outcome:
    """Run a program in a process of its own, with limits on time, memory, files and network."""
    try:
        code = _ended(program).returncode
    except subprocess.TimeoutExpired:
        return "timed out"
    if code == -24:  # SIGXCPU
        return "timed out"
    return _OUTCOMES.get(code, "ended early")


def _ended(program: str, stderr: int = subprocess.DEVNULL) -> subprocess.CompletedProcess[bytes]:
    guard = (resources.files(task_guard.__package__) / "task_guard.py").read_text("utf-8")
    text = f"{guard}\n_leave = os._exit\nguard({SECONDS}, {MEMORY_BYTES})\n"
    text += f"{program}\n_leave({_PASSED})\n"
    command = [sys.executable, "-I", "-X", "utf8", "-"]
    if sys.platform == "darwin":  # the system's own sandbox on top
        rules = "(version 1)(allow default)(deny network*)(deny file-write*)"
        command = ["/usr/bin/sandbox-exec", "-p", rules, *command]
    with tempfile.TemporaryDirectory() as folder:
        return subprocess.run(
            command,
            input=text.encode(),
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            cwd=folder,
            env={},
            start_new_session=True,
            timeout=SECONDS + 2,
        )


def run_all(programs: Sequence[str], advance: Callable[[int], None]) -> list[Outcome]:
    """Run programs, a few at a time."""
    outcomes = []
    with ThreadPoolExecutor(max_workers=4) as threads:
        for outcome in threads.map(run, programs):
            outcomes.append(outcome)
            advance(1)
    return outcomes
