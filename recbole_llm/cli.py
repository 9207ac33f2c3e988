"""The command line: ``recbole-llm run | compare | preview | ls | env``, with RecBole's flags."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from recbole_llm import __version__
from recbole_llm.config import PROPERTIES, LLMConfig, parse_value, read_yaml
from recbole_llm.errors import ConfigError, UserError

USAGE = f"""recbole-llm {__version__}: LLM rankers head to head with RecBole's recommenders

  recbole-llm run     -m LLMRanker -d ml-100k [--key=value ...]    train and evaluate one model, as RecBole's script does
  recbole-llm compare --models=Pop,SASRec,LLMRanker -d ml-100k     several models on the same candidates, one table
  recbole-llm preview -m LLMRanker -d ml-100k [--user=196]         a user's prompt and pairs as the LLM reads them
  recbole-llm ls      [--keys]                                     models, data sets, prompts and comparisons; all keys
  recbole-llm env                                                  machine and versions, for a bug report

-m/--model, -d/--dataset, --config_files="a.yaml b.yaml", and any RecBole or RecBole-LLM key as --key=value or
--key value. Flags win over files. Keys and their meanings: properties/overall.yaml, properties/model/*.yaml."""
SHORT = {"-m": "model", "-d": "dataset"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0 on success, 1 when a model of a comparison failed, 2 for bad input, 130 when interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help") or any(a in ("-h", "--help") for a in argv):
        print(USAGE)
        return 0
    try:
        if argv[0] not in COMMANDS:
            raise ConfigError([f"`{argv[0]}`: no such command; use {', '.join(COMMANDS)}."])
        return COMMANDS[argv[0]](parse_flags(argv[1:]))
    except UserError as error:
        print(f"\nrecbole-llm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nrecbole-llm: stopped. Finished runs and stages are kept; the same command goes on from them.", file=sys.stderr)
        return 130


def parse_flags(argv: Sequence[str]) -> dict[str, Any]:
    """``-m X --key=value --key value`` -> settings, RecBole's file flag included as a list under ``config_files``.

    Raises:
        ConfigError: what is not a flag, a flag without a value, or one given twice with different values.
    """
    settings: dict[str, Any] = {}
    problems, rest = [], list(argv)
    while rest:
        word = rest.pop(0)
        name, mark, value = word.partition("=")
        if name not in SHORT and not name.startswith("--"):
            problems.append(f"`{word}`: flags look like --key=value.")
            continue
        key = SHORT.get(name, name[2:])
        if not mark:
            if key in SWITCHES:
                value = "True"
            elif rest and not rest[0].startswith("-"):
                value = rest.pop(0)
            else:
                problems.append(f"{name}: give it a value, for example {name}=...")
                continue
        parsed: Any = value if key in TEXT_FLAGS else parse_value(value)
        if settings.get(key, parsed) != parsed:
            problems.append(f"{name}: given twice with different values.")
        settings[key] = parsed
    if problems:
        raise ConfigError(problems)
    if "config_files" in settings:
        settings["config_files"] = settings["config_files"].split()
    return settings


TEXT_FLAGS = {"model", "dataset", "models", "config_files", "user", "gpu_id", "data_path", "checkpoint_dir", "llm", "item_text"}
SWITCHES = {"keys"}


def run(settings: dict[str, Any]) -> int:
    """Train and evaluate one model; prints where the run folder lies."""
    from recbole_llm.quick_start import run_recbole_llm

    files = settings.pop("config_files", None)
    result = run_recbole_llm(settings.pop("model", None), settings.pop("dataset", None), files, settings)
    print(json.dumps(result["test_result"], indent=2))
    print(f"run folder: {result['run_folder']}")
    return 0


def compare_models(settings: dict[str, Any]) -> int:
    """Run several models and print their table, where its files lie, and what to try next."""
    from recbole_llm.report.compare import compare

    files = settings.pop("config_files", [])
    merged = {key: value for file in files for key, value in read_yaml(file).items()} | settings
    if "models" not in merged:
        raise ConfigError(["--models: name at least one, for example --models=Pop,SASRec,GRU4Rec,LLMRanker."])
    models, dataset, per_model = merged.pop("models"), merged.pop("dataset", None), merged.pop("per_model", None)
    done = compare(models, dataset, merged, per_model)
    print("\n" + done["markdown"])
    for file in done["files"]:
        print(f"written: {file}")
    again = " ".join(f"--config_files={f}" for f in files) or "--models=... "
    print(f"next   : recbole-llm compare {again} --eval_users=none   (all users; finished stages are reused)")
    if done["failed"]:
        print(f"failed : {', '.join(done['failed'])} (see the log in log/)", file=sys.stderr)
        return 1
    return 0


def preview(settings: dict[str, Any]) -> int:
    """Show a user's prompt and pairs."""
    from recbole_llm.preview import preview_user

    user = settings.pop("user", None)
    files = settings.pop("config_files", None)
    config = LLMConfig(settings.pop("model", "LLMRanker"), settings.pop("dataset", None), files, settings)
    print(preview_user(config, user))
    return 0


def list_all(settings: dict[str, Any]) -> int:
    """Models, data sets, prompts and comparisons; with --keys every key as its YAML explains it."""
    from recbole_llm.model import model_names

    if settings.get("keys"):
        for name in ("overall", "model/LLMRanker"):
            print((PROPERTIES / f"{name}.yaml").read_text(encoding="utf-8"))
        return 0
    for title, found in (("models", model_names()),
                         *((folder, sorted(f.stem for f in (PROPERTIES / folder).glob("*.yaml"))) for folder in ("dataset", "prompt", "compare"))):
        print(f"{title}: {', '.join(found)}")
    return 0


def show_env(settings: dict[str, Any]) -> int:
    """Machine and versions as JSON."""
    from recbole_llm.run_folder import environment

    print(json.dumps(environment(), indent=2))
    return 0


COMMANDS: dict[str, Callable[[dict[str, Any]], int]] = {
    "run": run, "compare": compare_models, "preview": preview, "ls": list_all, "env": show_env,
}


def console() -> None:
    """Entry point of the console script."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    raise SystemExit(main())


