"""The loop: texts, a recommender that reads them, rewards, an aligned LLM; and again.

Each stage lies in ``<checkpoint_dir>/stages`` under the hash of what determines it, so a killed run goes on with the
stage it was in, and runs that share stages (a control, another number of iterations) compute them once: of several at
a time one works on a stage, and those that need it too wait.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from recbole.trainer import Trainer
from recbole.utils import init_seed

from recbole_llm.costs import Clock, found_done
from recbole_llm.data.candidates import EvalRows
from recbole_llm.data.dataset import POSITION
from recbole_llm.data.protocol import Protocol
from recbole_llm.dpo4rec.align import align
from recbole_llm.dpo4rec.iterations import best_iteration, fell
from recbole_llm.dpo4rec.places import draw_places, training_loader
from recbole_llm.dpo4rec.reward import reward_lists
from recbole_llm.dpo4rec.setting_checks import alignment_rounds
from recbole_llm.dpo4rec.stage_folder import ALIGN_KEYS, OF_POLICY, RECOMMENDER_KEYS, stage_folder
from recbole_llm.dpo4rec.text_vectors import text_vectors
from recbole_llm.dpo4rec.work import Work, judged_facts, judged_lines, others_in_place
from recbole_llm.files import content_hash, found_or_made, write_json, write_text
from recbole_llm.llm.adapter import adapter_state, digest, load_adapter, save_adapter, set_adapter_state
from recbole_llm.llm.sampling import Sampling
from recbole_llm.stages import split_of
from recbole_llm.trainer import ProtocolEvaluation


class DPO4RecTrainer(ProtocolEvaluation, Trainer):
    """RecBole's trainer, run once an iteration on texts of an LLM that is aligned in between."""

    def start(self, protocol: Protocol, run_folder: Path) -> None:
        """Where the data come from and where the checkpoint and the record of stages go."""
        super().start(protocol, run_folder)
        self.run_folder = run_folder
        self.places = draw_places(self.config, protocol)
        if alignment_rounds(self.config):  # that they cannot be drawn is told before any text is written
            reward_lists(self.config, protocol, self.places.pairs)
        # None where the model reads no texts; only where it does is it asked for anything.
        self.work: Any = Work(self.config, protocol, self.places) if self.model.reads else None
        keys = ("recommender_model", "knowledge", "llm", "endpoint", "text_encoder", "alignment")
        self.facts: dict[str, Any] = {key: self.config[key] for key in keys}
        if self.work and self.work.reasoner:
            llm = self.work.reasoner.llm
            self.facts |= {"llm_revision": llm.revision, "dtype": llm.dtype, "kernels": llm.kernels}
            self.untuned = {name: tensor.cpu() for name, tensor in adapter_state(llm).items()}
        self.facts |= {"readers": len(self.places.readers), "pair_users": len(self.places.pairs), "iterations": []}
        self.facts["found"] = self.work.found if self.work else []
        self.counted: set[Path] = set()  # folders of stages whose seconds are in the record

    # ---- the loop

    def fit(
        self,
        train_data: Any,
        valid_data: EvalRows | None = None,
        verbose: bool = True,
        saved: bool = True,
        show_progress: bool = False,
        callback_fn: Any = None,
    ) -> tuple[float, dict[str, float] | None]:
        """All iterations; the recommender of the one that ``select_iteration`` names is kept.

        Returns:
            Its best validation score and result.
        """
        config, records = self.config, self.facts["iterations"]
        last = alignment_rounds(config)
        self._tell(last)
        folders: list[Path] = []
        for iteration in range(last + 1):
            folder, record = self.teach_recommender(iteration, valid_data, verbose, show_progress)
            records.append(record)
            folders.append(folder)
            self.logger.info(f"DPO4Rec iteration {iteration}: validation {record['best_valid_score']}.")
            if iteration == last:
                break
            if fell(self._scores(records), self.valid_metric_bigger):
                self.logger.info("DPO4Rec: validation fell, so no further iteration.")
                break
            record |= self._align(iteration)
        chosen = best_iteration(self._scores(records), self.valid_metric_bigger)
        self.facts["selected_iteration"] = chosen
        self._take(folders[chosen])
        super()._save_checkpoint(chosen, verbose=verbose)
        if self.work and self.work.reasoner:
            if chosen < len(records) - 1:
                self._policy_of(records, chosen)
            save_adapter(self.work.reasoner.llm, self.run_folder)
        write_json(self.run_folder / "dpo4rec.json", self.facts)
        score, result = (records[chosen][key] for key in ("best_valid_score", "best_valid_result"))
        return -np.inf if score is None else score, result

    def teach_recommender(
        self, iteration: int, valid_data: EvalRows | None, verbose: bool = True, show_progress: bool = False
    ) -> tuple[Path, dict[str, Any]]:
        """Texts by the LLM as it is now, and a recommender that reads them; the model is then that recommender.

        Returns:
            The recommender's folder, and a record of scores and seconds.
        """
        clock = time.perf_counter()
        texts = self._texts_to_read(iteration) if self.work else {}
        wrote = time.perf_counter() - clock
        folder, record = self._recommender(texts, valid_data, verbose, show_progress)
        return folder, {"iteration": iteration, "texts_s": wrote, **record}

    def _tell(self, last: int) -> None:
        """What is ahead, in the log."""
        if not self.work:
            self.logger.info("DPO4Rec: no texts, one recommender to train.")
            return
        texts, pairs = len(self.places.written()), len(self.places.pairs)
        self.logger.info(
            f"DPO4Rec: {last + 1} times {texts} texts of up to {self.config['reasoning_tokens']} tokens and a "
            f"recommender to train; {last} times {pairs * self.config['samples']} texts about {pairs} users and "
            f"{self.config['alignment']} on their best and worst."
        )

    def _scores(self, records: list[dict[str, Any]]) -> list[float | None]:
        """Validation scores that choose among the iterations; None where the last one is kept in any case."""
        chooses = self.config["select_iteration"] != "last"
        return [record["best_valid_score"] if chooses else None for record in records]

    @property
    def aligned_parameters(self) -> int:
        """Parameters of the LLM that alignment trained; 0 where it trained none."""
        if not any("align" in record for record in self.facts["iterations"]):
            return 0
        return sum(p.numel() for p in self.work.reasoner.parameters() if p.requires_grad)

    # ---- texts

    def _texts_to_read(self, iteration: int) -> dict[tuple[int, int], str]:
        """One greedy text at each place that the recommender reads; another user's each under ``placebo``."""
        places = self.places.written()
        sampling = Sampling(1, self.config["reasoning_tokens"])
        written = self.work.write(places, sampling, f"Write texts, iteration {iteration}")
        if self.config["knowledge"] == "placebo":
            written = [written[i] for i in others_in_place([u for u, _ in places], self.config["seed"])]
        lines = [
            {"user": str(self.work.user_tokens[u]), "known": known, "text": text.text, "tokens": text.tokens}
            for (u, known), (text,) in zip(places, written, strict=True)
        ]
        told = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_text(self.run_folder / f"texts-{iteration}.jsonl", told)
        empty = sum(not line["text"].strip() for line in lines)
        if empty:
            self.logger.warning(f"DPO4Rec: {empty} of {len(lines)} texts are empty; their users have none.")
        return dict(zip(places, (line["text"] for line in lines), strict=True))

    # ---- the recommender

    def _recommender(
        self, texts: dict[tuple[int, int], str], valid_data: EvalRows | None, verbose: bool, show_progress: bool
    ) -> tuple[Path, dict[str, Any]]:
        """Train a recommender on these texts from new weights, or find it trained; the model then holds its best."""
        loader, clock = training_loader(self.config, self.protocol, self.places), Clock()
        init_seed(self.config["seed"], self.config["reproducibility"])
        fresh = type(self.model)(self.config, self.protocol.train_data._dataset)
        self.model.load_state_dict(fresh.state_dict())
        if self.model.reads:
            self._read(texts)
        read = digest(dict(self.model.named_buffers()))  # vectors of texts and items, and who reads them
        rows = content_hash([loader._dataset.inter_feat[field].tolist() for field in self._row_fields()])
        dataset = self.protocol.dataset
        sizes = [dataset.item_num, dataset.user_num]  # `load_col` moves them, whatever the rows
        others = [read, rows, sizes, split_of(self.config), self.protocol.valid.digest]
        folder = stage_folder(self.config, "recommender", RECOMMENDER_KEYS, others)
        train = super().fit

        def trained() -> dict[str, Any]:
            self._begin(folder)
            score, result = train(loader, valid_data, verbose, True, show_progress)
            return {
                "best_valid_score": None if result is None else float(score),
                "best_valid_result": result,
                "epochs": len(self.train_loss_dict),
                "train_loss": list(self.train_loss_dict.values()),
                "rows": len(loader._dataset),
                "run": self.run_name,
                **dict(zip(("train_s", "train_cpu_s"), clock.spent(), strict=True)),
            }

        record, found = found_or_made(folder, trained)
        if found:
            self.logger.info(f"DPO4Rec: reusing the recommender in {folder}.")
            self._count_found("recommender", folder, record, record["train_s"], record["train_cpu_s"])
        self.counted.add(folder)
        self._take(folder)
        return folder, record

    def _count_found(self, what: str, folder: Path, record: dict[str, Any], seconds: float, cpu_seconds: float) -> None:
        """Seconds of a stage that was found done: this run's own, which was cut off or is given again, or another's.

        A stage of two iterations (an alignment that changed no text) counts once.
        """
        if folder in self.counted:
            return
        if record["run"] == self.run_name:
            self.count_earlier(seconds, cpu_seconds)
        else:
            self.facts["found"].append(found_done(what, seconds, cpu_seconds))

    def _row_fields(self) -> tuple[str, str, str]:
        dataset = self.protocol.dataset
        return dataset.uid_field, dataset.iid_field, POSITION

    def _begin(self, folder: Path) -> None:
        """RecBole's trainer as new, with its checkpoint in a folder."""
        self.saved_model_file = str(folder / "recommender.pth")
        self.start_epoch = self.cur_step = 0
        self.best_valid_score, self.best_valid_result = (-np.inf if self.valid_metric_bigger else np.inf), None
        self.train_loss_dict: dict[int, float] = {}
        self.optimizer = self._build_optimizer()

    def _take(self, folder: Path) -> None:
        """The recommender of a stage into the model; the run's own checkpoint is written to again."""
        self._load_checkpoint(str(folder / "recommender.pth"))
        self.saved_model_file = str(self.run_folder / f"{self.config['model']}.pth")

    def _read(self, texts: dict[tuple[int, int], str]) -> None:
        """Let the model read the texts at their places."""
        places = list(texts)
        vectors = text_vectors(self.config, [texts[place] for place in places])
        by_place = dict(zip(places, vectors, strict=True))
        train = {u: (known, by_place[u, known]) for u, known in self.places.readers.items()}
        self.model.read_texts(train, {u: by_place[u, known] for u, known in self.places.asked.items()})

    # ---- alignment

    def _align(self, iteration: int) -> dict[str, Any]:
        """Judge N texts about each pair user, and train the LLM on the best and the worst."""
        clock = time.perf_counter()
        judged = self.work.judge(self.model, self.places.pairs)
        record = {"judged": judged_facts(judged), "samples_s": time.perf_counter() - clock}
        write_text(self.run_folder / f"judged-{iteration}.jsonl", judged_lines(judged, self.work.user_tokens))
        if not judged.pairs:
            self.logger.warning(
                f"DPO4Rec: no pair differs by --reward_gap={self.config['reward_gap']}; the LLM stays as it is. Lower "
                "it, or raise --pair_users, --samples or --temperature."
            )
            return {**record, "align_s": 0.0}
        clock, reasoner = time.perf_counter(), self.work.reasoner
        pairs = self.work.text_pairs(judged)
        windows = reasoner.windows(pairs, self.config["alignment"])
        moves_draws = ("attention", "token_budget") if self.config["lora_dropout"] else ()
        keys = ALIGN_KEYS + moves_draws
        trains = {key: reasoner.config[key] for key in OF_POLICY}
        folder = stage_folder(self.config, "align", keys, [reasoner.author, reasoner.texts, trains])

        def aligned() -> dict[str, Any]:
            record, earlier = align(self.config, reasoner, self.protocol, windows, folder)
            self.count_earlier(*earlier)
            return record | {"run": self.run_name}

        stage, found = found_or_made(folder, aligned)
        if found:
            self.logger.info(f"DPO4Rec: reusing the aligned LLM in {folder}.")
            load_adapter(reasoner.llm, folder)
            self._count_found("alignment", folder, stage, stage["seconds"], stage["cpu_seconds"])
        self.counted.add(folder)
        self.facts["found"] += stage["found"]
        return {**record, "align_s": time.perf_counter() - clock, "align": stage, "adapter": str(folder)}

    def _policy_of(self, records: list[dict[str, Any]], iteration: int) -> None:
        """The LLM that wrote an iteration's texts: that of the last alignment before it, or the untuned one."""
        adapters = [r["adapter"] for r in records[:iteration] if "adapter" in r]
        if adapters:
            load_adapter(self.work.reasoner.llm, Path(adapters[-1]))
        else:
            set_adapter_state(self.work.reasoner.llm, self.untuned)
