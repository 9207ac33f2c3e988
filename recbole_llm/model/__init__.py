"""The models that ``--model=`` finds: ours here, all others in RecBole."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
from pathlib import Path

from recbole.utils import get_model

from recbole_llm.errors import ConfigError


def model_class(name: str) -> type:
    """The class of a model by name: ours (file = lower-case name), else RecBole's.

    Raises:
        ConfigError: no model has this name; says the closest.
    """
    module = f"{__name__}.{name.lower()}"
    try:
        if importlib.util.find_spec(module) is not None:
            return getattr(importlib.import_module(module), name)
        return get_model(name)
    except (ValueError, AttributeError, ModuleNotFoundError) as error:
        if isinstance(error, ModuleNotFoundError) and name.lower() not in str(error):
            raise  # the model exists and needs a package that is not installed
    known = model_names()
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}?" if close else "`recbole-llm ls` lists them."
    raise ConfigError([f"--model={name}: no such model here or in RecBole; {hint}"])


def model_names() -> list[str]:
    """Names of our models and of all RecBole models that have a properties file."""
    import recbole

    recbole_files = (Path(recbole.__file__).parent / "properties" / "model").glob("*.yaml")
    ours = [name for name in OWN_MODELS if any(m.name == name.lower() for m in pkgutil.iter_modules(__path__))]
    return ours + sorted(f.stem for f in recbole_files)


OWN_MODELS = ("LLMRanker",)
