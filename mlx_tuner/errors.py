"""What can go wrong for a user: one line a fault, and the exit code that goes with it."""

from dataclasses import dataclass

from mlx_tuner.words import printable, shortened

FAULTS_SHOWN = 20
"""Of all that is wrong at once."""


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong: where it is, which field, and what to do about it."""

    where: str = ""
    """A file, or FILE:LINE."""
    field: str = ""
    """The key or field at fault, such as ``lora.rank`` or ``messages[2].content``."""
    what: str = ""
    """What is wrong, then what to do, parted by a semicolon."""

    def __str__(self) -> str:
        """One line; names out of somebody else's files cannot forge another (see `printable`)."""
        parts = (self.where, self.field, self.what)
        return ": ".join(shortened(printable(part)) for part in parts if part)


def first_line(error: BaseException) -> str:
    """What somebody else's exception says, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class TunerError(Exception):
    """Faults that the command line reports, up to 20 at once, without a traceback."""

    exit_code = 1

    def __init__(self, *faults: Fault | str) -> None:
        self.faults = tuple(f if isinstance(f, Fault) else Fault(what=f) for f in faults)
        super().__init__("\n".join(map(str, self.faults)))


class UsageError(TunerError):
    """The command line is wrong."""

    exit_code = 2


class RecipeError(UsageError):
    """The recipe is wrong."""


class DataError(TunerError):
    """Training data that cannot be trained on."""


class ModelError(TunerError):
    """A model, tokenizer or adapter that cannot be used."""


class RunError(TunerError):
    """A run, or the machine under it, that cannot go on."""


class EverywhereError(RunError):
    """What all ranks of a run find at once, so that the first alone tells of it."""


class RunStopped(TunerError):
    """A signal ended a run after it was saved; the exit code is the shell's for that signal."""

    def __init__(self, number: int, step: int, run: object) -> None:
        super().__init__(Fault(str(run), "", f"stopped after step {step}; continue with --resume"))
        self.exit_code = 128 + number
