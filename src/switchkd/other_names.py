"""What users of TRL type by habit: the name it has here, or why there is none; and the nearest name to a mistyped one.

Files, flags and keyword arguments are all looked up in these tables; docs/from_trl.md is written from them, too.
"""

import difflib
from collections.abc import Iterable
from typing import Any

#: Name elsewhere -> what to write here instead.
OTHER_NAMES = {
    # TRL: GKDConfig, DistillationConfig
    "lmbda": "on_policy_fraction",
    "beta": "divergence generalized_jsd with teacher_weight (beta 0 is divergence forward_kl, beta 1 is reverse_kl)",
    "seq_kd": "method seqkd",
    "loss_type": "divergence",
    "max_new_tokens": "max_completion_length",
    "max_length": "max_prompt_length and max_completion_length",
    "max_seq_length": "max_prompt_length and max_completion_length",
    "num_completions_to_print": "num_completions_to_log",
    "generation_kwargs": "temperature, top_k and top_p",
    "dataset_text_field": "columns",
    "assistant_only_loss": "supervise",
    # TRL: arguments of trainers
    "tokenizer": "processing_class",
    "teacher": "teacher_model",
    "ref_model": "teacher_model",
    "student_model": "model",
    # elsewhere
    "torch_dtype": "dtype",
    "revision": "model_revision",
    "num_prompts": "max_samples",
    "num_samples": "max_samples",
    "teacher_model": "teacher_model_name_or_path",
    "teacher_model_name": "teacher_model_name_or_path",
    "student_model_name_or_path": "model_name_or_path",
    "model": "model_name_or_path",
    "model_name": "model_name_or_path",
    "dataset": "dataset_name",
    "train_file": "dataset_name",
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "threshold": "initial_threshold",
    "tau": "initial_threshold",
    "teacher_share": "target_teacher_share",
}

# TRL's own defaults, and values with which an option does there what always happens here.
_OFF: tuple[Any, ...] = (None, False)
#: Options of TRL that have no counterpart here -> the values that change nothing, or None for every value.
WITHOUT_MEANING: dict[str, tuple[Any, ...] | None] = {
    "use_vllm": _OFF,
    "packing": _OFF,
    "eval_packing": _OFF,
    "padding_free": _OFF,
    "activation_offloading": _OFF,
    "seq_kd": _OFF,
    "log_unique_prompts": _OFF,
    "use_dora": _OFF,
    "ignore_bias_buffers": _OFF,
    "min_p": (None, 0, 0.0),
    "repetition_penalty": (None, 1, 1.0),
    "completion_only_loss": (None, True),
    "shuffle_dataset": (None, True),
    "generation_kwargs": (None,),
    "cache_implementation": (None,),
    "max_tool_calling_iterations": (None,),
    "pad_to_multiple_of": (None, "auto"),
    "router_aux_loss_coef": (None, 0, 0.0),
    "dataset_kwargs": (None,),
    "eos_token": (None,),
    "pad_token": (None,),
    "lora_target_parameters": (None,),
    "lora_task_type": ("CAUSAL_LM",),
    "truncation_mode": None,
    "packing_strategy": None,
    "dataset_num_proc": None,
    "ds3_gather_for_generation": None,
    **dict.fromkeys(
        (
            "vllm_model_impl",
            "vllm_structured_outputs_regex",
            "vllm_server_base_url",
            "vllm_server_timeout",
            "vllm_group_port",
            "vllm_max_model_length",
        )
    ),
}

#: Options of TRL that do something there that nothing does here -> why.
NOT_HERE = {
    "use_vllm": "rollout_engine vllm writes rollouts on vLLM here, see docs/vllm.md",
    "packing": "rows are not packed here; micro-batches are padded to their longest row",
    "use_dora": "transformers loads DoRA adapters without their magnitudes; use LoRA",
    "min_p": "use top_p or top_k",
    "repetition_penalty": "text is sampled from the models' own distributions, which is what the policies compare",
    "completion_only_loss": "prompts are never trained on; use method sft and plain text through lm_dataset_name",
    "eos_token": "set it in the tokenizer that is saved with the student",
    "pad_token": "set it in the tokenizer that is saved with the student",
}

#: How alike a name must be before it is suggested, in [0, 1]: `metod` and `method` are, `model_revision` and
#: `hub_revision` are not.
LEAST_LIKENESS = 0.8


def changes_nothing(name: str, value: Any) -> bool:
    """Return whether an option that does not exist here has a value with which it would change nothing."""
    if name not in WITHOUT_MEANING:
        return False
    values = WITHOUT_MEANING[name]
    return values is None or any(value is other or (value == other and type(value) is not bool) for other in values)


def way_out(name: str, valid: Iterable[str]) -> str:
    """Return what to write instead of an unknown name; nothing where that is not known.

    Args:
        name: As it was given.
        valid: All names that are valid there.
    """
    names = set(valid)
    other = OTHER_NAMES.get(name)
    if other is not None and (" " in other or other in names):
        return f"use {other}"
    if name in NOT_HERE:
        return NOT_HERE[name]
    if name in WITHOUT_MEANING:
        return "there is nothing like it here; remove it"
    near = similar_name(name, names)
    return f"did you mean {near!r}?" if near else ""


def refuse_unknown(what: str, given: Iterable[str], valid: Iterable[str]) -> None:
    """Refuse keyword arguments that do not exist.

    Args:
        what: The class that is called.
        given: Names of the arguments.
        valid: Names that it takes.

    Raises:
        TypeError: Names every unknown one, with what to write instead where that is known.
    """
    names = list(valid)
    unknown = [name for name in given if name not in names]
    if unknown:
        hints = [f"{name!r}{f' ({hint})' if (hint := way_out(name, names)) else ''}" for name in unknown]
        raise TypeError(f"{what} got unexpected keyword arguments: {', '.join(hints)}")


def similar_name(name: str, valid: Iterable[str]) -> str | None:
    """Return the most similar valid name, or None where none is similar; a half-typed name is like the whole one."""

    def likeness(other: str) -> float:
        whole = difflib.SequenceMatcher(None, name, other).ratio()
        begun = difflib.SequenceMatcher(None, name, other[: len(name) + 1]).ratio() if len(name) >= 4 else 0.0
        return max(whole, begun)

    best = max(sorted(valid), key=likeness, default=None)
    return best if best is not None and likeness(best) >= LEAST_LIKENESS else None
