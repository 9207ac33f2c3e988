"""RecBole-LLM: LLM rankers head to head with RecBole's recommenders, under one protocol."""

import os

# Before torch is loaded. By default GNU OpenMP's threads spin long while they wait for each other; where another
# program holds a core, that made small models many times slower (GRU4Rec few-shot, 2 cores, one of them busy: 24 s an
# epoch at 30,000 spins, 6.5 s at 3,000; 3.5 s at either on a quiet machine).
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
# Before huggingface_hub is loaded: it shall tell no one what is used here.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from recbole_llm import compat  # noqa: E402

__version__ = "0.1.0"

compat.prepare()
