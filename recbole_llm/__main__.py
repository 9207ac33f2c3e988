"""``python -m recbole_llm`` is ``recbole-llm``."""

from recbole_llm.cli import main

raise SystemExit(main())
