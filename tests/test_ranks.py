"""Several ranks: the numbers of one, one folder, and an end for all where one of them fails."""

import json
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from launched import environments, free_ports, training_of
from ranked import OPTIONS, trained
from test_supervisor import wait_for
from tiny import relative_error

from mlx_tuner.engine.optimizer import State
from mlx_tuner.engine.ranks import Ranks, shares
from mlx_tuner.errors import EverywhereError
from mlx_tuner.recipe.load import load_recipe, parse_recipe
from mlx_tuner.runs import checkpoints, metrics
from mlx_tuner.runs.identity import Identity
from mlx_tuner.runs.run import read_records, read_summary
from mlx_tuner.system.launch import host
from mlx_tuner.training import agreement
from mlx_tuner.training.finetune import finetune

lengths = st.lists(st.integers(1, 2000), max_size=40)


@given(lengths, st.lists(st.floats(0.1, 10), min_size=1, max_size=5))
def test_every_row_is_computed_by_one_rank(lengths, speeds):
    found = shares(lengths, speeds)
    assert len(found) == len(speeds)
    assert sorted(i for own in found for i in own) == list(range(len(lengths)))


@given(lengths, st.integers(1, 5))
def test_ranks_of_one_speed_are_done_within_a_row_of_each_other(lengths, ranks):
    loads = [sum(lengths[i] for i in own) for own in shares(lengths, [1.0] * ranks)]
    assert max(loads) - min(loads) <= max(lengths, default=0)


def test_rows_go_back_and_forth_and_a_fast_rank_has_more_of_them():
    assert shares([10, 40, 20, 30], [1.0, 1.0]) == [[0, 1], [2, 3]]
    assert shares([5] * 9, [2.0, 1.0]) == [[0, 1, 3, 4, 6, 7], [2, 5, 8]]
    assert shares([7], [1.0, 1.0, 1.0]) == [[0], [], []]


@pytest.mark.slow
def test_ranks_train_the_adapter_of_one(tmp_path: Path) -> None:
    ranks = 3
    script = [sys.executable, str(Path(__file__).with_name("ranked.py")), str(tmp_path)]
    script.append(json.dumps([1.0, 2.0, 1.0]))
    stdin, held = os.pipe()  # of an input that has ended mlx.launch would read again and again
    launch = [Path(sys.executable).with_name("mlx.launch"), f"-n{ranks}", f"-p{free_ports(ranks)}"]
    process = subprocess.Popen([*launch, "--", *script], stdin=stdin)
    figures, loss, adapter = trained()
    assert process.wait(60) == 0
    os.close(stdin)
    os.close(held)
    for i in range(len(OPTIONS)):
        for rank in range(ranks):
            found = json.loads((tmp_path / f"{i}-{rank}.json").read_text())
            for ours, truth in zip(found[0], figures, strict=True):
                assert ours == pytest.approx(truth, rel=1e-5)
            assert found[1] == pytest.approx(loss, rel=1e-6)
            weights = dict(mx.load(str(tmp_path / f"{i}-{rank}.safetensors")))
            assert relative_error(weights, adapter) < 1e-5
        assert len({path.read_bytes() for path in tmp_path.glob(f"{i}-*.safetensors")}) == 1


class Two(Ranks):
    """This process and another, of which `theirs` makes what it gives of what this one gives."""

    size = 2

    def __init__(self, theirs):
        self.theirs = theirs
        super().__init__()

    def gather(self, content):
        return [content, self.theirs(content)]


SAME = Identity(
    {
        "model": {"path": "/Users/one/qwen", "revision": None},
        "data": {"train": "/Users/one/rows.jsonl", "shuffle": True},
        "lora": {"rank": 8, "init_from": None},
        "train": {"seed": 1},
    },
    {"train": "abc", "valid": None},
    "weights",
)


def of_another(change):
    """A rank on `studio2` with other facts."""

    def theirs(content):
        told = json.loads(content)
        change(told["facts"])
        return json.dumps({"host": "studio2", "facts": told["facts"]}).encode()

    return Two(theirs)


def test_ranks_that_differ_are_told_where_and_in_what():
    for key, value, said in [
        ("lora.rank", 16, "is 16, but 8 on "),
        ("rows of data.train", "abd", "is 'abd', but 'abc' on "),
        ("weights of model.path", "others", "is 'others', but 'weights' on "),
        ("version of mlx", "0.1", "is '0.1', but "),
    ]:
        ranks = of_another(lambda facts, key=key, value=value: facts.update({key: value}))
        with pytest.raises(EverywhereError) as told:
            agreement.require_one_run(ranks, SAME)
        (fault,) = told.value.faults
        assert (fault.where, fault.field) == ("studio2 (rank 1)", key)
        assert fault.what.startswith(said)


def test_files_may_be_elsewhere_on_each_machine():
    moved = replace(SAME, recipe={**SAME.recipe, "model": {"path": "/other", "revision": None}})
    theirs = json.dumps(agreement._facts(moved)).encode()
    agreement.require_one_run(Two(lambda _: theirs), SAME)


