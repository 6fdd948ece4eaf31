"""The demo: an instruction set, a teacher and a student trained from random weights, and what SWITCH gains."""

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, ProgressCallback, set_seed

from switchkd.cli.display import plot_summary, position_curves, rollout_text, table
from switchkd.cli.run_folder import RunFolder
from switchkd.data import prepare
from switchkd.demo.task import generate, save_splits, train_tokenizer
from switchkd.engine import roll_out
from switchkd.evaluation import EvaluationResult, evaluate, write_rows
from switchkd.evaluation.metrics import bucket_names, length_bucket, mean_and_std
from switchkd.policies import SwitchPolicy
from switchkd.rollout import Author
from switchkd.training.config import SwitchConfig
from switchkd.training.trainer import SwitchTrainer

Say = Callable[[str], None]


@dataclass(frozen=True)
class DemoSettings:
    """Sizes and lengths of the demo; the defaults take about two minutes on two CPU cores.

    The student is small and trained close to what supervised training can reach: this is where a teacher's help
    shows. From there SFT and SWITCH get the same records, steps, batches, learning rate and schedule. SWITCH rolls
    text out in every second step (`on_policy_fraction` 0.5) and compares with the teacher on dataset answers in the
    others.
    """

    teacher_width: int = 128
    teacher_layers: int = 3
    teacher_heads: int = 4
    student_width: int = 16
    student_layers: int = 2
    student_heads: int = 2
    records: int = 6000
    test_records: int = 240
    teacher_steps: int = 400
    warm_start_steps: int = 1200
    distillation_steps: int = 200
    batch_size: int = 32
    teacher_learning_rate: float = 3e-3
    warm_start_learning_rate: float = 5e-3
    distillation_learning_rate: float = 6e-3
    initial_threshold: float = 0.3
    on_policy_fraction: float = 0.5
    max_prompt_length: int = 48
    max_completion_length: int = 56
    evaluation_seeds: tuple[int, ...] = (10, 20, 30)


@dataclass(frozen=True)
class _Stage:
    """One training run of the demo."""

    folder: str
    method: str
    steps: int
    learning_rate: float
    schedule: str
    warmup_steps: int = 20
    adam_beta2: float = 0.999


def run_demo(
    output_dir: Path, *, seed: int = 0, say: Say = print, settings: DemoSettings | None = None
) -> dict[str, Any]:
    """Make data, tokenizer, teacher and student, distil with SWITCH, and return the scores.

    `output_dir` ends up with the data, the tokenizer and four models that every other command can use, the
    scored rows, `summary.json` and `summary.png`.

    Args:
        output_dir: Folder to write.
        seed: Seed of data, weights and sampling.
        say: Prints a line for people.
        settings: Sizes; the defaults if None.

    Returns:
        The content of `summary.json`.
    """
    settings = settings or DemoSettings()
    started = time.perf_counter()
    folder = RunFolder(str(output_dir), "demo")
    folder.make()
    with _one_thread():
        stages = _Stages(folder, settings, seed, say)
        results = stages.run()
    return _report(stages, results, time.perf_counter() - started)


