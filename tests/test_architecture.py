"""What keeps the package readable: data flows one way, one module prints, one module writes."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import mlx_tuner

PACKAGE = Path(mlx_tuner.__file__).parent
ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if not path.stem.startswith("__")
)

BELOW = {
    "errors": {"words"},
    "words": set(),
    "system": {"errors", "words"},
    "recipe": {"errors"},
    "engine": {"errors"},
    "data": {"engine", "errors", "system", "words"},
    "models": {"engine", "errors", "system", "words"},
    "runs": {"engine", "errors", "system"},
    "show": {"engine", "errors", "runs", "system", "words"},
    "training": {"data", "engine", "errors", "models", "recipe", "runs", "show", "system", "words"},
}
"""What each of these rooms may import of ours, beside itself; those above import what they need."""

ASSEMBLY = {"api", "bench", "cli", "commands", "conversion", "training"}
"""Commands, and what puts a run's parts together."""
HEAVY = {"mlx", "mlx_lm", "transformers", "matplotlib", "huggingface_hub", "numpy", "torch"}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text("utf-8"))


@cache
def imported(module: str) -> set[str]:
    """Full names of what a module imports anywhere, such as "mlx_tuner.errors" or "mlx.core"."""
    names = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
            names.add(str(node.module))
    return names


def imports_of_ours(module: str) -> set[str]:
    """Packages and top-level modules of ours that a module imports."""
    names = (name.split(".") for name in imported(module) if name.startswith("mlx_tuner."))
    return {name[1] for name in names} & {package_of(each) for each in MODULES}


def package_of(module: str) -> str:
    return module.split(".")[0]


def rooms(package: str) -> list[str]:
    return [module for module in MODULES if package_of(module) == package]


def packages_of(module: str) -> set[str]:
    return {name.split(".")[0] for name in imported(module)}


def importers(package: str) -> set[str]:
    return {module for module in MODULES if package in packages_of(module)}


@cache
def calls(module: str) -> list[tuple[str, ast.Call, ast.AST]]:
    """Each call of a module: its dotted name, itself, and the function around it."""
    return [
        (ast.unparse(node.func), node, function)
        for function in ast.walk(tree(module))
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Module)
        for node in own_nodes(function)
        if isinstance(node, ast.Call)
    ]


