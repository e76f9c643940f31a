"""What the ranks of a run agree on: what they train, how fast each is, which adapter they have."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from typing import Any, TypeVar

import numpy as np

from mlx_tuner.engine.optimizer import State
from mlx_tuner.engine.ranks import Ranks
from mlx_tuner.errors import EverywhereError, Fault
from mlx_tuner.runs.identity import CHECKED, PLACES, Identity
from mlx_tuner.system import launch

_PACKAGES = ("mlx-lora-tuner", "mlx", "mlx-lm", "transformers", "numpy")
_ALIKE = 1.15
"""Ranks whose speeds differ by less than this factor get equal shares."""

Plain = TypeVar("Plain")


def require_one_run(ranks: Ranks, same: Identity) -> None:
    """Refuse ranks that would not train the same run.

    Raises:
        EverywhereError: what differs from rank 0, and on which host.
    """
    if ranks.size == 1:
        return
    first, *others = _of_each(ranks, _facts(same))
    faults = [
        Fault(
            f"{other['host']} (rank {rank})",
            key,
            f"is {_shown(other['facts'].get(key))}, but {_shown(value)} on {first['host']} "
            "(rank 0); give all machines the same recipe, rows, model and packages",
        )
        for rank, other in enumerate(others, 1)
        for key, value in first["facts"].items()
        if other["facts"].get(key) != value
    ]
    if faults:
        raise EverywhereError(*faults)


def _facts(same: Identity) -> dict[str, Any]:
    """Everything that decides a result, by the name under which a person knows it."""
    recipe = {
        f"{table}.{key}": value
        for table in CHECKED
        for key, value in same.recipe[table].items()
        if f"{table}.{key}" not in PLACES
    }
    contents = {
        **{f"rows of data.{name}": digest for name, digest in same.rows.items()},
        "weights of model.path": same.base,
    }
    versions = {f"version of {package}": version(package) for package in _PACKAGES}
    return {"host": launch.host(), "facts": {**versions, **recipe, **contents}}


def _shown(value: object) -> str:
    return repr(value)[:40]


def _of_each(ranks: Ranks, value: Any) -> list[Any]:
    """What each rank gives, which JSON can hold, in their order."""
    return [json.loads(each) for each in ranks.gather(json.dumps(value).encode())]


def from_first(ranks: Ranks, value: Plain) -> Plain:
    """Rank 0's value, which JSON can hold; the other ranks' are not looked at."""
    first: Plain = _of_each(ranks, value if ranks.leads else None)[0]
    return first


def speeds(ranks: Ranks, seconds: float) -> list[float]:
    """How fast each rank is, from the time that each has taken for the same work.

    Machines alike have one speed, so that their shares are equal, and the same after a restart.
    """
    taken = _of_each(ranks, seconds)
    return [1.0 if each <= _ALIKE * min(taken) else min(taken) / each for each in taken]


def require_one_state(ranks: Ranks, state: State, step: int) -> None:
    """Refuse to save what not all ranks have.

    Raises:
        EverywhereError: on which host it differs.
    """
    if ranks.size == 1:
        return
    digest = hashlib.blake2b(digest_size=16)
    for array in state:
        digest.update(np.array(array).data)
    found = _of_each(ranks, {"host": launch.host(), "digest": digest.hexdigest()})
    for rank, each in enumerate(found):
        if each["digest"] != found[0]["digest"]:
            what = (
                f"has another adapter than {found[0]['host']} (rank 0) after step {step}; that is "
                "a fault of its memory or GPU, or of ours: continue with --resume without it"
            )
            raise EverywhereError(Fault(f"{each['host']} (rank {rank})", "", what))


def largest(ranks: Ranks, number: int) -> int:
    """The largest of the ranks' numbers."""
    return max(_of_each(ranks, number))
