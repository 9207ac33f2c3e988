"""The command line: ``recbole-llm run | compare | plan | preview | explain | ls | env``, with RecBole's flags."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from recbole_llm import __version__
from recbole_llm.errors import ConfigError, UserError, plain
from recbole_llm.keys import LOSSES
from recbole_llm.processes import rank, world_size
from recbole_llm.settings import PROPERTIES, at_home, laid_over, parse_flag, read_yamls, unlike_settings

USAGE = f"""recbole-llm {__version__}: LLM rankers head to head with RecBole's recommenders

  recbole-llm run     -m LLMRanker -d ml-100k [--key=value ...]   train and evaluate one model
  recbole-llm compare --models=Pop,SASRec,LLMRanker -d ml-100k    several models, same candidates, one table; over
                                                                  --seeds=1,2,3 --modes=uni99,full --few_shot=50,none
  recbole-llm plan    -m LLMRanker -d ml-100k [--key=value ...]   tokens, memory and time of a run, before it
  recbole-llm preview -m LLMRanker -d ml-100k [--user=196]        a user's prompt as the LLM reads it; of DPO4Rec the
                                                                  texts about a user, and what they are worth
  recbole-llm explain <run folder> --user=196 [-k 10]             why a finished run ranks a user's items so: text, HTML
                                                                  --users=50: are such explanations faithful?
  recbole-llm ls      [--runs | --keys]                           models, losses, data sets, prompts, comparisons, and
                                                                  the finished runs in saved/ (or --checkpoint_dir)
  recbole-llm env                                                 machine and versions, for a bug report

-m/--model, -d/--dataset, --config_files="a.yaml b.yaml", and any RecBole or RecBole-LLM key as --key=value or
--key value. Flags win over files. In a comparison a model's own keys stand in brackets behind its name:
--models="SASRec,LLMRanker[loss=DMPO,beta=0.5]". Keys and their meanings: recbole-llm ls --keys."""
HELP = ("-h", "--help", "help")
SHORT = {"-m": "model", "-d": "dataset", "-k": "k"}
SWITCHES = {"keys", "runs"}
TAKES = {"explain": "run_folder"}  # commands that take one word without a flag, and what it is called


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0 on success, 1 when a model of a comparison failed, 2 for bad input, 130 when interrupted, 141 when nobody
        reads what is printed any more, as under ``| head``.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _command(argv)
        if sys.stdout is not None:  # closed from the beginning
            sys.stdout.flush()
        return status
    except UserError as error:
        _tell(plain(str(error), breaks=True), alike=isinstance(error, ConfigError) or error.known_to_all)
        return 2
    except KeyboardInterrupt:
        _tell("stopped. Finished runs and stages are kept; the same command goes on there.", alike=True)
        return 130
    except BrokenPipeError:
        if _is_read():
            raise
        return 141


def _command(argv: list[str]) -> int:
    if not argv or any(word in HELP[:2] for word in argv) or argv[0] in HELP:
        print(USAGE)
        return 0
    if argv[0] not in COMMANDS:
        raise ConfigError([f"`{argv[0]}`: no such command; use {', '.join(COMMANDS)}."])
    if argv[0] != "run" and world_size() > 1:
        raise ConfigError([f"`{argv[0]}`: it works in one process; torchrun shares a `run` alone."])
    return COMMANDS[argv[0]](parse_flags(argv[1:], TAKES.get(argv[0])))


def _is_read() -> bool:
    """Whether anybody still reads what is printed; if not, what is left to print goes nowhere."""
    try:
        print(flush=True)  # into nothing where there is no output
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True


def _tell(text: str, alike: bool) -> None:
    """What ends a command; of several processes that end alike the first tells it."""
    process = rank()
    if process == 0 or not alike:
        print(f"\nrecbole-llm{f' (process {process})' if process else ''}: {text}", file=sys.stderr)


def parse_flags(argv: Sequence[str], takes: str | None = None) -> dict[str, Any]:
    """``-m X --key=value --key value`` -> settings; RecBole's ``config_files`` becomes a list.

    Args:
        takes: what one word without a flag is called, where the command takes one.

    Raises:
        ConfigError: what is not a flag, a flag without a value, or one given twice with different values.
    """
    settings: dict[str, Any] = {}
    problems, rest = [], list(argv)
    while rest:
        word = rest.pop(0)
        name, mark, value = word.partition("=")
        if name not in SHORT and not (name.startswith("--") and name[2:]):
            if takes and takes not in settings and not word.startswith("-"):
                settings[takes] = word
                continue
            problems.append(f"`{word}`: flags look like --key=value.")
            continue
        key = SHORT.get(name, name[2:])
        if not mark:
            if key in SWITCHES:
                value = "True"
            elif rest and rest[0] not in SHORT and not rest[0].startswith("--"):
                value = rest.pop(0)
            else:
                problems.append(f"{name}: give it a value, for example {name}=...")
                continue
        parsed = parse_flag(key, value)
        problems += unlike_settings(parsed, name)
        if key in settings and settings[key] != parsed:
            problems.append(f"{name}: given twice with different values, {settings[key]!r} and {parsed!r}.")
        settings[key] = parsed
    if problems:
        raise ConfigError(problems)
    if "config" in settings:  # the short form
        settings["config_files"] = f"{settings.pop('config')} {settings.get('config_files', '')}"
    if "config_files" in settings:
        settings["config_files"] = settings["config_files"].split()
    return at_home(settings)


def run(settings: dict[str, Any]) -> int:
    """Train and evaluate one model; prints where the run folder lies."""
    from recbole_llm.distributed import is_first
    from recbole_llm.quick_start import run_recbole_llm

    files = settings.pop("config_files", None)
    result = run_recbole_llm(settings.pop("model", None), settings.pop("dataset", None), files, settings)
    if is_first():
        print(json.dumps(result["test_result"], indent=2))
        print(f"run folder: {result['run_folder']}")
    return 0


def compare_models(settings: dict[str, Any]) -> int:
    """Run several models and print their tables, where the files lie, and what to try next."""
    from recbole_llm.report.compare import compare

    merged = laid_over(read_yamls(settings.pop("config_files", [])), settings)
    if "models" not in merged:
        raise ConfigError(["--models: name at least one, for example --models=Pop,SASRec,GRU4Rec,LLMRanker."])
    done = compare(merged.pop("models"), merged.pop("dataset", None), merged)
    print("\n" + done["markdown"] + "\n" + done["costs"])
    for file in done["files"]:
        print(f"written: {file}")
    if merged.get("eval_users") is not None:
        print("next   : the same command with --eval_users=none (all users)")
    if done["failed"]:
        print(f"failed : {', '.join(dict.fromkeys(done['failed']))} (see the log in log/)", file=sys.stderr)
        return 1
    return 0


def plan_run(settings: dict[str, Any]) -> int:
    """Show what a run will cost; ``--probe=False`` leaves out what needs the LLM's weights."""
    from recbole_llm.config import LLMConfig
    from recbole_llm.plan import plan
    from recbole_llm.report.plan_table import plan_text

    probe = settings.pop("probe", True)
    if not isinstance(probe, bool):
        raise ConfigError([f"--probe={probe!r}: must be True or False."])
    files = settings.pop("config_files", None)
    config = LLMConfig(settings.pop("model", None), settings.pop("dataset", None), files, settings)
    print(plan_text(plan(config, probe)))
    return 0


