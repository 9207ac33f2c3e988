"""RecBole-LLM: LLM rankers head to head with RecBole's recommenders, under one protocol."""

from recbole_llm import compat

__version__ = "0.1.0"

compat.prepare()
