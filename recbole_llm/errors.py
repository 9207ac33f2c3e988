"""What a user is told when something is wrong: one paragraph each, never a traceback."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(Exception):
    """Something the user can mend: says what is wrong, what was found, which key, and what to do.

    The command line prints the message and exits with status 2.
    """


class ConfigError(UserError):
    """All configuration problems at once, one line each.

    Args:
        problems: one sentence per problem, each naming the key as the user types it.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        count = f"{len(self.problems)} problems" if len(self.problems) > 1 else "1 problem"
        super().__init__(f"{count} in the configuration:\n" + "\n".join(f"  - {p}" for p in self.problems))
