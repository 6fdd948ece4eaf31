"""What `switchkd train` does once its options are read: data, student, trainer, files of the run, summary."""

import argparse
import dataclasses
import shlex
import time
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PrinterCallback, ProgressCallback
from transformers.trainer_utils import IntervalStrategy, get_last_checkpoint

from switchkd.cli.console import Console, quiet_libraries
from switchkd.cli.display import table
from switchkd.cli.options import integers
from switchkd.cli.run_folder import RunFolder, plain, read_config, without_secrets
from switchkd.commands.progress import RunCallback
from switchkd.commands.train_options import LORA_DEFAULTS, RunArguments, json_object, read_options
from switchkd.data import load_records
from switchkd.errors import UserError
from switchkd.models.loading import load_tokenizer
from switchkd.models.untrained import student_from_config, student_from_layers
from switchkd.rollout import MEASURED
from switchkd.training.card import Origin, changed_options, typed
from switchkd.training.config import SwitchConfig
from switchkd.training.options import own_fields
from switchkd.training.trainer import SwitchTrainer

# A resumed run may change these: its length, what it logs and saves, and how fast it reads.
RESUME_MAY_CHANGE = (
    "output_dir", "max_steps", "num_train_epochs", "report_to",
    "run_name", "project", "disable_tqdm", "num_completions_to_log", "push_to_hub", "per_device_eval_batch_size",
    "max_eval_samples", "dataset_test_split", "load_best_model_at_end", "metric_for_best_model", "greater_is_better",
    "skip_memory_metrics", "local_rank", "prediction_loss_only",
)  # fmt: skip
RESUME_MAY_CHANGE_PREFIXES = ("save_", "logging_", "log_", "eval_", "hub_", "dataloader_", "ddp_", "do_", "trackio_")


