"""RecBole-LLM: LLM rankers head to head with RecBole's recommenders, under one protocol."""

import os

# Before torch is loaded. Its threads otherwise spin while they wait for each other; where another program holds a core
# that made an epoch of a small model up to twenty times slower (measured: GRU4Rec, 2 cores, 112 s against 4.4 s).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from recbole_llm import compat  # noqa: E402

__version__ = "0.1.0"

compat.prepare()
