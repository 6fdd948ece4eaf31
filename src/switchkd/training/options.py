"""The training options that this package adds to transformers' own, without importing those."""

import math
from dataclasses import dataclass, field, fields, make_dataclass, replace
from typing import Any

from switchkd.data_options import HELP as DATA_HELP
from switchkd.errors import UserError, check_choice, check_count, check_loss_temperature, check_warping
from switchkd.methods import METHODS
from switchkd.objective_names import OBJECTIVES, check_objective_name
from switchkd.policy_options import POLICY_OPTIONS

_DATA_HELP = {name: f"{text[0].upper()}{text[1:]}." for name, text in DATA_HELP.items()}


def _policy_field(name: str) -> tuple[str, Any, Any]:
    """The field of a policy's option: its type or None, which takes the method's own value."""
    option = POLICY_OPTIONS[name]
    methods = [method for method in METHODS.values() if name in method.policy_options]
    default = {method.name: method.default_options(length_limit=None)[name] for method in methods}
    help = replace(option, default=default).help_text("max_completion_length")
    return name, option.kind | None, field(default=None, metadata={"help": help})


#: The options of all policies as fields, made from their table.
PolicyFields: Any = make_dataclass("PolicyFields", [_policy_field(name) for name in POLICY_OPTIONS])


@dataclass
class DistillationOptions(PolicyFields):  # type: ignore[misc]
    """What `SwitchConfig` has beyond `transformers.TrainingArguments`, and what it gives another default.

    Options that are None take the method's own value.
    """

    # As in TrainingArguments, but with values that suit distillation runs of a few hundred steps.
    logging_steps: float = field(default=10, metadata={"help": "Log every this many optimizer steps."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Kept False: the trainer needs every column that data preparation made."}
    )

    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Kept False: a loss that is nan must not be logged as 0."}
    )

    method: str = field(default="switch", metadata={"help": f"One of {', '.join(METHODS)}."})
    policy: str | None = field(
        default=None,
        metadata={
            "help": "Who writes the rolled-out text instead of the method's own policy: module:Class, "
            "path/to/file.py:Class, or the name of a policy."
        },
    )
    policy_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options of that policy, or of the method's; JSON on the command line."}
    )
    teacher_model_name_or_path: str | None = field(default=None, metadata={"help": "Teacher: folder or hub id."})
    teacher_model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the teacher on the hub."}
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run code that comes with a model or tokenizer; only for sources you trust."},
    )
    allow_pickled_weights: bool = field(
        default=False,
        metadata={"help": "Read weights that are not in safetensors (.bin); only from sources you trust."},
    )
    tokenizer_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keyword arguments of from_pretrained for the tokenizers, JSON on the command line."},
    )
    divergence: str | None = field(
        default=None,
        metadata={"help": f"What is learned: one of {', '.join(OBJECTIVES)}. Default: the method's."},
    )
    teacher_weight: float | None = field(
        default=None, metadata={"help": "Teacher weight of generalized_jsd, in (0, 1); TRL's beta."}
    )
    skew: float | None = field(default=None, metadata={"help": "Skew of skewed_*_kl, in [0, 1)."})
    head_mass: float | None = field(
        default=None, metadata={"help": "Share of the teacher's mass that is the head of adaptive_kl, in (0, 1)."}
    )
    loss_temperature: float = field(
        default=1.0, metadata={"help": "Divides both models' logits in the divergence, > 0. Not the sampling one."}
    )
    on_policy_fraction: float | None = field(
        default=None,
        metadata={
            "help": "Share of optimizer steps trained on rolled-out text, in [0, 1]; TRL's lmbda. For distillm the "
            "starting value."
        },
    )
    clip_range: float | None = field(
        default=None,
        metadata={"help": "minillm: importance weights are clipped to [1 - x, 1 + x]; 0: off. Default 0.2."},
    )
    replay_capacity: int | None = field(
        default=None, metadata={"help": "distillm: number of rows of past rollouts that are kept. Default 1000."}
    )
    teacher_text_file: str | None = field(
        default=None,
        metadata={"help": "seqkd: JSONL of the teacher's answers, created or resumed. Default: in output_dir."},
    )
    ce_weight: float = field(
        default=0.0, metadata={"help": "Adds this times the cross-entropy on steps that train on dataset answers."}
    )
    lm_weight: float = field(
        default=0.0, metadata={"help": "Adds this times the cross-entropy on a data set of plain text to every step."}
    )
    student_token_weight: float = field(
        default=1.0, metadata={"help": "Multiplies the loss of rolled-out tokens that the student wrote, >= 0."}
    )
    teacher_token_weight: float = field(
        default=1.0, metadata={"help": "Multiplies the loss of rolled-out tokens that the teacher wrote, >= 0."}
    )

    target_teacher_share: float | None = field(
        default=None,
        metadata={
            "help": "Keep the teacher's share of rolled-out tokens here by moving the threshold, in (0, 1). Default: "
            "0.5 where no initial_threshold is given either."
        },
    )
    columns: dict[str, str] | str | None = field(default=None, metadata={"help": _DATA_HELP["columns"]})
    template: str = field(default="auto", metadata={"help": _DATA_HELP["template"]})
    supervise: str = field(default="last", metadata={"help": _DATA_HELP["supervise"]})
    chat_template_path: str | None = field(default=None, metadata={"help": _DATA_HELP["chat_template_path"]})
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": _DATA_HELP["chat_template_kwargs"]}
    )
    split_special_tokens: bool = field(default=True, metadata={"help": _DATA_HELP["split_special_tokens"]})
    max_prompt_length: int = field(
        default=256, metadata={"help": "Longer prompts are dropped and counted, never cut. Tokens."}
    )
    max_completion_length: int = field(
        default=256, metadata={"help": "Length limit of rollouts; longer dataset answers are cut. Tokens."}
    )
    truncation_start: float | None = field(
        default=None,
        metadata={
            "help": "Length limit of rollouts at the start of training, as a share of max_completion_length, in "
            "(0, 1]. Default: 0.1 for truncated, 1 for all others."
        },
    )
    truncation_warmup: float = field(
        default=0.5,
        metadata={
            "help": "Share of the training over which that limit grows linearly to max_completion_length, > 0; inf: "
            "it stays."
        },
    )
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature of rollouts; 0 is greedy."})
    top_k: int = field(default=0, metadata={"help": "Rollouts keep the k most likely ids; 0 keeps all."})
    top_p: float = field(default=1.0, metadata={"help": "Rollouts keep the most likely ids up to this mass."})
    draft_length: str = field(
        default="auto", metadata={"help": 'Tokens drafted before the teacher checks them: "auto" or a number.'}
    )

    rollout_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Rows decoded at once; bounds memory and changes no text. Default: as many as fit into the memory "
            "that training one micro-batch takes."
        },
    )
    cuda_graphs: bool = field(
        default=False,
        metadata={
            "help": "Write rollouts with static shapes, on a GPU through CUDA graphs, which keep their memory between "
            "steps. It changes no text. Never run on a GPU by us; on a CPU it is slower."
        },
    )
    rollout_copy: str = field(
        default="auto",
        metadata={
            "help": "Rollouts by a copy of the student in inference precision, renewed every step, adapters merged: "
            "auto (where the student is sharded, trains under autocast or has adapters), always, never."
        },
    )
    rollout_dtype: str | None = field(
        default=None,
        metadata={
            "help": "Precision of that copy: float32, bfloat16, float16. Default: that of autocast, else the student's."
        },
    )
    offload_rollout_copy: bool = field(
        default=False, metadata={"help": "Keep that copy in main memory between rollouts. GPU only."}
    )
    rollout_engine: str = field(
        default="transformers",
        metadata={"help": "What writes rolled-out text: transformers, or vllm in a process of its own (docs/vllm.md)."},
    )
    vllm_mode: str = field(
        default="colocate",
        metadata={"help": "colocate: vLLM on this machine, started here; server: one that you have started."},
    )
    vllm_server_host: str = field(default="localhost", metadata={"help": "Where that server runs."})
    vllm_server_port: int = field(default=8000, metadata={"help": "The port of that server."})
    vllm_python: str | None = field(
        default=None, metadata={"help": "Python of an environment with vLLM. Default: the one that trains."}
    )
    vllm_gpu_memory_utilization: float = field(
        default=0.3, metadata={"help": "Share of a GPU's memory that vLLM takes, in (0, 1]. GPU only."}
    )
    vllm_tensor_parallel_size: int = field(
        default=1, metadata={"help": "Over how many GPUs vLLM splits each layer of both models."}
    )
    vllm_enable_sleep_mode: bool = field(
        default=False, metadata={"help": "vLLM gives its memory back between rollouts. GPU only."}
    )

    reuse_teacher_hidden: bool = field(
        default=True,
        metadata={"help": "Keep the teacher's states of a rollout for the loss instead of another teacher pass."},
    )
    teacher_hidden_dtype: str | None = field(
        default=None, metadata={"help": "Precision of the kept states: float32, bfloat16. Default: the teacher's."}
    )
    offload_teacher_hidden: bool = field(
        default=False, metadata={"help": "Keep those states in main memory until their micro-batch. GPU only."}
    )
    offload_teacher: bool = field(
        default=False, metadata={"help": "Keep the teacher in main memory between uses. GPU only."}
    )
    teacher_sharding: str = field(
        default="none",
        metadata={
            "help": "Spread the teacher's weights over the processes: none, fsdp2. Then all processes make its passes "
            "together."
        },
    )
    eval_rouge_l_samples: int = field(
        default=0,
        metadata={"help": "Prompts answered at each evaluation to log eval_rouge_l; 0: off."},
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Set the student's dropout to 0 while it trains."})
    log_completions: bool = field(
        default=False,
        metadata={"help": "Append a few rollouts to completions.jsonl at every log; a terminal shows them."},
    )
    num_completions_to_log: int = field(default=4, metadata={"help": "Number of rollouts that log_completions keeps."})
    allow_other_inputs: bool = field(
        default=False,
        metadata={"help": "Go on from a checkpoint with other data or another teacher than it was trained with."},
    )
    max_skipped_steps: int = field(
        default=3,
        metadata={
            "help": "A step whose loss or gradient is nan or inf does not update the student; its rows are kept in "
            "skipped_steps.jsonl. The run ends when it is more steps than this."
        },
    )
    log_top_tokens: int = field(
        default=0,
        metadata={"help": "Also log both models' K likeliest tokens at each token of those rollouts; 0: off."},
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keyword arguments of from_pretrained for the student, JSON on the command line."},
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keyword arguments of from_pretrained for the teacher, JSON on the command line."},
    )

    def check_ranges(self) -> None:
        """Refuse the first of these options that lies outside its range.

        Raises:
            UserError: Names the option and the range.
        """
        if self.divergence is not None:
            check_objective_name(self.divergence)
        check_loss_temperature(self.loss_temperature)
        for name in ("max_prompt_length", "max_completion_length", "num_completions_to_log"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in (
            "ce_weight",
            "lm_weight",
            "student_token_weight",
            "teacher_token_weight",
            "eval_rouge_l_samples",
            "log_top_tokens",
            "max_skipped_steps",
            "clip_range",
            "replay_capacity",
        ):
            value = getattr(self, name)
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise UserError(f"{name} must be a finite number >= 0, got {value}")
        check_choice("teacher_sharding", self.teacher_sharding, ("none", "fsdp2"))
        check_choice("rollout_engine", self.rollout_engine, ("transformers", "vllm"))
        check_choice("vllm_mode", self.vllm_mode, ("colocate", "server"))
        if not 0.0 < self.vllm_gpu_memory_utilization <= 1.0:
            raise UserError(f"vllm_gpu_memory_utilization must lie in (0, 1], got {self.vllm_gpu_memory_utilization}")
        check_count("vllm_tensor_parallel_size", self.vllm_tensor_parallel_size, 1)
        if self.rollout_batch_size is not None and self.rollout_batch_size < 1:
            raise UserError(f"rollout_batch_size must be >= 1, got {self.rollout_batch_size}")
        if self.on_policy_fraction is not None and not 0.0 <= self.on_policy_fraction <= 1.0:
            raise UserError(f"on_policy_fraction must lie in [0, 1], got {self.on_policy_fraction}")
        if self.truncation_start is not None and not 0.0 < self.truncation_start <= 1.0:
            raise UserError(f"truncation_start must lie in (0, 1], got {self.truncation_start}")
        if not self.truncation_warmup > 0.0:
            raise UserError(f"truncation_warmup must be > 0, a share of the training, got {self.truncation_warmup}")
        if self.target_teacher_share is not None and not 0.0 < self.target_teacher_share < 1.0:
            raise UserError(f"target_teacher_share must lie in (0, 1), got {self.target_teacher_share}")
        for name in ("teacher_hidden_dtype", "rollout_dtype"):
            if getattr(self, name) not in (None, "float32", "bfloat16", "float16"):
                raise UserError(f"{name} must be float32, bfloat16 or float16, got {getattr(self, name)!r}")
        if self.rollout_copy not in ("auto", "always", "never"):
            raise UserError(f"rollout_copy must be auto, always or never, got {self.rollout_copy!r}")
        self.draft_length = str(self.draft_length)
        if self.draft_length != "auto" and not (self.draft_length.isdecimal() and int(self.draft_length) >= 1):
            raise UserError(f'draft_length must be "auto" or an integer >= 1, got {self.draft_length!r}')
        check_warping(self.temperature, self.top_k, self.top_p)


def own_fields() -> list[str]:
    """Return the names of the options that this package adds, or gives another default."""
    return [option.name for option in fields(DistillationOptions)]
