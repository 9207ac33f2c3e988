"""What an explanation has to say about a run: what could not be had, and what to keep in mind."""

from __future__ import annotations

from collections.abc import Sequence

from recbole_llm.data.pair_prompt import PairPrompt
from recbole_llm.explain.finished_run import FinishedRun
from recbole_llm.explain.other_ranks import OtherRank
from recbole_llm.read_keys import reranks


def run_notes(run: FinishedRun, row: int, others: Sequence[OtherRank]) -> list[str]:
    """Sentences about a run and one of its rows.

    Args:
        others: the other runs whose rank of the target was found.
    """
    return [*_reference(run), *_other_runs(run, others), *_ranking(run, row)]


def _reference(run: FinishedRun) -> list[str]:
    config, loss, notes = run.config, run.record["loss"], []
    if told := run.lacks_reference:
        return [f"No reference: {told}."]
    if loss == "SFT":
        notes.append("This run is SFT: no SFT stage to compare with, and no reward; changes are since before training.")
    elif run.reference_name != "SFT":
        notes.append("epochs=0: the reference is the LLM before training.")
    if config["reference_free"] and loss == "DMPO":
        notes.append("reference_free=True: the loss did not use the reference; rewards are computed all the same.")
    if config["dynamic_beta"]:
        told = f"rewards are by beta={config['beta']}"
        notes.append(f"dynamic_beta=True: in training each pair had a beta of its own; {told}.")
    return notes


def _other_runs(run: FinishedRun, others: Sequence[OtherRank]) -> list[str]:
    if not others:
        return [
            f"No finished run of another model with the same candidates in {run.folder.parent}: run SASRec with this "
            "run's data and evaluation settings, or name a run with --baseline."
        ]
    if {other.trained_on for other in others} != {run.record["training_users"]}:
        return ["Not all runs were trained on as many users; the table of ranks says how many."]
    return []


def _ranking(run: FinishedRun, row: int) -> list[str]:
    config, notes = run.config, []
    if isinstance(run.model.prompt, PairPrompt):
        notes.append("Pair prompt: a title's log-prob is that of the answer which puts it before the other one.")
    if reranks(config, run.rows.mode):
        told, weight = f"top {config['rerank_topk']} of {config['rerank_model']}", run.model.rerank_weight
        who = "the LLM" if weight == 1 else f"a mixture of the LLM ({weight:.0%}) and {config['rerank_model']}"
        notes.append(f"Re-ranking: {who} ordered the {told} alone; all others stand behind these in its order.")
    if run.rows.candidates is None and config["full_ranking"] == "exact_topk":
        notes.append(f"exact_topk: items behind the best {max(config['topk'])} tie, so their ranks are means.")
    several = int((run.rows.users == run.rows.users[row]).sum())
    if several > 1:
        notes.append(f"This user has {several} test rows; the last one is explained.")
    return notes
