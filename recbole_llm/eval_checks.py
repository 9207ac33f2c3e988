"""What is wrong with the evaluation settings: split, candidates, metrics."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from recbole.evaluator import metric_types
from recbole.evaluator.register import smaller_metrics
from recbole.utils import EvaluatorType

from recbole_llm.errors import UserError
from recbole_llm.key_checks import integer, number
from recbole_llm.wrong_keys import closest

RANKING = sorted(name for name, kind in metric_types.items() if kind == EvaluatorType.RANKING)
OF_ITEMS = {"itemcoverage", "averagepopularity", "shannonentropy", "giniindex", "tailpercentage"}
EVAL_ARGS = ("split", "group_by", "order", "mode")
LEAVE_ONE_OUT = {"LS": "valid_and_test"}
MODE = re.compile(r"full|(uni|pop|low)[1-9]\d{0,8}")
VALID_METRIC = re.compile(r"(?P<name>\w+)@(?P<k>[1-9]\d{0,8})|gauc", re.IGNORECASE)


def wrong_evaluation(settings: Mapping[str, Any]) -> list[str]:
    """What is wrong with the evaluation settings, where ``eval_args`` holds the defaults of what was left out."""
    eval_args = settings["eval_args"]
    if isinstance(eval_args, dict):
        problems = _wrong_eval_args(eval_args) + _wrong_lists(settings, eval_args)
    else:
        problems = [f"--eval_args={eval_args!r}: must be a table, for example \"{{'mode': 'uni99'}}\"."]
    metrics = settings["metrics"] if isinstance(settings["metrics"], (list, tuple)) else [settings["metrics"]]
    problems += [f"--metrics: {told}" for metric in metrics if (told := _no_ranking(metric))]
    if not metrics:
        problems.append(f"--metrics={metrics}: name at least one of {', '.join(RANKING)}.")
    topk = settings["topk"] if isinstance(settings["topk"], (list, tuple)) else [settings["topk"]]
    if not topk or any(integer(1)(k) for k in topk):
        return [*problems, f"--topk={settings['topk']!r}: must be a list of whole numbers >= 1."]
    if isinstance(eval_args, dict):
        problems += _wrong_item_metrics(eval_args.get("mode", "full"), settings["next_items"], metrics, topk)
    if isinstance(eval_args, dict) and settings.get("full_ranking") == "exact_topk":
        problems += _wrong_topk_search(settings, eval_args["mode"], metrics)
    name = str(settings["valid_metric"]).partition("@")[0].lower()
    if settings.get("valid_metric_bigger") is False and name not in smaller_metrics:  # RecBole sets it by the metric
        problems.append(f"--valid_metric_bigger=False: of {settings['valid_metric']} more is better; leave it out.")
    return problems + _wrong_valid_metric(settings["valid_metric"], metrics, topk)


def _wrong_eval_args(eval_args: Mapping[str, Any]) -> list[str]:
    problems = []
    for key in (k for k in eval_args if k not in EVAL_ARGS):
        hint = closest(key, EVAL_ARGS, f"there are {', '.join(EVAL_ARGS)}")
        problems.append(f"no entry {key!r}; {hint}")
    if eval_args.get("order", "TO") != "TO":
        problems.append(f"order {eval_args['order']} has no next item to rank; use order TO")
    if eval_args.get("group_by", "user") not in ("user", "none", None):
        problems.append(f"group_by {eval_args['group_by']!r} must be user or none")
    split = eval_args.get("split", LEAVE_ONE_OUT)
    ((kind, how),) = split.items() if isinstance(split, dict) and len(split) == 1 else [(None, None)]
    share = number(above=True)
    shares = isinstance(how, (list, tuple)) and len(how) == 3 and not any(share(s) for s in how)
    if split != LEAVE_ONE_OUT and not (kind in ("RS", "TS") and shares):
        problems.append(
            f"split {split!r} must be {LEAVE_ONE_OUT} (leave one out), or three shares as in "
            "{'RS': [0.8, 0.1, 0.1]} or {'TS': [0.8, 0.1, 0.1]}"
        )
    modes = eval_args.get("mode", "full")
    modes = modes if isinstance(modes, dict) else {"valid": modes}
    problems += [f"mode has the entries valid and test, not {s!r}" for s in modes if s not in ("valid", "test")]
    for mode in modes.values():
        if not (isinstance(mode, str) and MODE.fullmatch(mode)):
            problems.append(f"mode {mode!r} must be full, uniN, popN or lowN (N whole, >= 1), for example uni99")
    return [f"--eval_args: {problem}" + ("" if problem.endswith((".", "?")) else ".") for problem in problems]


def _wrong_lists(settings: Mapping[str, Any], eval_args: Mapping[str, Any]) -> list[str]:
    """What asking for several next items at once cannot be put together with."""
    size = settings["next_items"]
    if integer(2)(size):
        return []
    mode = eval_args.get("mode", "full")
    modes = mode.values() if isinstance(mode, dict) else [mode]
    split = eval_args.get("split", LEAVE_ONE_OUT)
    found = {
        f"split {split} holds out no fixed number of events; set --eval_args split {LEAVE_ONE_OUT}": split
        != LEAVE_ONE_OUT,
        "mode lowN asks for one liked item against disliked ones; set --eval_args mode uniN, popN or full": any(
            str(m).startswith("low") for m in modes
        ),
        "--generate_users counts answers to a question with one right answer; set --generate_users=0": settings.get(
            "generate_users", 0
        )
        != 0,
    }
    return [f"--next_items={size}: {told}, or --next_items=1." for told, wrong in found.items() if wrong]


def _wrong_topk_search(settings: Mapping[str, Any], mode: Any, metrics: Sequence[Any]) -> list[str]:
    """What a search for the best K cannot give."""
    if "full" not in (mode.values() if isinstance(mode, dict) else [mode]):
        return []
    whole = [str(m) for m in metrics if str(m).lower() == "gauc"]
    problems = [
        f"--metrics: {m} needs the whole ranking, and --full_ranking=exact_topk finds its top; set "
        "--full_ranking=exact, or leave it out."
        for m in whole
    ]
    if settings["attention"] in ("sdpa", "eager"):
        problems.append(
            f"--attention={settings['attention']}: --full_ranking=exact_topk goes on from what is kept of a prompt, "
            "which this back end cannot; set --attention=auto, or --full_ranking=exact."
        )
    return problems


def _wrong_item_metrics(mode: Any, size: Any, metrics: Sequence[Any], topk: Sequence[int]) -> list[str]:
    """RecBole's metrics of recommended items, where a list is shorter than K: they would count its empty places."""
    modes = [str(m) for m in (mode.values() if isinstance(mode, dict) else [mode])]
    lists = {m: int(m[3:]) + size for m in modes if m != "full" and MODE.fullmatch(m) and not integer(1)(size)}
    shortest = min(lists, key=lists.__getitem__, default=None)
    asked = _of_items(metrics)
    if not asked or shortest is None or max(topk) <= lists[shortest]:
        return []
    return [
        f"--metrics: {', '.join(asked)} would count empty places, for {shortest} asks among {lists[shortest]} items "
        f"and --topk={list(topk)} for more; leave that K out, or take coverage, gini and popularity_lift, which every "
        "run has."
    ]


