"""What training refuses: arguments and launches that cannot act here, and a student whose weights are nan or inf."""

import inspect
import warnings
from typing import Any

from torch import nn
from transformers import Trainer

from switchkd.errors import UserError
from switchkd.models.forward import check_finite
from switchkd.other_names import refuse_unknown
from switchkd.training.config import SwitchConfig

# Arguments of `transformers.Trainer` that cannot act here, and what to use instead.
UNSUPPORTED = {
    "data_collator": "micro-batches are made from token ids after the rollout; change the data set instead",
    "compute_metrics": "evaluation never holds the predictions it would read; set eval_rouge_l_samples, or score with "
    "switchkd.evaluation.evaluate",
    "preprocess_logits_for_metrics": "evaluation never holds logits; set eval_rouge_l_samples",
    "compute_loss_func": "the loss is the method's; choose another divergence, or override compute_loss",
    "model_init": "give model, an object or a name; hyperparameter_search is not supported",
}

#: Arguments of `SwitchTrainer` that `transformers.Trainer` does not have.
OWN_ARGUMENTS = ("teacher_model", "peft_config", "lm_dataset", "policy", "quantization_config")


def refuse_arguments(args: Any, others: dict[str, Any]) -> None:
    """Refuse a configuration of another class, and arguments of `transformers.Trainer` that would do nothing.

    Raises:
        UserError: Names the argument and what to use instead.
        TypeError: An argument that neither trainer has.
    """
    valid = {*inspect.signature(Trainer).parameters, *OWN_ARGUMENTS}
    refuse_unknown("SwitchTrainer", others, valid)
    if not isinstance(args, SwitchConfig):
        raise UserError(
            f"args must be a SwitchConfig, got a {type(args).__name__}; SwitchConfig takes every option of "
            "TrainingArguments and those of the method"
        )
    for name, why in UNSUPPORTED.items():
        if others.get(name) is not None:
            raise UserError(f"{name} is not supported: {why}")


def warn_of_precision(args: Any) -> None:
    """Say what half precision does where there is no GPU for it.

    Args:
        args: A `SwitchConfig`.
    """
    if args.fp16 and args.device.type == "cpu":
        warnings.warn("fp16 on a CPU is slow, and gradients are not scaled against underflow: use bf16 or float32")


def refuse_launch(*, gpus: int, writes_text: bool, flat: bool) -> None:
    """Refuse launches in which rollouts would be split, or the student cannot be copied for them.

    Args:
        gpus: GPUs that this process uses.
        writes_text: Whether rollouts are made, before or during training.
        flat: Whether the student has flat parameters in the place of its own: FSDP1 without `use_orig_params`.

    Raises:
        UserError: Names the launch to use instead.
    """
    if gpus > 1:
        raise UserError(
            f"{gpus} GPUs in one process would split every rollout; start with `accelerate launch` or set "
            "CUDA_VISIBLE_DEVICES to one"
        )
    if writes_text and flat:
        raise UserError("rollouts under FSDP1 need fsdp_use_orig_params true; or use FSDP2 (fsdp_version: 2)")


def require_evaluation(method: str, data: Any, strategy: str) -> None:
    """Refuse a method that watches the evaluation loss where there is not exactly one such loss.

    Raises:
        UserError: Says what to give.
    """
    if data is None or isinstance(data, dict) or strategy == "no":
        raise UserError(
            f"method {method!r} watches the evaluation loss: give one evaluation data set and eval_strategy steps or "
            "epoch"
        )


def check_student(student: nn.Module, step: int, learning_rate: float) -> None:
    """Refuse to keep or save a student whose weights hold nan or inf.

    Raises:
        UserError: Names the step and the first tensor.
    """
    check_finite(student, "student", f"after step {step}; not saved: lower learning_rate (now {learning_rate:g})")