def test_machines_alike_have_one_speed_and_others_their_own():
    for seconds, speeds in [(1.0, [1.0, 1.0]), (1.1, [1.0, 1.0]), (2.0, [1.0, 0.5])]:
        assert agreement.speeds(Two(lambda _, s=seconds: repr(s).encode()), 1.0) == speeds


def test_a_state_that_differs_in_a_bit_is_not_saved():
    state = State.start(mx.ones(3))
    agreement.require_one_state(Two(lambda own: own), state, 7)
    other = []
    agreement.require_one_state(
        Two(lambda own: other.append(own) or own), state._replace(updates=mx.array(1)), 7
    )
    with pytest.raises(EverywhereError, match=r"\(rank 1\): has another adapter .* after step 7"):
        agreement.require_one_state(Two(lambda _: other[0]), state, 7)


def test_a_checkpoint_knows_the_recipe_whose_modules_are_the_default():
    recipe = parse_recipe(RECIPE.format(data="."), source="small.toml", folder=Path())
    same = replace(SAME, recipe=recipe.plain_tables())
    same.check(json.loads(json.dumps(same.to_state())), "small", allow_change=False)


RECIPE = """
[model]
path = "builtin:tiny-qwen"
[data]
train = "{data}/python_100.jsonl"
valid = "{data}/python_valid.jsonl"
limit = 20
[lora]
rank = 4
dropout = 0.1
[train]
epochs = 2
batch_size = 8
learning_rate = 1e-3
log_every = 1
eval_every = 3
save_every = 2
"""


@pytest.fixture
def recipe(tmp_path, root):
    path = tmp_path / "small.toml"
    path.write_text(RECIPE.format(data=root / "data"))
    return path


@pytest.fixture
def start(recipe):
    """Starts several ranks of `mlx-tune run`, and ends with the test what it has not ended."""
    with ExitStack() as stack:

        def started(path, ranks, *options):
            command = [sys.executable, "-m", "mlx_tuner", "run", str(recipe), f"--run-dir={path}"]
            processes = [
                subprocess.Popen([*command, *options], env=each, stderr=subprocess.PIPE, text=True)
                for each in environments(recipe.parent, ranks)
            ]
            for process in processes:
                stack.enter_context(process)
                stack.callback(process.kill)
            return processes

        yield started


def end(processes):
    """Exit codes, and what was said on standard error."""
    said = [process.communicate(timeout=120)[1] for process in processes]
    return [process.returncode for process in processes], said


def difference(run, truth):
    """Of their last checkpoints' adapters, relative."""
    ours, theirs = (
        mx.load(str(max((path / "checkpoints").iterdir()) / "adapters.safetensors"))
        for path in (run, truth)
    )
    ours, theirs = (
        mx.concatenate([each[name].reshape(-1) for name in theirs]) for each in (ours, theirs)
    )
    return (mx.linalg.norm(ours - theirs) / mx.linalg.norm(theirs)).item()


def train_losses(run):
    return [record.loss for record in metrics.train_records(read_records(run))]


@pytest.mark.slow
def test_a_run_of_two_is_that_of_one_and_three_go_on_with_it(tmp_path, recipe, start):
    alone, together = tmp_path / "alone", tmp_path / "together"
    codes, said = end(start(together, 2))
    assert codes == [0, 0], said
    summary = finetune(load_recipe(recipe), alone)
    told = read_summary(together)
    assert told.best_val_loss == pytest.approx(summary.best_val_loss, rel=1e-5)
    assert train_losses(together) == pytest.approx(train_losses(alone), rel=1e-5)
    assert difference(together, alone) < 1e-5
    assert sorted(path.name for path in together.iterdir()) == sorted(
        path.name for path in alone.iterdir()
    )

    more = ["--resume", "--allow-change", "--set=train.epochs=3"]
    codes, said = end(start(together, 3, *more))
    assert codes == [0] * 3, said
    longer = load_recipe(recipe, ["train.epochs=3"])
    finetune(longer, alone, resume=True, allow_change=True)
    assert len(train_losses(together)) == 9
    assert train_losses(together) == pytest.approx(train_losses(alone), rel=1e-5)
    assert difference(together, alone) < 1e-5


@pytest.mark.slow
def test_a_signal_to_any_rank_stops_all_after_a_save(tmp_path, start):
    run = tmp_path / "run"
    processes = start(run, 2, "--set=train.epochs=1000")
    wait_for(run / "checkpoints" / "step-00000002")
    processes[1].send_signal(signal.SIGHUP)
    codes, said = end(processes)
    assert codes == [129, 129]
    step = checkpoints.newest(run)[0].step
    assert f"{run}: stopped after step {step}; continue with --resume" in said[0]
    assert said[1] == ""
    assert read_summary(run).status == "stopped"


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_ends_the_run_for_all(tmp_path, start, rank):
    run = tmp_path / "run"
    processes = start(run, 2, "--set=train.epochs=1000")
    wait_for(run / "checkpoints" / "step-00000002")
    (child,) = training_of(processes[rank].pid)
    os.kill(child, signal.SIGKILL)
    codes, said = end(processes)
    assert codes == [1, 1]
    assert f"training on {host()} (rank {rank}) died: the system killed it" in said[0]
    assert said[1] == ""
    assert checkpoints.newest(run)[0].step >= 2
