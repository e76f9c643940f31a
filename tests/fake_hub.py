"""A Hugging Face Hub on localhost: as much of its protocol as downloads and uploads speak."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

COMMIT = "c0ffee" + "0" * 34
LARGE = (".safetensors", ".jsonl", ".gz", ".bin")  # kept with Git LFS, so known by SHA-256


@dataclass
class Repository:
    """What the fake keeps of a repository, and how it misbehaves."""

    files: dict[str, bytes] = field(default_factory=dict)
    private: bool = False
    status: int | None = None
    """Answer everything about it with this HTTP status."""
    error_code: str = ""
    """The Hub's own word for that status, sent as X-Error-Code."""
    served: dict[str, list[bytes]] = field(default_factory=dict)
    """Contents to send for a file instead of the right one, one a download."""


class FakeHub:
    """Serves `repositories`, keyed by `models/OWNER/NAME` or `datasets/OWNER/NAME`."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.uploads: dict[str, bytes] = {}  # by SHA-256
        self.requests: list[tuple[str, str]] = []
        self.tokens: set[str] = set()

        class Handler(_Handler):
            hub = self

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def downloads(self, name: str) -> int:
        """How often a file of that name was sent."""
        return sum(method == "GET" and path.endswith(f"/{name}") for method, path in self.requests)


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a body sent after its header would wait for an answer

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def do_POST(self) -> None:
        self._route()

    def do_PUT(self) -> None:
        self._route()

    def _route(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.requests.append((self.command, f"/{path}"))
        if token := self.headers.get("Authorization"):
            self.hub.tokens.add(token)
        parts = path.split("/")
        if path == "api/repos/create":
            self._create()
        elif path == "api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif parts[0] == "lfs":
            self.hub.uploads[parts[1]] = self.body
            self._send(b"")
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._batch()
        else:
            self._repository(parts)

    def _repository(self, parts: list[str]) -> None:
        api = parts[0] == "api"
        if api:
            parts = parts[1:]
        kind = "models"
        if parts[0] in ("models", "datasets"):
            kind, parts = parts[0], parts[1:]
        key = f"{kind}/{parts[0]}/{parts[1]}"
        repository, rest = self.hub.repositories.get(key), parts[2:]
        if repository is None:
            self._send(b"", 404, {"X-Error-Code": "RepoNotFound"})
        elif repository.status is not None:
            self._send(b"", repository.status, {"X-Error-Code": repository.error_code})
        elif rest[:1] == ["preupload"]:
            names = [file["path"] for file in json.loads(self.body)["files"]]
            self._json(
                {
                    "files": [
                        {"path": n, "uploadMode": _mode(n), "shouldIgnore": False} for n in names
                    ]
                }
            )
        elif rest[:1] == ["commit"]:
            self._commit(key, repository)
        elif len(rest) >= 2 and rest[1] not in ("main", COMMIT):
            self._send(b"", 404, {"X-Error-Code": "RevisionNotFound"})
        elif rest[:1] == ["resolve"]:
            self._resolve(repository, "/".join(rest[2:]))
        elif rest[:1] == ["tree"]:
            self._json([_tree_entry(n, content) for n, content in repository.files.items()])
        else:
            siblings = [_sibling(n, content) for n, content in repository.files.items()]
            self._json({"id": key.partition("/")[2], "sha": COMMIT, "siblings": siblings})

    def _resolve(self, repository: Repository, name: str) -> None:
        content = repository.files.get(name)
        if content is None:
            self._send(b"", 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        headers = {
            "X-Repo-Commit": COMMIT,
            "ETag": f'"{_git_hash(content)}"',
            "X-Linked-Size": str(len(content)),
        }
        if _mode(name) == "lfs":
            headers["X-Linked-ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
        if self.command == "GET" and repository.served.get(name):
            content = repository.served[name].pop(0)
        self._send(content, 200, headers)

    def _create(self) -> None:
        wanted = json.loads(self.body)
        if "Authorization" not in self.headers:
            self._send(b"", 401)
            return
        name = f"{wanted['organization']}/{wanted['name']}"
        made = Repository(
            private=wanted.get("private", False) or wanted.get("visibility") == "private"
        )
        self.hub.repositories.setdefault(f"models/{name}", made)
        self._json({"url": f"{self.hub.address}/{name}", "name": name, "id": name})

    def _batch(self) -> None:
        objects = [
            {
                "oid": wanted["oid"],
                "size": wanted["size"],
                "actions": {"upload": {"href": f"{self.hub.address}/lfs/{wanted['oid']}"}},
            }
            for wanted in json.loads(self.body)["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, key: str, repository: Repository) -> None:
        for line in self.body.splitlines():
            change = json.loads(line)
            value = change["value"]
            if change["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif change["key"] == "lfsFile":
                repository.files[value["path"]] = self.hub.uploads[value["oid"]]
        address = f"{self.hub.address}/{key.partition('/')[2]}/commit/{COMMIT}"
        self._json({"commitUrl": address, "commitOid": COMMIT, "success": True})

    def _json(self, value: object) -> None:
        self._send(json.dumps(value).encode(), 200, {"Content-Type": "application/json"})

    def _send(
        self, content: bytes, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _mode(name: str) -> str:
    return "lfs" if name.endswith(LARGE) else "regular"


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _sibling(name: str, content: bytes) -> dict[str, object]:
    entry: dict[str, object] = {
        "rfilename": name,
        "size": len(content),
        "blobId": _git_hash(content),
    }
    if _mode(name) == "lfs":
        sha256 = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"size": len(content), "sha256": sha256, "pointerSize": 134}
    return entry


def _tree_entry(name: str, content: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": name, "size": len(content)}
    entry["oid"] = _git_hash(content)
    if _mode(name) == "lfs":
        sha256 = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"size": len(content), "oid": sha256, "pointerSize": 134}
    return entry


@pytest.fixture
def hub_of_none(monkeypatch, tmp_path):
    """A Hub that this process takes for the Hub, with nothing on it; an empty cache, no token."""
    fake = FakeHub()
    monkeypatch.setattr(constants, "ENDPOINT", fake.address)
    template = fake.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    yield fake
    fake.close()
