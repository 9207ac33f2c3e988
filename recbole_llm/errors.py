"""What a user is told when something is wrong: one paragraph each, never a traceback."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


class UserError(Exception):
    """Something the user can mend: says what is wrong, what was found, which key, and what to do.

    The command line prints the message and exits with status 2.

    Attributes:
        known_to_all: whether every process of the run raises the same one.
    """

    known_to_all = False


class ConfigError(UserError):
    """All configuration problems at once, one line each.

    Args:
        problems: one sentence per problem, each naming the key as the user types it.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        count = f"{len(self.problems)} problems" if len(self.problems) > 1 else "1 problem"
        super().__init__(f"{count} in the configuration:\n" + "\n".join(f"  - {p}" for p in self.problems))


class MachineError(UserError):
    """What says nothing about the settings: a full disk, a damaged file. Once that is mended the same run goes well."""


class NotAtHand(MachineError):
    """Weights or a server that cannot be had here and now, whatever the values are: another try may have them."""


def plain(text: str, breaks: bool = False) -> str:
    """The text without what a terminal or a browser would obey; line breaks stay where they are wanted."""
    return "".join(c if c.isprintable() or (breaks and c == "\n") else f"\\x{ord(c):02x}" for c in text)


def problems_of(check: Callable[[], Any]) -> list[str]:
    """What a check raises, as problems."""
    try:
        check()
    except UserError as error:
        return getattr(error, "problems", [str(error)])
    return []
