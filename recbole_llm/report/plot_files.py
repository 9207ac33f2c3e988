"""The files that ``plot`` writes, by name: which of them lie in a folder, and those of an earlier comparison away."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

NAMES = re.compile(r"(metric|few_shot|cost|history_length|item_popularity|popularity_lift|training-\d+)\.(png|pdf)")


def plots_in(folder: Path) -> list[str]:
    """Names of the plots that lie there; none where there is no folder."""
    return sorted(file.name for file in folder.glob("*") if NAMES.fullmatch(file.name))


def drop_plots(folder: Path, kept: Collection[str] = ()) -> None:
    """Remove plots, but those of these names (without ending); files of the user's stay."""
    for name in plots_in(folder):
        if Path(name).stem not in kept:
            (folder / name).unlink()
