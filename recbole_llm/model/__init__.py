"""The models that ``--model=`` finds: ours here, all others in RecBole."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

from recbole import __file__ as recbole_file

from recbole_llm.errors import ConfigError
from recbole_llm.wrong_keys import closest

OWN_MODELS = ("LLMRanker", "DPO4Rec")
YOUR_OWN = (
    "A model of your own is recbole_llm/model/<lower-case name>.py and properties/model/<Name>.yaml (CONTRIBUTING.md)"
)
TREES = ("lightgbm", "xgboost")
# Models of RecBole that cannot rank under the protocol, and why.
UNFIT = {
    "DIEN": "it scores a disliked item beside every answer, which no row has",
    "GRU4RecCPR": "it reads the answer before it scores, which no model may see here",
    "SASRecCPR": "it reads the answer before it scores, which no model may see here",
    "KSR": "it keeps vectors of relations in float64, which its float32 layers refuse",
    "RaCT": "it trains in stages of its own, whose files could only be read by running what is in them",
    "S3Rec": "it is pre-trained into a file that could only be read by running what is in it",
    "SHAN": "it learns from the history turned round, and where it scores all items reads it as it is",
}
# Not RecBole's get_model: for a name that it does not find it imports lightgbm, which need not be there.
PACKAGES = (
    __name__,
    *(f"recbole.model.{kind}_recommender" for kind in ("general", "context_aware", "sequential", "knowledge_aware")),
)


def model_class(name: str) -> type:
    """The class of a model by name: ours, else RecBole's; the file bears the name in lower case.

    Raises:
        ConfigError: no model has this name; says the closest.
    """
    if name.lower() in TREES:
        raise ConfigError(
            [
                f"--model={name}: decision trees train outside torch and cannot rank under our "
                "protocol; `recbole-llm ls` lists the models that can."
            ]
        )
    import torch  # not above: `recbole-llm ls` names models and shall not wait for it

    # RecBole's SINE, which comes with any sequential model, turns this on for the whole process: it adds half to the
    # time of each training step of every model.
    with torch.autograd.set_detect_anomaly(torch.is_anomaly_enabled()):
        for package in PACKAGES if name.isidentifier() else ():
            if importlib.util.find_spec(f"{package}.{name.lower()}") is not None:
                found = getattr(importlib.import_module(f"{package}.{name.lower()}"), name, None)
                if isinstance(found, type):
                    return found
    hint = closest(name, model_names(), f"`recbole-llm ls` lists them. {YOUR_OWN}")
    raise ConfigError([f"--model={name}: no such model here or in RecBole; {hint}"])


def model_names() -> list[str]:
    """Names of our models and of those of RecBole's that can rank under our protocol."""
    root = Path(recbole_file).parent
    others = {f.stem for f in (root / "model" / "context_aware_recommender").glob("*.py")} | set(TREES)
    theirs = {f.stem for f in (root / "properties" / "model").glob("*.yaml") if f.stem.lower() not in others}
    return [*OWN_MODELS, *sorted((theirs | {"Random"}) - set(UNFIT))]
