"""How `switchkd train --help` is laid out: options by task and by method, the methods with a line each."""

import argparse
from collections.abc import Mapping
from typing import Any

from switchkd.methods import METHODS
from switchkd.policy_options import POLICY_OPTIONS

#: Task -> its options, in the order of the help. An option of this package that stands in none goes to the last.
TASKS: dict[str, tuple[str, ...]] = {
    "models": (
        *("model_name_or_path", "teacher_model_name_or_path", "tokenizer_name_or_path"),
        *("student_config", "student_layers", "dtype", "attn_implementation", "model_revision"),
        *("teacher_model_revision", "trust_remote_code", "allow_pickled_weights", "model_init_kwargs"),
        *(
            "teacher_model_init_kwargs",
            "tokenizer_kwargs",
            "load_in_4bit",
            "load_in_8bit",
            "bnb_4bit_quant_type",
            "use_bnb_nested_quant",
        ),
    ),
    "data": (
        *("dataset_name", "dataset_mixture", "dataset_config", "dataset_streaming", "dataset_train_split"),
        *("columns", "template", "supervise", "chat_template_path", "chat_template_kwargs", "split_special_tokens"),
        *("max_train_samples", "max_prompt_length", "max_completion_length", "lm_dataset_name"),
    ),
    "method": ("method", "policy", "policy_kwargs"),
    "rollouts": (
        *("on_policy_fraction", "target_teacher_share", "temperature", "top_k", "top_p", "truncation_start"),
        *("truncation_warmup", "draft_length", "rollout_batch_size"),
    ),
    "what is learned": (
        *("divergence", "teacher_weight", "skew", "head_mass", "loss_temperature", "ce_weight", "lm_weight"),
        *("student_token_weight", "teacher_token_weight"),
    ),
    "training (transformers.TrainingArguments)": (
        *("learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_steps"),
        *("per_device_train_batch_size", "gradient_accumulation_steps", "optim", "weight_decay", "max_grad_norm"),
        *("disable_dropout", "seed"),
    ),
    "LoRA": (
        *("use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_modules_to_save"),
        "use_rslora",
    ),
    "speed and memory": (
        *("bf16", "fp16", "gradient_checkpointing", "use_cpu", "dataloader_num_workers", "deepspeed"),
        *("rollout_copy", "rollout_dtype", "offload_rollout_copy"),
        *("reuse_teacher_hidden", "teacher_hidden_dtype", "offload_teacher_hidden", "offload_teacher"),
        *("teacher_sharding", "cuda_graphs"),
    ),
    "evaluation while training": (
        *("eval_strategy", "eval_steps", "eval_dataset_name", "dataset_test_split", "max_eval_samples"),
        *("per_device_eval_batch_size", "eval_rouge_l_samples", "load_best_model_at_end", "metric_for_best_model"),
    ),
    "saving and logging": (
        *("output_dir", "save_strategy", "save_steps", "save_total_limit", "resume_from_checkpoint", "push_to_hub"),
        *("allow_other_inputs", "max_skipped_steps"),
        *("hub_model_id", "logging_steps", "report_to", "run_name", "log_completions", "num_completions_to_log"),
        "log_top_tokens",
    ),
}
#: Options of one method that are no option of its policy.
OF_METHOD = {"teacher_text_file": "seqkd", "clip_range": "minillm", "replay_capacity": "distillm"}

