"""`SwitchConfig`: transformers' TrainingArguments plus what teacher-in-the-loop distillation adds."""

import copy
import os
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import TrainingArguments

from switchkd.cli.run_folder import without_secrets
from switchkd.data_options import SUPERVISE, TEMPLATES, parse_columns
from switchkd.errors import UserError, check_choice, json_object
from switchkd.other_names import refuse_unknown
from switchkd.training.options import DistillationOptions
from switchkd.training.ranges import check_training_ranges

#: Own fields that are dicts, and JSON on the command line.
JSON_FIELDS = (
    *("model_init_kwargs", "teacher_model_init_kwargs", "tokenizer_kwargs", "chat_template_kwargs"),
    "policy_kwargs",
)


@dataclass
class SwitchConfig(DistillationOptions, TrainingArguments):
    """Training options; everything of `transformers.TrainingArguments` is here too.

    Options that are None take the method's own value. An option that the chosen method does not use is refused, not
    ignored. The values of the SWITCH paper for `initial_threshold`, `final_ratio` and `horizon` are not published:
    the defaults are chosen here.
    """

    # Lets the command line read JSON for these, as TrainingArguments does for its own.
    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, *JSON_FIELDS]

    def __new__(cls, *args: Any, **kwargs: Any) -> "SwitchConfig":
        """Refuse unknown names with what to write instead, which the generated `__init__` cannot know.

        Raises:
            TypeError: Names each of them.
        """
        refuse_unknown(cls.__name__, kwargs, [option.name for option in fields(cls) if option.init])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name in JSON_FIELDS:
            if getattr(self, name) is None:
                continue
            setattr(self, name, json_object(name, getattr(self, name)))
            if "tp_plan" in getattr(self, name):
                raise UserError(
                    f"{name}: tp_plan splits a model over processes that read the same text, and here each process "
                    "writes its own; load it in 8 or 4 bits, or give one process several GPUs with device_map"
                )
        check_training_ranges(self)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
            # Said to accelerate: without it every one of several processes on CPUs would train alone.
            self.use_cpu = True
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
        self.check_ranges()

    def to_dict(self) -> dict[str, Any]:
        """Return the options as JSON has them, with access tokens blacked out wherever they stand."""
        values: dict[str, Any] = super().to_dict()  # type: ignore[no-untyped-call]
        return {
            name: without_secrets(value) if isinstance(value, dict | str) else value for name, value in values.items()
        }

    def without_tokens(self) -> "SwitchConfig":
        """Return a copy to be saved: access tokens are blacked out, that of the hub is left out."""
        copied = copy.copy(self)
        for name, value in vars(self).items():
            if type(value) in (dict, str):  # enums of transformers are strings too
                setattr(copied, name, without_secrets(value))
        copied.hub_token = None
        return copied

    def options_set(self, *names: str) -> dict[str, Any]:
        """Return the named options that are not None."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}
