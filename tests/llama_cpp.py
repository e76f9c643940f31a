"""llama.cpp, as its own server in a process of its own: what it makes of GGUF files."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any


class LlamaCpp:
    """A model file, with an adapter's file on it, as llama.cpp runs them."""

    def __init__(self, model: Path, lora: Path | None = None) -> None:
        words = [sys.executable, __file__, str(model), *([str(lora)] if lora else [])]
        self._server = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self._server.stdout is not None
        self._address = self._server.stdout.readline().strip()
        if not self._address:  # it says why and dies, by an abort of its own
            raise RuntimeError(self._server.communicate()[1][-2000:])

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.communicate()  # the end of its input ends it

    def _ask(self, what: str, **question: Any) -> Any:
        body = json.dumps(question).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self._address}/{what}", body, headers)
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def tokens(self, text: str) -> list[int]:
        """How it cuts a text; names of special tokens stand for them."""
        return list(self._ask("tokenize", content=text, parse_special=True)["tokens"])

    def answer(self, prompt: list[int], length: int) -> list[int]:
        """Its likeliest tokens after the prompt, with the one that ends the answer."""
        settings = {"n_predict": length, "temperature": 0, "cache_prompt": False}
        said = self._ask("completion", prompt=prompt, return_tokens=True, **settings)
        return list(said["tokens"])


def serve(model: str, lora: str | None = None) -> None:
    """Run the server until standard input ends."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = model
    if lora is not None:
        adapter = xllamacpp.CommonAdapterLoraInfo()
        adapter.path, adapter.scale = lora, 1.0
        parameters.lora_adapters = [adapter]
    parameters.n_ctx = 512
    parameters.n_parallel = 1
    parameters.cpuparams.n_threads = 1
    parameters.warmup = False
    parameters.verbosity = 1
    server = xllamacpp.Server(parameters)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    serve(*sys.argv[1:])
