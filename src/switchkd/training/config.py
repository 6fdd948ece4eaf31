"""`SwitchConfig`: transformers' TrainingArguments plus what teacher-in-the-loop distillation adds."""

import json
import math
from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments

from switchkd.data_options import SUPERVISE, TEMPLATES, parse_columns
from switchkd.errors import UserError, check_choice
from switchkd.objective import check_loss_temperature
from switchkd.sampling import check_warping
from switchkd.training.options import DistillationOptions


@dataclass
class SwitchConfig(DistillationOptions, TrainingArguments):
    """Training options; everything of `transformers.TrainingArguments` is here too.

    Options that are None take the method's own value. An option that the chosen method does not use is refused, not
    ignored. The values of the SWITCH paper for `initial_threshold`, `final_ratio` and `horizon` are not published:
    the defaults are chosen here.
    """

    # Lets the command line read JSON for these, as TrainingArguments does for its own.
    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs", "teacher_model_init_kwargs"]

    def __post_init__(self) -> None:
        for name in ("model_init_kwargs", "teacher_model_init_kwargs"):
            setattr(self, name, _read_json_object(name, getattr(self, name)))
        super().__post_init__()  # type: ignore[no-untyped-call]
        if self.remove_unused_columns:
            raise UserError("remove_unused_columns must stay False: the trainer needs the prepared columns")
        if self.logging_nan_inf_filter:
            raise UserError("logging_nan_inf_filter must stay False: it would log a loss that is nan as 0")
        if self.label_smoothing_factor:
            raise UserError(f"label_smoothing_factor={self.label_smoothing_factor} does nothing here; remove it")
        self.columns = parse_columns(self.columns) or None
        check_choice("template", self.template, TEMPLATES)
        check_choice("supervise", self.supervise, SUPERVISE)
        self._check_own_ranges()

    def options_set(self, *names: str) -> dict[str, Any]:
        """Return the named options that are not None."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def _check_own_ranges(self) -> None:
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
            "clip_range",
            "replay_capacity",
        ):
            value = getattr(self, name)
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise UserError(f"{name} must be a finite number >= 0, got {value}")
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
        if self.teacher_hidden_dtype not in (None, "float32", "bfloat16", "float16"):
            raise UserError(
                f"teacher_hidden_dtype must be float32, bfloat16 or float16, got {self.teacher_hidden_dtype!r}"
            )
        self.draft_length = str(self.draft_length)
        if self.draft_length != "auto" and not (self.draft_length.isdecimal() and int(self.draft_length) >= 1):
            raise UserError(f'draft_length must be "auto" or an integer >= 1, got {self.draft_length!r}')
        try:
            check_warping(self.temperature, self.top_k, self.top_p)
        except ValueError as error:
            raise UserError(str(error)) from None


def _read_json_object(name: str, value: Any) -> dict[str, Any] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise UserError(f"{name} must be a JSON object, got {value!r}") from None
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{name} must be a JSON object, got {value!r}")
    return value
