"""The one seam to the Hugging Face Hub: models and rows come in, checked, and results go out.

Only files of known kinds are fetched, never code, and compared with the Hub's own sizes and hashes.
Token, `HF_ENDPOINT`, `HF_HUB_OFFLINE` and the cache are left to huggingface-hub.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import (
    HfApi,
    get_token,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub import errors as hub_errors
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

from mlx_tuner.errors import DataError, Fault, ModelError, TunerError, first_line
from mlx_tuner.system.foreign import COMPANIONS, PICKLES

_MODEL_FILES = ("config.json", "model*.safetensors", "model.safetensors.index.json", *COMPANIONS)
_ROW_FILES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
_TRAINING = re.compile(r"(^|[/_.-])train(ing)?([/_.-]|$)")
_HELD_OUT = re.compile(r"(^|[/_.-])(test|valid|validation|val|dev|eval)([/_.-]|$)")
_NOT_ROWS = {"dataset_infos.json", "dataset_info.json"}
_MAX_LISTED = 10


def download_model(name: str, revision: str | None = None) -> Path:
    """The folder of a Hub model in the local cache, complete and as the Hub describes it.

    Raises:
        ModelError: there is no such model or revision, it may not be had, or it arrives damaged.
    """
    with _named(name, revision, ModelError):
        info = _listing(name, "model", revision)
        if info is None:
            return _cached(name, "model", revision)
        files = [f for f in info.siblings if _is_model_file(f.rfilename)]
        if not any(f.rfilename.endswith(".safetensors") for f in files):
            pickles = [f.rfilename for f in info.siblings if f.rfilename.endswith(PICKLES)]
            what = "has no model*.safetensors"
            if pickles:
                what = f"has only {pickles[0]}, which can run code when it is read"
            raise ModelError(Fault(_where(name, revision), "", f"{what}; use safetensors weights"))
        return _fetched(name, "model", revision, info, files)


def cached_model(name: str, revision: str | None = None) -> Path:
    """The folder of a Hub model in the local cache, with what is there of it; asks no network.

    Raises:
        ModelError: it is not there.
    """
    with _named(name, revision, ModelError):
        return _cached(name, "model", revision)


def download_dataset_file(name: str) -> Path:
    """A file of rows of a Hub dataset, `OWNER/NAME/FILE`, or of `OWNER/NAME` its training split.

    Raises:
        DataError: there is no such dataset or file, it may not be had, arrives damaged, or there
            are several files to choose from (they are listed).
    """
    owner, _, rest = name.partition("/")
    short, _, wanted = rest.partition("/")
    repository = f"{owner}/{short}"
    with _named(repository, None, DataError):
        info = _listing(repository, "dataset", None)
        if info is None:
            folder = _cached(repository, "dataset", None)
            names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
            return folder / _row_file(repository, names, wanted)
        chosen = _row_file(repository, [f.rfilename for f in info.siblings], wanted)
        files = [f for f in info.siblings if f.rfilename == chosen]
        return _fetched(repository, "dataset", None, info, files) / chosen


def push(folder: Path, name: str) -> str:
    """Upload a folder as the Hub model `OWNER/NAME`, made private if need be; returns its address.

    Raises:
        ModelError: the token of the environment may not, or the Hub cannot be reached.
    """
    with _named(name, None, ModelError):
        api = HfApi()
        address = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload with mlx-tune")
        return str(address)


def check_token(name: str) -> None:
    """Refuse early, before any work, where `push` to `name` cannot succeed for lack of a token."""
    if get_token() is None:
        what = "uploading needs a token; set HF_TOKEN to one that may write"
        raise ModelError(Fault(name, "", what))


def _is_model_file(name: str) -> bool:
    return "/" not in name and any(fnmatch(name, pattern) for pattern in _MODEL_FILES)


def _row_file(repository: str, names: list[str], wanted: str) -> str:
    candidates = sorted(
        n for n in names if n.endswith(_ROW_FILES) and n not in _NOT_ROWS and not n.startswith(".")
    )
    if wanted in names:
        return wanted
    training = [n for n in candidates if _TRAINING.search(n)]
    training = training or [n for n in candidates if not _HELD_OUT.search(n)]
    if not wanted and len(training) == 1:
        return training[0]
    candidates = candidates if wanted else training or candidates
    listed = ", ".join(candidates[:_MAX_LISTED]) + (" …" if len(candidates) > _MAX_LISTED else "")
    if not candidates:
        what = "has no .json, .jsonl or .parquet file"
    elif wanted:
        what = f"has no file {wanted}; choose from {listed}"
    else:
        what = f"has several files to train on; name one as hub:{repository}/FILE: {listed}"
    raise DataError(Fault(repository, "", what))


def _listing(name: str, kind: str, revision: str | None) -> Any | None:
    """The Hub's list of a repository's files, with sizes and hashes; None if it is out of reach."""
    try:
        return HfApi().repo_info(name, repo_type=kind, revision=revision, files_metadata=True)
    except hub_errors.HfHubHTTPError as error:
        if error.response.status_code < 500:
            raise
    except (hub_errors.OfflineModeIsEnabled, HTTPError):
        pass
    return None


def _cached(name: str, kind: str, revision: str | None) -> Path:
    # Which files make it complete is for the reader of the folder to say.
    return Path(
        snapshot_download(
            name, repo_type=kind, revision=revision, local_files_only=True, allow_patterns=[]
        )
    )


def _fetched(name: str, kind: str, revision: str | None, info: Any, files: list[Any]) -> Path:
    """The cache's folder with `files` in it, each downloaded a second time if it came damaged."""

    def in_cache(file: Any, at: str | None) -> Any:
        return try_to_load_from_cache(name, file.rfilename, None, at, kind)

    # Hashing takes seconds a model, so only what may not have been hashed before is: a download
    # that was interrupted leaves a file missing, and then all of them are looked at. A branch that
    # the cache does not know, or knows as another commit, is asked for, to be found offline too.
    if all(
        isinstance(path := in_cache(f, info.sha), str) and path == in_cache(f, revision)
        for f in files
    ):
        return _cached(name, kind, info.sha)
    patterns = [glob.escape(f.rfilename) for f in files]
    download = partial(
        snapshot_download, name, repo_type=kind, revision=revision, allow_patterns=patterns
    )
    try:
        folder = Path(download())
    except HTTPError:
        raise
    except OSError:  # broken off, or of another size than announced
        folder = Path(download())
    if folder.name != info.sha:
        raise OSError("it changed during the download")
    for file in _damaged(name, kind, info.sha):
        hf_hub_download(name, file, repo_type=kind, revision=info.sha, force_download=True)
    for file in _damaged(name, kind, info.sha):
        (folder / file).unlink()  # so that the next start downloads it again
        raise OSError(f"{file} arrived damaged twice")
    return folder