def train(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Train, save the model, and return what was reached."""
    folder = RunFolder(options.output_dir, "train")
    options.output_dir = str(folder.path)
    run_args, config = read_options(options)
    checkpoint = _checkpoint(config.resume_from_checkpoint, folder)
    if checkpoint is not None and options.overwrite_output_dir:
        raise UserError("resume_from_checkpoint and overwrite_output_dir exclude each other; remove one")
    # A run is resumed in its own folder, or from a checkpoint elsewhere in a new one.
    resumes = checkpoint is not None and Path(checkpoint).resolve().parent == folder.path.resolve()
    if not resumes:
        folder.check(overwrite=options.overwrite_output_dir)
        _keep_models(run_args, config, folder)

    quiet_libraries(options.verbose)
    if config.log_level == "passive" and not options.verbose:
        config.log_level = "error"  # the Trainer sets the level of transformers again
    trainer = _trainer(run_args, config, folder)
    trainer.origin = _origin(run_args, config)
    resolved = _resolved(run_args, trainer)
    if checkpoint is not None:
        _check_same_run(resolved, checkpoint)
    folder.claim(resolved, keep=resumes)
    for name, report in trainer.prepare_reports.items():
        console.say(f"{name} data: {report}")
    console.say(f"student: {_size(trainer.model)}")
    if trainer.teacher_model is not None:
        console.say(f"teacher: {_size(trainer.teacher_model)}")

    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(RunCallback(folder, show_bar=not config.disable_tqdm))
    started = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt:
        if get_last_checkpoint(str(folder.path)) is not None:
            console.progress(
                f"stopped at step {trainer.state.global_step}; continue with --resume_from_checkpoint true"
            )
        raise
    seconds = time.perf_counter() - started
    if trainer.eval_dataset is not None and config.eval_strategy == "no":
        trainer.evaluate()
    trainer.save_model()
    if config.push_to_hub:
        trainer.push_to_hub()
    summary = _summary(trainer, seconds)
    folder.write_json("summary.json", summary)
    if text := _table(trainer):
        console.say(f"\n{text}")
    console.say(f"\n{summary['steps']} steps in {seconds:.0f} s; model, config.yaml, metrics.jsonl in {folder.path}")
    return {**summary, "output_dir": str(folder.path)}


def _trainer(args: RunArguments, config: SwitchConfig, folder: RunFolder) -> SwitchTrainer:
    source = args.model_name_or_path or config.teacher_model_name_or_path
    tokenizer = load_tokenizer(str(args.tokenizer_name_or_path or source))
    train, evaluation = load_datasets(args, config)
    student = _student(args, config, source, tokenizer)
    peft_config = _peft_config(args) if args.use_peft else None
    folder.make()  # the Trainer would, with a traceback where it cannot
    try:
        return SwitchTrainer(
            model=student,
            args=config,
            train_dataset=train,
            eval_dataset=evaluation,
            processing_class=tokenizer,
            peft_config=peft_config,
            lm_dataset=load_records(args.lm_dataset_name) if args.lm_dataset_name is not None else None,
        )
    except UserError:
        raise
    except ValueError as error:
        # transformers, accelerate and peft refuse options with a ValueError; --verbose shows where.
        raise UserError(str(error)) from error


def _student(args: RunArguments, config: SwitchConfig, source: str | None, tokenizer: Any) -> nn.Module | str:
    kwargs = config.model_init_kwargs if isinstance(config.model_init_kwargs, dict) else None
    if args.student_config is not None:
        overrides = json_object("student_config", args.student_config)
        return student_from_config(overrides, base=source, tokenizer=tokenizer, seed=config.seed, init_kwargs=kwargs)
    if args.student_layers is not None:
        return student_from_layers(str(source), integers(args.student_layers, "student_layers") or [], kwargs)
    return str(args.model_name_or_path)


def load_datasets(args: RunArguments, config: SwitchConfig) -> tuple[Any, Any]:
    """Return training and evaluation records; None where there is nothing to evaluate on.

    Raises:
        UserError: A data set cannot be found or read, or the evaluation has none.
    """
    train = _first(load_records(str(args.dataset_name), split=args.dataset_train_split), args.max_train_samples)
    if args.eval_dataset_name is None and args.dataset_test_split is None:
        if config.eval_strategy != "no":
            strategy = IntervalStrategy(config.eval_strategy).value
            raise UserError(f"eval_strategy={strategy} needs --eval_dataset_name or --dataset_test_split")
        return train, None
    name = args.eval_dataset_name or str(args.dataset_name)
    if args.eval_dataset_name is None and Path(name).expanduser().is_file():
        raise UserError(f"{name} is a file, which has only one split; give --eval_dataset_name")
    return train, _first(load_records(name, split=args.dataset_test_split or "test"), args.max_eval_samples)


def _first(records: Any, limit: int | None) -> Any:
    return records if limit is None else records.select(range(min(limit, len(records))))


def _peft_config(args: RunArguments) -> Any:
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
        task_type="CAUSAL_LM",
    )


def _origin(args: RunArguments, config: SwitchConfig) -> Origin:
    """What the model card says of the run's inputs, as they were given; the command names every option that counts."""
    source, made = args.model_name_or_path or config.teacher_model_name_or_path, None
    if args.student_config is not None:
        of = f" of {source} with" if source is not None else ""
        # No weights of that model: it is not the base of this one.
        source, made = None, f"random weights, the configuration{of} {args.student_config}"
    elif args.student_layers is not None:
        made = f"layers {' '.join(args.student_layers)}"
    given = {
        option.name: value
        for option in dataclasses.fields(args)
        if (value := getattr(args, option.name)) not in (None, option.default)
    }
    given |= {"method": config.method, "teacher_model_name_or_path": config.teacher_model_name_or_path}
    flags = [
        f"--{name} {' '.join(map(shlex.quote, typed(value)))}"
        for name, value in {**given, **changed_options(config)}.items()
        if value is not None
    ]
    command = " \\\n  ".join(["switchkd train", *flags])
    return Origin(source, config.teacher_model_name_or_path, args.dataset_name, made, command)


def _keep_models(args: RunArguments, config: SwitchConfig, folder: RunFolder) -> None:
    """Overwriting a folder must not remove the model that the run starts from."""
    names = ("model_name_or_path", "tokenizer_name_or_path")
    models = {name: getattr(args, name) for name in names}
    for name, value in (models | {"teacher_model_name_or_path": config.teacher_model_name_or_path}).items():
        if value is not None and folder.path.resolve() in (Path(value).resolve(), *Path(value).resolve().parents):
            raise UserError(f"output_dir {folder.path} holds {name}; give another folder")


def _checkpoint(wanted: str | None, folder: RunFolder) -> str | None:
    if wanted is None or wanted.lower() == "false":
        return None
    if wanted.lower() == "true":
        last = get_last_checkpoint(str(folder.path)) if folder.path.is_dir() else None
        if last is None:
            raise UserError(
                f"resume_from_checkpoint: {folder.path} holds no checkpoint; remove the option to start "
                "from the beginning"
            )
        return last
    if not (Path(wanted) / "trainer_state.json").is_file():
        raise UserError(f"resume_from_checkpoint: {wanted} is not a checkpoint (a folder checkpoint-<step> of a run)")
    return wanted


def _resolved(args: RunArguments, trainer: SwitchTrainer) -> dict[str, Any]:
    """Every option with its final value, the method's defaults included; `--config` reads it again."""
    config = trainer.args
    values = config.to_dict()  # type: ignore[no-untyped-call]
    plan = trainer.plan
    values |= {"divergence": plan.objective.name, "on_policy_fraction": plan.fraction}
    values |= {**plan.objective.options, **plan.policy_options}
    own = {name: values[name] for name in own_fields() if name in values}
    return {**dataclasses.asdict(args), **own, **values}


def _check_same_run(resolved: dict[str, Any], checkpoint: str) -> None:
    """Refuse to resume with options that make it another run."""
    saved = read_config(Path(checkpoint).resolve().parent)
    for name, value in (saved or {}).items():
        now = without_secrets({name: plain(resolved[name])})[name] if name in resolved else None
        free = name in RESUME_MAY_CHANGE or name.startswith(RESUME_MAY_CHANGE_PREFIXES)
        if name in resolved and not free and now != value:
            raise UserError(
                f"resume_from_checkpoint: the saved run has {name}={value!r}, this one {now!r}; "
                "give the same options, or another output_dir without resuming"
            )


def _size(model: Any) -> str:
    config = model.config.get_text_config()
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    text = f"{config.model_type}, {config.num_hidden_layers} layers, {total / 1e6:,.2f}M parameters"
    return text if trained in (0, total) else f"{text}, {trained / 1e6:,.2f}M of them trained"


# What the closing table shows: key of the log, name, and what to multiply with.
TABLE_ROWS = (
    ("loss", "loss [nats/token]", 1),
    ("eval_loss", "evaluation loss [nats/token]", 1),
    ("eval_cross_entropy", "evaluation cross-entropy [nats/token]", 1),
    ("eval_rouge_l", "evaluation ROUGE-L", 1),
    ("rollout/teacher_share", "teacher share [%]", 100),
    *((f"rollout/{name}", name.replace("_nats", " [nats]"), 1) for name in MEASURED),
    ("rollout/completion_tokens", "rollout length [tokens]", 1),
    ("rollout/tokens_per_s", "rollouts [tokens/s]", 1),
)


def _logged(trainer: SwitchTrainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def _table(trainer: SwitchTrainer) -> str:
    rows = []
    for key, name, factor in TABLE_ROWS:
        values = _logged(trainer, key)
        if values:
            rows.append((name, factor * values[0], factor * values[-1]))
    return table(rows, ("", "start", "end")) if rows else ""


def _summary(trainer: SwitchTrainer, seconds: float) -> dict[str, Any]:
    losses, shares = _logged(trainer, "loss"), _logged(trainer, "rollout/teacher_share")
    speeds = _logged(trainer, "rollout/tokens_per_s")
    summary: dict[str, Any] = {
        "method": trainer.args.method,
        "seed": trainer.args.seed,
        "steps": trainer.state.global_step,
        "loss_first": losses[0] if losses else None,
        "loss_last": losses[-1] if losses else None,
        "teacher_share": sum(shares) / len(shares) if shares else None,
        "teacher_passes": trainer.teacher_passes,
        "tokens_per_s": sum(speeds) / len(speeds) if speeds else None,
        "seconds": seconds,
        "data": {name: dataclasses.asdict(report) for name, report in trainer.prepare_reports.items()},
    }
    for key in ("eval_loss", "eval_cross_entropy", "eval_rouge_l"):
        if values := _logged(trainer, key):
            summary[key] = values[-1]
    return summary
