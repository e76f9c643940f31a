"""Fixtures that every test module shares, and what `make quick` leaves out."""

import gc
import os
import signal
import sys
from pathlib import Path

import pytest
from fake_hub import hub_of_none  # noqa: F401, a fixture
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent

sys.path.insert(0, str(ROOT / "benchmarks"))
# A job in the background has these ignored, and so would have all that tests start and signal.
for number, default in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, default)
# Programs that tests start have a Hub of their own.
os.environ.pop("HF_HUB_OFFLINE", None)

# On a busy machine any example can take longer than hypothesis's 200 ms.
settings.register_profile("patient", settings.default, deadline=None)
settings.load_profile("patient")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="neither slow tests nor torch")


def pytest_configure(config: pytest.Config) -> None:
    gc.disable()  # collecting takes a seventh of the time that imports take
    if config.getoption("--quick"):
        config.option.markexpr = "not slow"
        sys.modules.update(torch=None, peft=None)  # as where they are not installed
        settings.register_profile("quick", settings.default, max_examples=25)
        settings.load_profile("quick")


def pytest_collection_finish() -> None:
    gc.enable()
    gc.freeze()  # what is imported stays; tests that collect garbage need not search it


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real rows, the real Qwen2.5 tokenizer and real model shapes, or their stand-ins."""
    from shared import shared as folder  # which loads MLX: not where tests are only handed out

    return folder()


@pytest.fixture(scope="session")
def real_shared(shared: Path) -> Path:
    """The same, for a test whose truth is about the real ones; skipped without."""
    from shared import is_real

    if not is_real():
        pytest.skip("needs ../shared (real rows and the real tokenizer), which is absent")
    return shared
