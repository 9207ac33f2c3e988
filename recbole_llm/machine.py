"""What the machine is, as results name it."""

from __future__ import annotations

import platform
import re
from pathlib import Path


def processor() -> str:
    """The CPU's name as the system gives it, such as ``AMD EPYC``."""
    try:
        told = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    found = re.search(r"model name\s*:\s*(.+)", told)
    return found.group(1) if found else platform.processor()
