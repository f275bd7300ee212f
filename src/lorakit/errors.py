"""Every error that lorakit raises, in one tree.

    AdapterError
    ├── ConfigError          a field of a config has a wrong type or value     (ValueError)
    ├── PlanError            a config does not fit the model                   (ValueError)
    ├── AdapterNameError     an adapter name is not allowed, taken or unknown  (ValueError)
    ├── AdapterNotFoundError no adapter at this path or repository             (FileNotFoundError)
    ├── AdapterFormatError   a file is not what it should be                   (ValueError)
    ├── KeyMismatchError     keys missing, unexpected or of another shape      (ValueError)
    ├── NonFiniteError       NaN or infinity where numbers are needed          (ValueError)
    ├── LossyMergeError      quantising again would undo what was merged       (ValueError)
    ├── AdapterStateError    the call does not fit the state of the model      (RuntimeError)
    └── UnsupportedError     valid, but not something lorakit can do           (NotImplementedError)

A message says where (module path, file, field), what was found, what was expected, and what to do.
After any of these the model and the files are as they were.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from lorakit.report import MergeReport


class AdapterError(Exception):
    """Root of all errors raised by lorakit."""


class ConfigError(AdapterError, ValueError):
    """A field of a config is unknown, of a wrong type, or out of range."""


class PlanError(AdapterError, ValueError):
    """A config does not fit the model; `problems` holds every reason found."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__(bullet_list("the adapter does not fit this model", self.problems))


class AdapterNameError(AdapterError, ValueError):
    """An adapter name is not allowed, already taken, or not known."""


class AdapterNotFoundError(AdapterError, FileNotFoundError):
    """There is no adapter at the given path or repository."""


class AdapterFormatError(AdapterError, ValueError):
    """A file is truncated, damaged, or not in the format it should have."""


class KeyMismatchError(AdapterError, ValueError):
    """The tensors of a file are not those that the adapter, or what else they are for, needs.

    Attributes:
        missing: keys that are needed and the file does not have.
        unexpected: keys of the file that there is no place for.
        mismatched: one line for each tensor whose shape is not the one needed.
    """

    def __init__(
        self,
        where: str,
        what: str = "the adapter",
        *,
        missing: Iterable[str] = (),
        unexpected: Iterable[str] = (),
        mismatched: Iterable[str] = (),
        hint: str = "",
    ) -> None:
        self.missing = tuple(missing)
        self.unexpected = tuple(unexpected)
        self.mismatched = tuple(mismatched)
        lines = [f"missing: {key}" for key in self.missing]
        lines += [f"unexpected: {key}" for key in self.unexpected]
        lines += [f"wrong shape: {line}" for line in self.mismatched]
        super().__init__(bullet_list(f"{where}: its tensors do not fit {what}", lines, hint))


class NonFiniteError(AdapterError, ValueError):
    """A tensor holds NaN or infinity, or a merge would produce one."""


class LossyMergeError(AdapterError, ValueError):
    """Merging into quantised weights would lose too much of the adapters' effect.

    Attributes:
        report: the `MergeReport` of the merge that was refused.
    """

    def __init__(self, report: MergeReport, count: int, limit: float) -> None:
        self.report = report
        super().__init__(
            f"{count} of {len(report.errors)} quantised layers would lose more than {limit:.0%} of the adapters' effect "
            f"when their weight is quantised again; nothing was changed. {report}\n"
            "Keep the adapter unmerged; or merge with dequantize=True, which leaves these layers in full precision; or "
            "with force=True, which accepts the loss"
        )


class AdapterStateError(AdapterError, RuntimeError):
    """The call does not fit the present state of the model, such as loading into a merged adapter."""


class UnsupportedError(AdapterError, NotImplementedError):
    """The request is valid but lorakit cannot do it; the message says what to do instead."""


def bullet_list(head: str, lines: Sequence[str], hint: str = "") -> str:
    """One message of a head line, one bullet a line, and a closing hint."""
    body = "".join(f"\n  - {line}" for line in lines)
    return f"{head}:{body}" + (f"\n{hint}" if hint else "")


@contextmanager
def at_path(path: str) -> Iterator[None]:
    """Name the module in an error of lorakit's that is raised within."""
    try:
        yield
    except AdapterError as error:
        error.args = (f"{path}: {error}", *error.args[1:])
        raise