def check_list_lengths(settings: Any, parts: Sequence[Any]) -> None:
    """Raises ``UserError`` where in full ranking a list of answers is shorter than K, as for candidates above.

    Args:
        parts: ``EvalRows`` of validation and test.
    """
    asked = _of_items(settings["metrics"])
    lists = [(len(rows.item_tokens) - 1 - len(rows.unmet), rows.hidden) for rows in parts if rows.mode == "full"]
    answers = [count - len(items) for count, hidden in lists for items in hidden]
    if asked and answers and max(settings["topk"]) > min(answers):
        raise UserError(
            f"--metrics: {', '.join(asked)} would count empty places, for a user has {min(answers)} items to be ranked "
            f"and --topk={list(settings['topk'])} asks for more; leave that K out."
        )


def _of_items(metrics: Sequence[Any]) -> list[str]:
    return [str(m) for m in metrics if str(m).lower() in OF_ITEMS]


def _no_ranking(metric: Any) -> str | None:
    if str(metric).lower() in RANKING:
        return None
    if str(metric).lower() in metric_types:
        return (
            f"{metric} is no ranking metric: it needs labels, and here items are ranked. GAUC is the "
            "AUC of such a ranking, the mean over users."
        )
    hint = closest(str(metric), [*RANKING, "gauc"], f"it has {', '.join(RANKING)}")
    return f"{metric} is no ranking metric of RecBole; {hint}"


def _wrong_valid_metric(valid_metric: Any, metrics: Sequence[Any], topk: Sequence[int]) -> list[str]:
    found = VALID_METRIC.fullmatch(valid_metric) if isinstance(valid_metric, str) else None
    name = (found["name"] or "gauc").lower() if found else None
    told = f"--valid_metric={valid_metric!r}"
    if found is None or (name == "gauc" and found["k"]):
        wrong = _no_ranking(valid_metric) if str(valid_metric).lower() in metric_types else None
        return [f"{told}: {wrong or 'must look like NDCG@10, or be GAUC.'}"]
    problems = []
    if name not in [str(m).lower() for m in metrics]:
        wrong = _no_ranking(name) if name in metric_types and name not in RANKING else None
        wrong = wrong or f"not among --metrics={list(metrics)}; add it there or choose one of them."
        problems.append(f"{told}: {wrong}")
    if found["k"] and int(found["k"]) not in topk:
        problems.append(f"{told}: its K is not in --topk={list(topk)}; add it there or choose one of them.")
    return problems