def _damaged(name: str, kind: str, revision: str) -> list[str]:
    """Cached files of a repository whose hash is not the Hub's."""
    found = HfApi().verify_repo_checksums(name, repo_type=kind, revision=revision)
    return [mismatch["path"] for mismatch in found.mismatches]


@contextmanager
def _named(name: str, revision: str | None, kind: type[TunerError]) -> Iterator[None]:
    """Turn huggingface-hub's errors into one line that names the repository and what to do.

    Their own texts run over several lines and hold addresses, so they are not shown.
    """
    try:
        yield
        return
    except TunerError:
        raise
    except hub_errors.GatedRepoError:
        what = f"is gated; accept its terms at https://huggingface.co/{name} and set HF_TOKEN"
    except hub_errors.RevisionNotFoundError:
        what = "has no such revision; give a branch, a tag or a commit"
    except hub_errors.RepositoryNotFoundError:
        what = "is not on the Hub, or is private; check the name, or set HF_TOKEN"
    except hub_errors.EntryNotFoundError:
        what = "not in the cache, and the Hub is out of reach; connect, or unset HF_HUB_OFFLINE"
    except hub_errors.HFValidationError:
        what = "is not a name of the form OWNER/NAME"
    except hub_errors.HfHubHTTPError as error:
        status = error.response.status_code
        hint = "set HF_TOKEN to a token that may" if status in (401, 403) else "try again later"
        what = f"the Hub answered {status}; {hint}"
    except HTTPError as error:
        what = f"the Hub is out of reach ({type(error).__name__}); check the network"
    except (OSError, RuntimeError, ValueError) as error:
        what = f"download failed: {first_line(error)}; try again"
    raise kind(Fault(_where(name, revision), "", what))


def _where(name: str, revision: str | None) -> str:
    return name if revision is None else f"{name}@{revision}"
