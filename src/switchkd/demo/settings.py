"""What the demo trains: sizes, lengths and the options of its five runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from switchkd.compare.plan import TRAIN_DEFAULTS, plan
from switchkd.compare.tasks import ONE_SET, WARM_START, Task

#: Runs of the demo and the folders that their models end up in.
MODELS = {
    "teacher": "teacher",
    WARM_START: "student_warm_start",
    "SFT": "student_sft",
    "student only": "student_only",
    "SWITCH": "student_switch",
}


@dataclass(frozen=True)
class DemoSettings:
    """Sizes and lengths of the demo; the defaults take about two minutes on one CPU core.

    The student is small and trained close to what supervised training can reach. From there SFT, distillation on the
    student's text alone, and SWITCH get the same prompts, steps, batches, learning rate and schedule. The two
    distillations have one objective, the forward KL on rolled-out text alone: the writer is all that differs.
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
    teacher_share: float = 0.5
    max_prompt_length: int = 48
    max_completion_length: int = 56
    decoding_seeds: tuple[int, ...] = (10, 20, 30)


def demo_tasks(folder: Path, seed: int, settings: DemoSettings) -> list[Task]:
    """Return the runs in order: teacher, warm start, and what is compared.

    Args:
        folder: Folder of the demo, with `data` and `tokenizer`.
        seed: Training seed.
        settings: Sizes.
    """
    evaluate = {
        "dataset_name": str(folder / "data" / "test.jsonl"),
        "decoding_seeds": list(settings.decoding_seeds),
        "max_prompt_length": settings.max_prompt_length,
        "max_completion_length": settings.max_completion_length,
        "batch_size": settings.test_records,
    }
    shared = {
        "dataset_name": str(folder / "data" / "train.jsonl"),
        "per_device_train_batch_size": settings.batch_size,
        "weight_decay": 0.01,
        "max_prompt_length": settings.max_prompt_length,
        "use_cpu": "yes",
        "dataloader_pin_memory": "no",
    }
    teacher = {
        **TRAIN_DEFAULTS,
        **shared,
        "method": "sft",
        "student_config": _shape(settings.teacher_width, settings.teacher_layers, settings.teacher_heads),
        "tokenizer_name_or_path": str(folder / "tokenizer"),
        "max_steps": settings.teacher_steps,
        "learning_rate": settings.teacher_learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": min(20, settings.teacher_steps // 4),
        "adam_beta2": 0.95,
        "max_completion_length": 128,
        "logging_steps": max(settings.teacher_steps // 5, 1),
        "seed": seed,
    }
    on_policy = {
        "teacher_model_name_or_path": str(folder / MODELS["teacher"]),
        "divergence": "forward_kl",
        "on_policy_fraction": 1.0,
    }
    student = {
        "student_config": _shape(settings.student_width, settings.student_layers, settings.student_heads),
        "tokenizer_name_or_path": str(folder / "tokenizer"),
    }
    compared = plan(
        output_dir=folder / "runs",
        seeds=[seed],
        train={
            **shared,
            "max_steps": settings.distillation_steps,
            "learning_rate": settings.distillation_learning_rate,
            "lr_scheduler_type": "linear",
            "max_completion_length": settings.max_completion_length,
            "logging_steps": max(settings.distillation_steps // 5, 1),
        },
        students={"": student},
        warm_start={
            "max_steps": settings.warm_start_steps,
            "learning_rate": settings.warm_start_learning_rate,
            "lr_scheduler_type": "constant_with_warmup",
            "warmup_steps": min(20, settings.warm_start_steps // 4),
            "max_completion_length": 128,
            "logging_steps": max(settings.warm_start_steps // 5, 1),
        },
        runs={
            "SFT": {"method": "sft"},
            "student only": {"method": "opd", **on_policy},
            "SWITCH": {
                "method": "switch",
                "target_teacher_share": settings.teacher_share,
                # "auto" follows the clock, and with it the last digits of what is learned; a demo repeats its figures.
                "draft_length": "4",
                **on_policy,
            },
        },
        evaluate=evaluate,
    )
    return [Task("", "teacher", seed, folder / "runs" / "teacher", teacher, {ONE_SET: evaluate}), *compared]


def _shape(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "initializer_range": 0.06,
    }