def own_nodes(function: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function without those of functions in it."""
    for child in ast.iter_child_nodes(function):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
            yield from own_nodes(child)


def test_data_flows_one_way_between_the_rooms() -> None:
    for module in MODULES:
        if (room := package_of(module)) in BELOW:
            assert imports_of_ours(module) <= BELOW[room] | {room}, module


def test_rows_know_the_engine_by_the_row_that_it_takes_and_load_no_mlx() -> None:
    names = set().union(*(imported(module) for module in rooms("data")))
    engine = {name for name in names if name.startswith("mlx_tuner.engine")}
    assert engine <= {"mlx_tuner.engine.batching", "mlx_tuner.engine.batching.Example"}
    assert not {"mlx", "mlx_lm"} & set().union(
        *map(packages_of, ("engine.batching", *rooms("data")))
    )


RECIPE = {"mlx_tuner.recipe.tables", "mlx_tuner.recipe.load"}


def test_only_the_assembly_and_its_commands_know_a_recipe() -> None:
    knowing = {module for module in MODULES if RECIPE & imported(module)}
    assert {package_of(module) for module in knowing} <= ASSEMBLY | {"recipe"}


def test_nothing_depends_on_the_command_line_nor_the_recipe_on_anything_heavy() -> None:
    assert {package_of(module) for module in MODULES if "cli" in imports_of_ours(module)} == {"cli"}
    for module in (*rooms("cli"), "errors", "words", "system.files", *rooms("recipe")):
        top = {
            name.split(".")[0]
            for node in tree(module).body
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [str(node.module)]
                if isinstance(node, ast.ImportFrom)
                else []
            )
        }
        assert not top & HEAVY, module


def test_each_outside_library_has_its_seam() -> None:
    assert importers("matplotlib") == {"show.plots"}
    assert importers("huggingface_hub") == {
        "system.hub",
        "commands.doctor",
    }  # which asks where its cache is
    assert {package_of(module) for module in importers("click")} == {"cli"}
    assert {module.split("_")[0] for module in importers("gguf")} <= {"conversion.gguf"}
    assert importers("torch") == set()
    assert importers("pyarrow") == {"data.sources"}
    assert {package_of(module) for module in importers("msgspec")} == {"data"}


def test_nothing_is_unpickled_and_no_code_of_a_model_folder_is_run() -> None:
    assert not importers("pickle") | importers("runpy") | importers("marshal")
    for module in MODULES:
        names = {name for name, _, _ in calls(module)}
        assert not names & {"eval", "exec", "compile", "__import__"}, module
    for module in importers("mlx_lm") | importers("transformers"):
        assert tells_no_peer_to_trust_code(tree(module)), module


def tells_no_peer_to_trust_code(node: ast.AST) -> bool:
    """Whether `trust_remote_code` is nowhere but as a key or argument that is literally False."""
    allowed = 0
    for part in ast.walk(node):
        pairs = zip(part.keys, part.values, strict=True) if isinstance(part, ast.Dict) else ()
        allowed += sum(map(is_text_false, pairs))
        if isinstance(part, ast.keyword) and part.arg == TRUST:
            return False
    return allowed == ast.unparse(node).count(TRUST)


TRUST = "trust_remote_code"


def is_text_false(pair: tuple[ast.expr | None, ast.expr]) -> bool:
    return [ast.unparse(part) for part in pair if part] == [repr(TRUST), "False"]


@pytest.mark.parametrize(
    "source",
    [
        'load(folder, {"trust_remote_code": True})',
        "load(folder, trust_remote_code=True)",
        'settings["trust_remote_code"] = True',
        "load(folder, **dict(trust_remote_code=1))",
        'load(folder, {"trust_remote_code": flag})',
    ],
)
def test_every_way_to_trust_code_is_seen(source: str) -> None:
    assert not tells_no_peer_to_trust_code(ast.parse(source))
    assert tells_no_peer_to_trust_code(ast.parse('load(folder, {"trust_remote_code": False})'))


def test_only_the_command_line_prints_and_exits() -> None:
    for module in set(MODULES) - set(rooms("cli")):
        names = {name for name, _, _ in calls(module)}
        assert not names & {"print", "sys.exit", "exit", "quit", "os._exit"}, module


WRITERS = {
    "copyfile",
    "hardlink_to",
    "mkdir",
    "makedirs",
    "move",
    "print_figure",
    "rename",
    "replace",
    "rmtree",
    "save_safetensors",
    "savefig",
    "symlink_to",
    "touch",
    "unlink",
    "write_bytes",
    "write_text",
}
ALLOWED = {
    ("models.weights", "_write_shard"),  # fills a folder that its caller has from `files.staging`
    ("conversion.work", "copy_companions"),  # the same
    ("system.hub", "_fetched"),  # removes a damaged download from the Hub's own cache
}


def writes(call: ast.Call) -> bool:
    """Whether a call changes what is on the disk."""
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else ast.unparse(function)
    if ast.unparse(function) == "os.open":
        flags = ast.unparse(call.args[1])
        return "O_RDONLY" not in flags and ast.unparse(call.args[0]) != "os.devnull"
    if name == "open":
        modes = [str(a.value) for a in call.args if isinstance(a, ast.Constant)]
        return any(letter in mode for mode in modes for letter in "wax+")
    if name == "replace":  # str.replace and dataclasses.replace change nothing
        return ast.unparse(function) == "os.replace"
    return name in WRITERS and not ast.unparse(function).startswith("files.")


def names_from_files(function: ast.AST) -> set[str]:
    """Names bound by `with files.replacing(...) as name`, and its sisters."""
    return {
        ast.unparse(item.optional_vars)
        for node in own_nodes(function)
        if isinstance(node, ast.With)
        for item in node.items
        if ast.unparse(item.context_expr).startswith("files.") and item.optional_vars is not None
    }


def test_only_files_writes_or_hands_out_the_paths_that_are_written() -> None:
    writing = {
        (module, getattr(function, "name", ""))
        for module in set(MODULES) - {"system.files", "system.lock"}
        for _, call, function in calls(module)
        if writes(call)
        and not any(name in ast.unparse(call) for name in names_from_files(function))
    }
    assert writing == ALLOWED


def test_no_module_is_long() -> None:
    for module in MODULES:
        path = PACKAGE / f"{module.replace('.', '/')}.py"
        assert len(path.read_text("utf-8").splitlines()) <= 400, module


def test_no_imports_run_in_a_circle() -> None:
    ours = {f"mlx_tuner.{module}" for module in MODULES}
    TopologicalSorter({f"mlx_tuner.{m}": imported(m) & ours for m in MODULES}).prepare()


def test_every_module_says_what_it_is_for() -> None:
    for module in MODULES:
        docstring = ast.get_docstring(tree(module))
        assert docstring, module
        assert docstring.split("\n")[0].endswith((".", ":")), module


def loaded_by(*arguments: str, exit_code: int) -> set[str]:
    """The top-level modules that a command has imported when it ends."""
    code = (
        "import json, sys\n"
        "from mlx_tuner.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: code = end.code\n"
        "names = {name.split('.')[0] for name in sys.modules}\n"
        "print(json.dumps([code or 0, sorted(names)]), file=sys.__stderr__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    code_found, names = json.loads(done.stderr.splitlines()[-1])
    assert code_found == exit_code
    return set(names)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["run", "--help"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    assert not loaded_by(*arguments, exit_code=0) & (HEAVY | {"pydantic", "rich"})


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "builtin:tiny-qwen", "x", "--max-tokens", "1"],
        ["run", ROOT / "recipes" / "quickstart.toml", "--run-dir=run", "--set=data.limit=1"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_torch_is_not_loaded_where_transformers_would(arguments: list[str], tmp_path: Path) -> None:
    """Nor in the child that `run` trains in."""
    (tmp_path / "torch").mkdir()
    loaded = tmp_path / "loaded"
    (tmp_path / "torch" / "__init__.py").write_text(f"open({str(loaded)!r}, 'w').close()\n")
    known = tmp_path / "torch-2.13.0.dist-info"
    known.mkdir()
    (known / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0\n")
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "mlx_tuner", *arguments]
    subprocess.run(command, cwd=tmp_path, env=environ, check=True, capture_output=True)
    assert not loaded.exists()


@pytest.mark.slow
def test_a_wrong_recipe_is_told_before_anything_heavy_is_loaded(tmp_path: Path) -> None:
    recipe = tmp_path / "wrong.toml"
    recipe.write_text('[model]\npath = "builtin:tiny-qwen"\n[lora]\nr = 8\n')
    for command in ("run", "plan"):
        assert not loaded_by(command, str(recipe), exit_code=2) & HEAVY


@pytest.mark.slow
def test_help_takes_less_than_three_tenths_of_a_second_of_cpu_time() -> None:
    def seconds() -> float:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlx_tuner", "--help"], stdout=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        return usage.ru_utime + usage.ru_stime

    # The best of several, since caches are cold and machines shared.
    assert min(seconds() for _ in range(5)) < 0.3
