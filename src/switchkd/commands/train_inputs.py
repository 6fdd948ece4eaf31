"""What `switchkd train` is made of: keyword arguments of loading, the student, its adapter, the data."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers.trainer_utils import IntervalStrategy

from switchkd.cli.options import integers
from switchkd.commands.train_options import LORA_DEFAULTS, RunArguments
from switchkd.data import load_records
from switchkd.data.containers import Mixture, first_records
from switchkd.data_options import parse_mixture
from switchkd.errors import UserError, json_object
from switchkd.models.untrained import student_from_config, student_from_layers
from switchkd.training.config import SwitchConfig
from switchkd.training.resolve import resolve
from switchkd.training.setup import trusted


def set_init_kwargs(args: RunArguments, config: SwitchConfig) -> None:
    """Put the flags of loading into the keyword arguments of `from_pretrained`; what stands there already wins.

    As in TRL, `dtype` and `attn_implementation` hold for both models, `model_revision` for the student.
    """
    both = {"dtype": args.dtype, "attn_implementation": args.attn_implementation}
    both = {name: value for name, value in both.items() if value is not None}
    of_student = both | ({} if args.model_revision is None else {"revision": args.model_revision})
    if of_student:
        config.model_init_kwargs = of_student | _as_dict(config.model_init_kwargs)
    if both and config.teacher_model_name_or_path is not None and resolve(config).needs_teacher:
        config.teacher_model_init_kwargs = both | _as_dict(config.teacher_model_init_kwargs)


def _as_dict(value: dict[str, Any] | str | None) -> dict[str, Any]:
    assert not isinstance(value, str)  # SwitchConfig has read the JSON
    return value or {}


def make_student(args: RunArguments, config: SwitchConfig, source: str | None, tokenizer: Any) -> nn.Module | str:
    """Return the student: a name, or a model of random weights or of some layers.

    Args:
        args: Which student.
        config: Seed and keyword arguments of loading.
        source: Folder or hub id of the model that it is made from.
        tokenizer: The student's.

    Raises:
        UserError: It cannot be made.
    """
    kwargs = config.model_init_kwargs if isinstance(config.model_init_kwargs, dict) else None
    if args.student_config is not None:
        overrides = json_object("student_config", args.student_config)
        return student_from_config(overrides, base=source, tokenizer=tokenizer, seed=config.seed, init_kwargs=kwargs)
    if args.student_layers is not None:
        layers = integers(args.student_layers, "student_layers") or []
        return student_from_layers(str(source), layers, {**trusted(config), **(kwargs or {})})
    return str(args.model_name_or_path)


def load_datasets(args: RunArguments, config: SwitchConfig) -> tuple[Any, Any]:
    """Return training and evaluation records; None where there is nothing to evaluate on.

    Raises:
        UserError: A data set cannot be found or read, or the evaluation has none.
    """
    if args.dataset_streaming and args.max_train_samples is None and config.max_steps <= 0:
        raise UserError("dataset_streaming needs max_train_samples or max_steps: the number of records to take")
    train: Any
    if args.dataset_mixture is not None:
        weights = parse_mixture(args.dataset_mixture)
        train = Mixture({name: _train_records(name, args) for name in weights}, weights)
    else:
        train = _train_records(str(args.dataset_name), args)
    if args.eval_dataset_name is None and args.dataset_test_split is None:
        if config.eval_strategy != "no":
            strategy = IntervalStrategy(config.eval_strategy).value
            raise UserError(f"eval_strategy={strategy} needs --eval_dataset_name or --dataset_test_split")
        return train, None
    name = args.eval_dataset_name or str(args.dataset_name)
    if args.eval_dataset_name is None and Path(name).expanduser().is_file():
        raise UserError(f"{name} is a file, which has only one split; give --eval_dataset_name")
    configuration = args.dataset_config if args.eval_dataset_name is None else None
    records = load_records(name, split=args.dataset_test_split or "test", configuration=configuration)
    return train, first_records(records, args.max_eval_samples)


def _train_records(name: str, args: RunArguments) -> Any:
    records = load_records(
        name, split=args.dataset_train_split, configuration=args.dataset_config, streaming=args.dataset_streaming
    )
    return first_records(records, args.max_train_samples)


def lora_config(args: RunArguments) -> Any:
    """Return the configuration of the adapter.

    Raises:
        UserError: `peft` is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError:
        raise UserError("use_peft needs the peft package: pip install 'switchkd[peft]'") from None
    given = {
        name: getattr(args, name) if getattr(args, name) is not None else LORA_DEFAULTS[name] for name in LORA_DEFAULTS
    }
    modules: Any = args.lora_target_modules
    return LoraConfig(
        r=given["lora_r"],
        lora_alpha=given["lora_alpha"],
        lora_dropout=given["lora_dropout"],
        target_modules="all-linear" if modules == ["all-linear"] else modules,
        modules_to_save=args.lora_modules_to_save,
        use_rslora=args.use_rslora,
        task_type="CAUSAL_LM",
    )
