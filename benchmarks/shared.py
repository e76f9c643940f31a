"""Real rows, the real Qwen2.5 tokenizer and model shapes; or stand-ins, laid out the same.

The real ones are kept beside the repository, in `../shared`: CodeAlpaca may not be committed, and
the tokenizer is large. A clone without them has the built-in model's tokenizer, with Qwen2.5's
chat template (`chat_template.jinja`, Apache-2.0), and the rows of `data/` in their place, so that
the same code runs; its figures are other ones.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

from mlx_tuner.bench.model import config_of
from mlx_tuner.models.model import BUILTIN, resolve

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


@cache
def shared() -> Path:
    """`../shared`, or a folder of stand-ins that lasts as long as the process."""
    if is_real():
        return SHARED
    return _stand_in(Path(_temporary().name))


def is_real() -> bool:
    """Whether `../shared` is there."""
    return (SHARED / "codealpaca" / "train.jsonl").is_file()


@cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="shared-")


def _stand_in(folder: Path) -> Path:
    """Fill a folder with stand-ins."""
    model, rows = folder / "qwen2.5-coder", folder / "codealpaca"
    model.mkdir()
    rows.mkdir()
    builtin = resolve(f"{BUILTIN}tiny-qwen")
    tokenizer = json.loads((builtin / "tokenizer.json").read_text("utf-8"))
    bpe, added = tokenizer["model"], tokenizer["added_tokens"]
    (model / "vocab.json").write_text(json.dumps(bpe["vocab"]), "utf-8")
    (model / "merges.txt").write_text("\n".join(map(" ".join, bpe["merges"])) + "\n", "utf-8")
    config = json.loads((builtin / "tokenizer_config.json").read_text("utf-8")) | {
        "added_tokens_decoder": {str(token.pop("id")): token for token in added},
        "chat_template": (ROOT / "benchmarks" / "chat_template.jinja").read_text("utf-8"),
    }
    (model / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    shutil.copyfile(builtin / "generation_config.json", model / "generation_config.json")
    for size in ("0.5B", "1.5B"):
        config = json.dumps(config_of(f"qwen2.5-{size}"))
        (model / f"config-{size}.json").write_text(config, "utf-8")
    lines = (ROOT / "data" / "python_100.jsonl").read_text("utf-8").splitlines()
    # As many as the real ones: two rows are put together to make another.
    pairs = [(json.loads(a), json.loads(b)) for a in lines[:39] for b in lines[:39]]
    made = [{key: f"{a[key]}\n{b[key]}".strip() for key in a} for a, b in pairs][:1500]
    (rows / "code_alpaca.json").write_text(json.dumps(made, indent=1), "utf-8")
    for name, part in (("train", made[:1400]), ("valid", made[1400:])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (rows / f"{name}.jsonl").write_text(text, "utf-8")
    return folder