class _Stages:
    """The steps of the demo; each leaves its model in the folder."""

    def __init__(self, folder: RunFolder, settings: DemoSettings, seed: int, say: Say) -> None:
        self.folder, self.settings, self.seed, self.say = folder, settings, seed, say
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = {}
        splits = generate(seed, train=settings.records, test=settings.test_records)
        save_splits(splits, folder.path / "data")
        self.tokenizer = train_tokenizer([row["prompt"] + row["completion"] for row in splits["train"]])
        lengths = {"max_prompt_length": settings.max_prompt_length, "max_completion_length": 128}
        prepared = {name: prepare(rows, self.tokenizer, **lengths)[0] for name, rows in splits.items()}
        self.data: Dataset = prepared["train"]
        self.test_data: Dataset = prepared["test"]
        self.teacher_share = math.nan
        answers = [len(ids) for ids in self.test_data["completion_ids"]]
        self.long_share = sum(length > 40 for length in answers) / len(answers)
        self.say(
            f"data: {len(self.data)} training and {len(self.test_data)} test instructions of "
            f"{len(set(splits['train']['kind']))} kinds, {self.long_share:.0%} of the answers longer than 40 tokens; "
            f"{len(self.tokenizer)} token ids"
        )

    def run(self) -> dict[str, EvaluationResult]:
        """Train and score everything; return the scores by model."""
        settings = self.settings
        teacher = self._fresh(settings.teacher_width, settings.teacher_layers, settings.teacher_heads)
        rate = settings.teacher_learning_rate
        self._train(teacher, _Stage("teacher", "sft", settings.teacher_steps, rate, "cosine", adam_beta2=0.95))
        self.results = {"teacher": self._score("teacher", teacher)}
        student = self._fresh(settings.student_width, settings.student_layers, settings.student_heads)
        self.say(f"sizes: teacher {teacher.num_parameters():,} parameters, student {student.num_parameters():,}")
        rate = settings.warm_start_learning_rate
        self._train(
            student, _Stage("student_warm_start", "sft", settings.warm_start_steps, rate, "constant_with_warmup")
        )
        self.results["student before"] = self._score("student before", student)
        for method, label in (("sft", "SFT"), ("switch", "SWITCH")):
            trained = copy.deepcopy(student)
            rate = settings.distillation_learning_rate
            stage = _Stage(f"student_{method}", method, settings.distillation_steps, rate, "linear", warmup_steps=0)
            self._train(trained, stage, teacher if method == "switch" else None)
            self.results[f"student after {label}"] = self._score(f"student after {label}", trained)
        self.curves = self._curves(student, teacher)
        return self.results

    def policy(self) -> SwitchPolicy:
        """The policy SWITCH trains with."""
        return SwitchPolicy(
            initial_threshold=self.settings.initial_threshold, horizon=self.settings.max_completion_length
        )

    def _fresh(self, width: int, layers: int, heads: int) -> LlamaForCausalLM:
        set_seed(self.seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(self.tokenizer),
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=heads,
                max_position_embeddings=256,
                tie_word_embeddings=True,
                initializer_range=0.06,
                bos_token_id=None,
                eos_token_id=self.tokenizer.eos_token_id,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        )

    def _train(self, model: Any, stage: _Stage, teacher: Any = None) -> None:
        started = time.perf_counter()
        settings = self.settings
        rollout: dict[str, Any] = {"max_completion_length": 128}
        if stage.method == "switch":
            rollout = {
                "initial_threshold": settings.initial_threshold,
                "on_policy_fraction": settings.on_policy_fraction,
                "max_completion_length": settings.max_completion_length,
                # "auto" follows the clock, and with it the last digits of what is learned; a demo gives the same
                # figures again.
                "draft_length": "4",
            }
        config = SwitchConfig(
            output_dir=str(self.folder.path / stage.folder),
            method=stage.method,
            max_steps=stage.steps,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=stage.learning_rate,
            lr_scheduler_type=stage.schedule,
            warmup_steps=min(stage.warmup_steps, stage.steps // 4),
            weight_decay=0.01,
            adam_beta2=stage.adam_beta2,
            max_prompt_length=settings.max_prompt_length,
            logging_steps=max(stage.steps // 5, 1),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            seed=self.seed,
            **rollout,
        )
        trainer = SwitchTrainer(
            model=model, teacher_model=teacher, args=config, train_dataset=self.data, processing_class=self.tokenizer
        )
        for callback in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(callback)
        trainer.train()
        trainer.save_model()
        logs = [{"stage": stage.folder, **entry} for entry in trainer.state.log_history if "loss" in entry]
        self.folder.append("metrics.jsonl", logs)
        shares = [entry["rollout/teacher_share"] for entry in logs if "rollout/teacher_share" in entry]
        shown = f", teacher wrote {sum(shares) / len(shares):.0%} of the rollouts" if shares else ""
        if shares:
            self.teacher_share = sum(shares) / len(shares)
        self.seconds[stage.folder] = time.perf_counter() - started
        self.say(
            f"{stage.folder.replace('_', ' ')}: {stage.steps} steps of {stage.method}, loss {logs[0]['loss']:.3f} -> "
            f"{logs[-1]['loss']:.3f}{shown}, {self.seconds[stage.folder]:.0f} s"
        )

    def _score(self, name: str, model: Any) -> EvaluationResult:
        started = time.perf_counter()
        result = evaluate(
            model,
            self.tokenizer,
            self.test_data,
            seeds=self.settings.evaluation_seeds,
            max_completion_length=self.settings.max_completion_length,
            batch_size=self.settings.test_records,
            progress=False,
        )
        write_rows(result, self.folder.path / f"rows_{name.replace(' ', '_').lower()}.jsonl")
        self.seconds[f"evaluate {name}"] = time.perf_counter() - started
        self.say(f"  ROUGE-L of {name}: {result.rouge_l:.1f} +- {result.rouge_l_std:.1f}")
        return result

    def _curves(self, student: Any, teacher: Any) -> dict[str, list[float]]:
        """How SWITCH runs along the text where its training begins, and one rollout to look at."""
        rows = min(64, len(self.data))
        rollout = roll_out(
            student,
            teacher,
            self.data["prompt_ids"][:rows],
            policy=self.policy(),
            max_new_tokens=self.settings.max_completion_length,
            seed=self.seed,
            eos_token_id=self.tokenizer.eos_token_id,
        )
        shares = (rollout.author == Author.TEACHER).sum(1) / rollout.completion_mask.sum(1)
        example = int((shares - 0.25).abs().argmin())
        self.example = rollout.to_dicts(self.tokenizer)[example]
        return position_curves([rollout], min_rows=max(rows // 8, 1))


def _report(stages: _Stages, results: dict[str, EvaluationResult], seconds: float) -> dict[str, Any]:
    folder, settings = stages.folder, stages.settings
    before, sft = results["student before"], results["student after SFT"]
    teacher, after = results["teacher"], results["student after SWITCH"]
    claims = {
        "teacher_rouge_l_at_least_90": teacher.rouge_l >= 90,
        "student_gains_at_least_5": after.rouge_l - before.rouge_l >= 5,
        "switch_at_least_sft": after.rouge_l >= sft.rouge_l,
    }
    summary = {
        "rouge_l_teacher": teacher.rouge_l,
        "rouge_l_student_before": before.rouge_l,
        "rouge_l_student_after": after.rouge_l,
        "rouge_l_sft_same_steps": sft.rouge_l,
        "rouge_l_std": {name: result.rouge_l_std for name, result in results.items()},
        "by_length": {name: result.by_length for name, result in results.items()},
        "exact_match": {name: result.exact_match for name, result in results.items()},
        "teacher_share": stages.teacher_share,
        "long_answers_share": stages.long_share,
        "claims": claims,
        "seed": stages.seed,
        "settings": asdict(settings),
        "stage_seconds": stages.seconds,
        "seconds": seconds,
    }
    scores = {
        label: _by_length(results[name])
        for label, name in (
            ("warm start", "student before"),
            ("SFT", "student after SFT"),
            ("SWITCH", "student after SWITCH"),
        )
    }
    plot_summary(folder.path / "summary.png", **stages.curves, scores=scores)
    folder.write_json("summary.json", summary)
    say = stages.say
    say("\nA rollout before distillation, the teacher's tokens in [brackets]:")
    say(rollout_text(stages.example, color=False))
    buckets = [bucket for bucket in bucket_names() if bucket in before.by_length]
    say(f"\nROUGE-L on {settings.test_records} held-out instructions, {len(settings.evaluation_seeds)} decoding seeds:")
    say(
        table(
            [
                [name, f"{result.rouge_l:.1f} +- {result.rouge_l_std:.1f}", f"{result.exact_match:.0f}%"]
                + [f"{result.by_length[bucket]['rouge_l']:.1f}" for bucket in buckets]
                for name, result in results.items()
            ],
            ["model", "ROUGE-L", "exact", *(f"{bucket} tokens" for bucket in buckets)],
        )
    )
    say(
        f"\nSWITCH gained {after.rouge_l - before.rouge_l:+.1f} over the warm start, plain SFT with as many steps "
        f"{sft.rouge_l - before.rouge_l:+.1f}; the teacher wrote {stages.teacher_share:.0%} of what was rolled out."
    )
    for claim, holds in claims.items():
        if not holds:
            say(f"DOES NOT HOLD in this run: {claim.replace('_', ' ')}")
    say(f"{seconds:.0f} s; models, data, summary.json and summary.png in {folder.path}")
    return summary


def _by_length(result: EvaluationResult) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation over the decoding seeds for each length of answer."""
    scores: dict[str, dict[int, list[float]]] = {}
    for row in result.rows:
        by_seed = scores.setdefault(length_bucket(row["reference_tokens"]), {})
        by_seed.setdefault(row["seed"], []).append(row["rouge_l"])
    return {
        bucket: mean_and_std([sum(values) / len(values) for values in scores[bucket].values()])
        for bucket in bucket_names()
        if bucket in scores
    }


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """One thread: on models this small a second one costs more waiting than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
