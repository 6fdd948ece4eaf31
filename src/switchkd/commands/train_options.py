"""The options of `switchkd train`: which models and data, and everything of `SwitchConfig`."""

import argparse
import dataclasses
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from transformers.hf_argparser import HfArgumentParser, string_to_bool

from switchkd.cli.options import OptionsMixin, truth
from switchkd.commands.pair import DTYPES
from switchkd.commands.train_help import arrange
from switchkd.commands.training_arguments import UNREAD, training_arguments
from switchkd.data_options import parse_mixture
from switchkd.errors import UserError, check_choice, json_object
from switchkd.methods import get_method
from switchkd.training.options import DistillationOptions, own_fields

if TYPE_CHECKING:  # it takes seconds to import, which the help and a wrong option need not wait for
    from switchkd.training.config import SwitchConfig

# Of TrainingArguments, but with the one value that works here.
FIXED = {"remove_unused_columns", "logging_nan_inf_filter"}

LORA_DEFAULTS = {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05}


@dataclass
class RunArguments:
    """Which models and data a run takes; names as in TRL where TRL has them."""

    _argument_group_name: ClassVar[str] = "models and data"

    model_name_or_path: str | None = field(default=None, metadata={"help": "Student: folder or hub id."})
    tokenizer_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Tokenizer: folder or hub id. Default: that of the student, or else of the teacher."},
    )
    model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the student on the hub."}
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Weights of both models: auto (as saved), float32, bfloat16 or float16. Default: float32 for the "
            "student, the teacher as saved."
        },
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention of both models, e.g. sdpa, eager or flash_attention_2."}
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Load the student in 4 bits and train an adapter of it (QLoRA)."}
    )
    load_in_8bit: bool = field(default=False, metadata={"help": "The same in 8 bits."})
    bnb_4bit_quant_type: str = field(default="nf4", metadata={"help": "Kind of the 4 bits: nf4 or fp4."})
    use_bnb_nested_quant: bool = field(default=False, metadata={"help": "Quantise the scales of the 4 bits too."})
    student_config: str | None = field(
        default=None,
        metadata={
            "help": "A student with random weights: JSON of configuration values that replace those of "
            'model_name_or_path (or of the teacher); or with "model_type" a new one for the tokenizer\'s vocabulary.'
        },
    )
    student_layers: list[str] | None = field(
        default=None,
        metadata={
            "help": "A student made of these layers of model_name_or_path (or of the teacher), e.g. 0,4 or 0,-1."
        },
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Training data: file, folder or hub id."})
    dataset_mixture: list[str] | None = field(
        default=None,
        metadata={"help": "Several training sets instead, each as name=weight: a.jsonl=0.7 owner/name=0.3."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    dataset_streaming: bool = field(
        default=False, metadata={"help": "Read only the records that max_train_samples or max_steps ask for."}
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split of dataset_name to train on."})
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Data for the evaluation loss. Default: dataset_name, if a split is given."}
    )
    dataset_test_split: str | None = field(
        default=None, metadata={"help": "Split for the evaluation loss; a file has only one split."}
    )
    lm_dataset_name: str | None = field(
        default=None, metadata={"help": "Plain text for lm_weight, with a column text: file, folder or hub id."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first N training records."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only the first N evaluation records."})
    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter instead of all weights."})
    lora_r: int | None = field(default=None, metadata={"help": "Rank of the adapter. Default 16."})
    lora_alpha: int | None = field(default=None, metadata={"help": "Scale of the adapter. Default 32."})
    lora_dropout: float | None = field(default=None, metadata={"help": "Dropout of the adapter. Default 0.05."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale the adapter by lora_alpha over the root of r."})
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules that train in full beside the adapter, e.g. lm_head."}
    )
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules that get an adapter, or all-linear. Default: that of peft."}
    )


class TrainParser(OptionsMixin, HfArgumentParser):
    """The options of `RunArguments` and `SwitchConfig`."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Of transformers' 120 options `--help` lists those that many runs set.
        self.rare = argparse._ArgumentGroup(self, "all other options of transformers.TrainingArguments")

    def full_help(self) -> str:
        """Return the help with every option of `transformers.TrainingArguments`."""
        self._action_groups.insert(-1, self.rare)
        try:
            return self.format_help()
        finally:
            self._action_groups.remove(self.rare)


def parser(arguments: type | None = None) -> TrainParser:
    """Return the options of `switchkd train`.

    Args:
        arguments: `transformers.TrainingArguments`; its fields are read from its source if None.
    """
    result = TrainParser(
        prog="switchkd train",
        usage="switchkd train [--config FILE] [--option VALUE ...]",
        description="Distil a student. Every option of transformers.TrainingArguments is accepted; "
        "--help lists the common ones, --help-all every one.",
    )
    add_training_options(result, arguments)
    return result


def add_training_options(result: TrainParser, arguments: type | None = None) -> None:
    """Add every option of `RunArguments` and `SwitchConfig`, and what every command takes.

    Args:
        result: A parser without them.
        arguments: As `parser` takes it.
    """
    bases = (DistillationOptions, training_arguments() if arguments is None else arguments)
    others = set(result._actions)
    for options in (RunArguments, dataclasses.make_dataclass("Options", [], bases=bases)):
        result._add_dataclass_arguments(options)  # type: ignore[arg-type]
    # HfArgumentParser makes one group of a dataclass; help is easier to read by task.
    actions = {}
    for action in result._actions:
        if action.type is string_to_bool:
            action.type = truth  # transformers' own does not know on and off, which YAML has
        if action.dest == "resume_from_checkpoint":
            action.nargs, action.const = "?", "true"
        if action not in others and not action.option_strings[0].startswith("--no_"):
            actions[action.dest] = action
    result._action_groups.clear()
    arrange(result, actions, own={*own_fields(), *_fields(RunArguments)} - FIXED, rare=result.rare)
    result.add_shared_options(None)


def read_options(options: argparse.Namespace) -> tuple[RunArguments, "SwitchConfig"]:
    """Return the parsed options as the two objects they belong to.

    Raises:
        UserError: Options that are missing, do nothing, or do not fit together.
    """
    return check_options(options), _config(options)


def check_options(options: argparse.Namespace) -> RunArguments:
    """Return the models and data that a run takes; nothing heavy is imported for it.

    Raises:
        UserError: Options that are missing, out of range or do not fit together, or an unknown method.
    """
    run_args = RunArguments(**fields_of(RunArguments, options))
    _check(run_args, options.teacher_model_name_or_path)
    get_method(options.method)
    DistillationOptions(**fields_of(DistillationOptions, options)).check_ranges()
    return run_args


def _fields(dtype: Any) -> list[str]:
    return [item.name for item in dataclasses.fields(dtype) if item.init]


def fields_of(dtype: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Return the options that are fields of a dataclass, those that transformers chooses left out."""
    values = {name: getattr(options, name) for name in _fields(dtype)}
    return {name: value for name, value in values.items() if value is not UNREAD}


def _check(args: RunArguments, teacher: str | None) -> None:
    if args.student_config is not None and args.student_layers is not None:
        raise UserError("student_config and student_layers exclude each other; give only one")
    _check_data(args)
    made = args.student_config is not None or args.student_layers is not None
    if args.model_name_or_path is None and not made:
        raise UserError("give --model_name_or_path, the student; or make one with --student_config or --student_layers")
    if args.model_name_or_path is None and teacher is None:
        if args.student_layers is not None:
            raise UserError("student_layers needs a model to take layers from: --model_name_or_path or a teacher")
        if args.tokenizer_name_or_path is None:
            raise UserError("a student without a model or a teacher to follow needs --tokenizer_name_or_path")
    for name in ("max_train_samples", "max_eval_samples"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"{name} must be >= 1, got {value}")
    for name in (*LORA_DEFAULTS, "lora_target_modules", "lora_modules_to_save", "use_rslora"):
        if not args.use_peft and getattr(args, name) not in (None, False):
            raise UserError(f"{name} does nothing without use_peft; add --use_peft or remove it")
    check_choice("dtype", args.dtype or "auto", DTYPES)
    check_quantization(args)


def check_quantization(args: RunArguments) -> None:
    """Refuse options of quantisation that do nothing or do not go together.

    Raises:
        UserError: Names the option.
    """
    check_choice("bnb_4bit_quant_type", args.bnb_4bit_quant_type, ("nf4", "fp4"))
    for name, other in (("bnb_4bit_quant_type", "nf4"), ("use_bnb_nested_quant", False)):
        if getattr(args, name) != other and not args.load_in_4bit:
            raise UserError(f"{name} does nothing without load_in_4bit; add --load_in_4bit or remove it")
    for name in ("load_in_4bit", "load_in_8bit"):
        if getattr(args, name) and not args.use_peft:
            raise UserError(f"{name} trains an adapter only; add --use_peft")
        if getattr(args, name) and (args.student_config is not None or args.student_layers is not None):
            raise UserError(f"{name} needs a student that is loaded, by --model_name_or_path alone")


def _check_data(args: RunArguments) -> None:
    if args.dataset_mixture is not None:
        parse_mixture(args.dataset_mixture)
        for name in ("dataset_name", "dataset_config"):
            if getattr(args, name) is not None:
                raise UserError(f"dataset_mixture and {name} exclude each other; in a mixture write owner/name:config")
        if args.dataset_test_split is not None and args.eval_dataset_name is None:
            raise UserError("dataset_test_split with dataset_mixture needs --eval_dataset_name")
    elif args.dataset_name is None:
        raise UserError("give --dataset_name, the training data: a file, a folder or a hub id")


def _config(options: argparse.Namespace) -> "SwitchConfig":
    from transformers.integrations import get_reporting_integration_callbacks
    from transformers.utils import is_torch_bf16_gpu_available

    from switchkd.models.loading import default_device
    from switchkd.training.config import SwitchConfig

    values = fields_of(SwitchConfig, options)
    for name in SwitchConfig._VALID_DICT_FIELDS:
        if isinstance(values[name], str) and values[name][:1] in "{[":
            json_object(name, values[name])
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if values[name] < 1:
            raise UserError(f"{name} must be >= 1, got {values[name]}")
    if values["max_steps"] == 0 or (values["max_steps"] < 0 and not values["num_train_epochs"] > 0):
        raise UserError("nothing to train: give max_steps or num_train_epochs > 0")
    half = [name for name in ("bf16", "bf16_full_eval") if values[name]]
    if half and not values["use_cpu"] and not is_torch_bf16_gpu_available() and default_device().type == "cpu":
        warnings.warn(f"no GPU for {' and '.join(half)} here: this run computes in float32 on the CPU")
        values |= dict.fromkeys(half, False)
    if isinstance(values["report_to"], str) and "," in values["report_to"]:
        values["report_to"] = values["report_to"].split(",")
    try:
        config = SwitchConfig(**values)
        for reporter in get_reporting_integration_callbacks(config.report_to):
            reporter()
    except UserError:
        raise
    except (ValueError, ImportError, RuntimeError, TypeError) as error:
        raise UserError(f"these options do not fit together: {error}") from error
    return config