def preview(settings: dict[str, Any]) -> int:
    """Show a user's prompt and pairs."""
    from recbole_llm.config import LLMConfig
    from recbole_llm.preview import preview_user

    user = settings.pop("user", None)
    files = settings.pop("config_files", None)
    model = settings.pop("model", None) or read_yamls(files or []).get("model", "LLMRanker")
    config = LLMConfig(model, settings.pop("dataset", None), files, settings)
    print(preview_user(config, user))
    return 0


def explain(settings: dict[str, Any]) -> int:
    """Explain a user's ranking by a finished run, or test explanations over users; writes HTML or JSON beside."""
    from recbole_llm.explain.command import explain_run

    return explain_run(settings)


def list_all(settings: dict[str, Any]) -> int:
    """What there is, and the finished runs; --runs these alone, --keys every key as its YAML explains it."""
    from recbole_llm.model import OWN_MODELS, model_names
    from recbole_llm.report.runs import runs_text

    keys, runs_alone = settings.pop("keys", False), settings.pop("runs", False)
    saved = settings.pop("checkpoint_dir", "saved")
    _takes_nothing("ls", settings, "--keys, --runs and --checkpoint_dir alone")
    if keys:
        for name in ("overall", *(f"model/{model}" for model in OWN_MODELS), "comparison"):
            print((PROPERTIES / f"{name}.yaml").read_text(encoding="utf-8"))
        return 0
    if not runs_alone:
        print(f"models: {', '.join(model_names())}")
        print(f"losses: {', '.join(LOSSES)}")
        for folder in ("dataset", "prompt", "compare", "search"):
            print(f"{folder}: {', '.join(sorted(f.stem for f in (PROPERTIES / folder).glob('*.yaml')))}")
        print()
    print(runs_text(Path(saved)))
    return 0


def show_env(settings: dict[str, Any]) -> int:
    """Machine and versions as JSON."""
    from recbole_llm.environment import environment

    _takes_nothing("env", settings, "no flags")
    print(json.dumps(environment(), indent=2))
    return 0


def _takes_nothing(command: str, settings: dict[str, Any], told: str) -> None:
    if settings:
        raise ConfigError([f"--{key}: {command} takes {told}." for key in settings])


COMMANDS: dict[str, Callable[[dict[str, Any]], int]] = {
    "run": run,
    "compare": compare_models,
    "plan": plan_run,
    "preview": preview,
    "explain": explain,
    "ls": list_all,
    "env": show_env,
}
