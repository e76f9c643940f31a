"""Mutants of all that a stranger may send, fewer of them than `benchmarks/fuzz.py` makes."""

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adapter", "peft", "config", "tokenizer", "recipe", "rows"])
def test_a_thousand_mutants_are_refused_in_a_line_or_taken(root, kind, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from fuzz import fuzz

    found = fuzz(kind, 1_000)
    assert found["wrong"] == []
    # It has teeth only if some are taken, and most are not.
    assert found["taken"] >= 20
    assert found["refused"] >= 500