HELP = {
    "method": "One of the methods above.",
    "lr_scheduler_type": "Schedule of the learning rate: {choices}.",
    "warmup_steps": "Steps of linear warm-up; below 1: a share of the training.",
    "optim": "Optimizer of transformers, e.g. adamw_torch, adafactor, paged_adamw_8bit.",
    "num_train_epochs": "Passes over the training data.",
    "max_steps": "Number of optimizer steps; overrides num_train_epochs where it is > 0.",
    "per_device_train_batch_size": "Rows of a micro-batch.",
    "per_device_eval_batch_size": "Rows of a batch of the evaluation.",
    "gradient_accumulation_steps": "Micro-batches per optimizer step.",
    "max_grad_norm": "Gradients are scaled down to this norm.",
    "seed": "Seed of the training and its rollouts.",
    "bf16": "Train in bfloat16 mixed precision.",
    "fp16": "Train in float16 mixed precision.",
    "gradient_checkpointing": "Compute activations again in the backward pass: less memory, slower.",
    "use_cpu": "Train on the CPU even where there is a GPU.",
    "dataloader_num_workers": "Processes that load data.",
    "deepspeed": "Config file of DeepSpeed (ZeRO-1, 2 and 3).",
    "eval_strategy": "When to evaluate: {choices}.",
    "eval_steps": "Steps between evaluations. Default: logging_steps.",
    "load_best_model_at_end": "Load and save the best checkpoint instead of the last.",
    "metric_for_best_model": "What is best: eval_loss, eval_cross_entropy or eval_rouge_l. Default: eval_loss.",
    "output_dir": "Folder of the run. Default: the first free one of runs/train, runs/train-2, ...",
    "save_strategy": "When to save checkpoints: {choices}.",
    "save_steps": "Steps between checkpoints.",
    "save_total_limit": "Keep only the last N checkpoints.",
    "resume_from_checkpoint": "Resume from the last checkpoint in output_dir, or from the one that is named.",
    "push_to_hub": "Push the model to the hub when it is saved.",
    "hub_model_id": "Name of the model on the hub. Default: that of output_dir.",
    "report_to": "Further loggers: tensorboard, wandb, ... joined by commas, none or all.",
    "run_name": "Name of the run for those loggers.",
}


def arrange(parser: Any, actions: Mapping[str, Any], own: set[str], rare: Any) -> None:
    """Put the options of a parser into groups by task and by method.

    Args:
        parser: An empty parser, as far as its groups go.
        actions: Name -> the option.
        own: Names of the options that this package adds: each is listed.
        rare: The group for all others.
    """
    left = dict(actions)

    def group(title: str, names: tuple[str, ...], description: str | None = None) -> None:
        chosen = [left.pop(name) for name in names if name in left]
        if chosen:
            parser.add_argument_group(title, description)._group_actions.extend(chosen)

    # Further options of this package, that no task names: before the last task.
    known = {name for names in TASKS.values() for name in names} | POLICY_OPTIONS.keys() | OF_METHOD.keys()
    for title, names in TASKS.items():
        group(title, names, method_summaries() if title == "method" else None)
        if title == "rollouts":
            for method, options in by_method().items():
                group(f"only with --method {method}", options)
    group("more", tuple(name for name in actions if name in own - known))
    rare._group_actions.extend(left.values())
    for name, action in actions.items():
        choices = ", ".join(map(str, action.choices or ()))
        help = HELP.get(name, action.help or "").replace("{choices}", choices)
        # In these groups the heading names the methods.
        action.help = help.partition(": ")[2] if name in POLICY_OPTIONS or name in OF_METHOD else help or None
        action.metavar = metavar(action)


def by_method() -> dict[str, tuple[str, ...]]:
    """Return the methods that share a set of options -> these options; the name of the first stands for many."""
    found: dict[str, list[str]] = {}
    for option in (*POLICY_OPTIONS, *OF_METHOD):
        methods = [name for name, method in METHODS.items() if option in method.policy_options]
        methods = methods or [OF_METHOD[option]]
        found.setdefault(" | ".join(methods), []).append(option)
    return {methods: tuple(options) for methods, options in found.items()}


def method_summaries() -> str:
    """Return the methods, one line each: name and summary."""
    width = max(map(len, METHODS))
    return "\n".join(f"{name:<{width}}  {method.summary}" for name, method in METHODS.items())


def metavar(action: argparse.Action) -> str:
    """Return the placeholder of an option's value."""
    if action.nargs == "?" and action.const is True:
        return "BOOL"
    if action.choices is not None:
        return "NAME"
    kinds: dict[Any, str] = {int: "N", float: "X"}
    return kinds.get(action.type, "VALUE")
