"""What `switchkd train` does once its options are read: data, student, trainer, files of the run, summary."""

import argparse
import dataclasses
import shlex
import signal
import time
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HfHubHTTPError
from transformers import PrinterCallback, ProgressCallback

from switchkd.cli.console import Console, quiet_libraries
from switchkd.cli.run_folder import RunFolder, plain, read_config, without_secrets
from switchkd.commands.progress import RunCallback
from switchkd.commands.pushing import check_hub, push
from switchkd.commands.stopping import Stopper
from switchkd.commands.train_inputs import load_datasets, lora_config, make_student, set_init_kwargs
from switchkd.commands.train_options import RunArguments, read_options
from switchkd.data import load_records
from switchkd.data.prepared import prepared_facts
from switchkd.data.protocol import PREPARED
from switchkd.data_options import parse_mixture
from switchkd.errors import Stopped, UserError, UserErrors
from switchkd.models.loading import load_tokenizer, quantization
from switchkd.rollout import label_of, unit_of
from switchkd.training.card import Origin, changed_options, typed
from switchkd.training.checkpoints import chosen, newest_whole
from switchkd.training.config import SwitchConfig
from switchkd.training.options import own_fields
from switchkd.training.peers import together
from switchkd.training.resolve import written_out
from switchkd.training.setup import tokenizer_place
from switchkd.training.trainer import SwitchTrainer

# A resumed run may change these: its length, what it logs and saves, and how fast it reads.
RESUME_MAY_CHANGE = (
    "output_dir", "max_steps", "num_train_epochs", "report_to",
    "run_name", "project", "disable_tqdm", "num_completions_to_log", "push_to_hub", "per_device_eval_batch_size",
    "max_eval_samples", "dataset_test_split", "load_best_model_at_end", "metric_for_best_model", "greater_is_better",
    "skip_memory_metrics", "max_skipped_steps", "local_rank", "prediction_loss_only", "allow_other_inputs",
)  # fmt: skip
RESUME_MAY_CHANGE_PREFIXES = ("save_", "logging_", "log_", "eval_", "hub_", "dataloader_", "ddp_", "do_", "trackio_")

# Of the first prompt: its beginning and its end are shown.
SHOWN_CHARACTERS = 400


def train(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Train, save the model, and return what was reached."""
    folder = RunFolder(options.output_dir, "train")
    options.output_dir = str(folder.path)
    run_args, config = read_options(options)
    with together():
        return _train(options, run_args, config, folder, console)


def _train(
    options: argparse.Namespace, run_args: RunArguments, config: SwitchConfig, folder: RunFolder, console: Console
) -> dict[str, Any]:
    set_init_kwargs(run_args, config)
    checkpoint = _checkpoint(config.resume_from_checkpoint, folder, console)
    if checkpoint is not None and options.overwrite_output_dir:
        raise UserError("resume_from_checkpoint and overwrite_output_dir exclude each other; remove one")
    # A run is resumed in its own folder, or from a checkpoint elsewhere in a new one.
    resumes = checkpoint is not None and Path(checkpoint).resolve().parent == folder.path.resolve()
    wanted = str(config.resume_from_checkpoint or "").lower()
    # A run that was stopped before its first checkpoint: the same command begins it again.
    again = checkpoint is None and wanted == "auto" and folder.holds_run("switchkd train") and not _is_done(folder)
    if not resumes:
        folder.check(overwrite=options.overwrite_output_dir or again)
        _keep_models(run_args, config, folder)

    quiet_libraries(options.verbose)
    if config.log_level == "passive" and not options.verbose:
        config.log_level = "error"  # the Trainer sets the level of transformers again
    pushes = check_hub(config)
    started = time.perf_counter()
    trainer = _trainer(run_args, config, folder)
    trainer.origin = _origin(run_args, config)
    if checkpoint is None:
        trainer.find_threshold()
    resolved = {**_resolved(run_args, trainer), "push_to_hub": pushes}
    if checkpoint is not None or again:
        _check_same_run(resolved, folder.path if checkpoint is None else Path(checkpoint).resolve().parent)
    facts = prepared_facts(_data_names(run_args))
    folder.claim(resolved, keep=resumes)
    before = 0.0 if checkpoint is not None else time.perf_counter() - started
    if facts:
        folder.write_json(PREPARED, facts)
    for name, report in trainer.prepare_reports.items():
        console.say(f"{name} data: {report}")
    first_prompt = _first_prompt(trainer)
    console.say(first_prompt)
    if config.world_size > 1:
        console.say(f"launch: {trainer.launched_as()}")
    console.say(f"student: {_size(trainer.model)}")
    if trainer.teacher_model is not None:
        console.say(f"teacher: {_size(trainer.teacher_model)}")
    if trainer.calibration is not None and trainer.calibration.reached:  # else a warning has said so
        console.say(f"calibrated: {trainer.calibration.note}")

    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    measured = None if trainer.plan.policy is None else trainer.plan.policy.measured
    shown = RunCallback(
        folder, not config.disable_tqdm, measured=measured, completions=lambda: trainer.logged_completions
    )
    trainer.add_callback(shown)
    stopper = Stopper()
    trainer.add_callback(stopper)
    try:
        with stopper.listening():
            trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt:
        raise _stopped(trainer, folder, stopper) from None
    if stopper.asked is not None:
        raise _stopped(trainer, folder, stopper)
    seconds = trainer.seconds + before
    if trainer.eval_dataset is not None and config.eval_strategy == "no":
        trainer.evaluate()
    config.push_to_hub = False  # saving would push as well, and lose the rest where that fails
    trainer.save_model()
    summary = {**_summary(trainer, seconds), "first_prompt": first_prompt}
    folder.write_json("summary.json", summary)
    if text := _table(trainer, console):
        console.say(f"\n{text}")
    if best := summary.get("best"):
        console.say(f"\nbest: step {best['step']}, {best['metric']} {best['value']:.4g}; loaded and saved")
    console.say(f"\n{summary['steps']} steps in {seconds:.0f} s; model, config.yaml, metrics.jsonl in {folder.path}")
    result = {**summary, "output_dir": str(folder.path)}
    if pushes and (failure := push(trainer)):
        raise UserErrors([failure], result)
    return result


def _stopped(trainer: SwitchTrainer, folder: RunFolder, stopper: Stopper) -> Stopped:
    """What a training that was stopped says: where it goes on from."""
    number = stopper.asked or signal.SIGINT
    found, _ = newest_whole(folder.path)
    name = signal.Signals(number).name
    if found is None:
        return Stopped(f"stopped by {name} at step {trainer.state.global_step}; there is no checkpoint", number)
    return Stopped(
        f"stopped by {name} at step {trainer.state.global_step}; continue with --resume_from_checkpoint true, from "
        f"{found}",
        number,
    )


def _data_names(args: RunArguments) -> list[str | None]:
    mixture = parse_mixture(args.dataset_mixture) if args.dataset_mixture is not None else {}
    return [args.dataset_name, *mixture, args.eval_dataset_name]


def _trainer(args: RunArguments, config: SwitchConfig, folder: RunFolder) -> SwitchTrainer:
    source = args.model_name_or_path or config.teacher_model_name_or_path
    tokenizer = load_tokenizer(
        str(args.tokenizer_name_or_path or source),
        init_kwargs=tokenizer_place(config, "student"),
        template=config.chat_template_path,
    )
    train, evaluation = load_datasets(args, config)
    student = make_student(args, config, source, tokenizer)
    quantization_config = quantization(
        in_4bit=args.load_in_4bit,
        in_8bit=args.load_in_8bit,
        bnb_4bit_quant_type=args.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=args.use_bnb_nested_quant,
    )
    folder.make()  # the Trainer would, with a traceback where it cannot
    try:
        return SwitchTrainer(
            model=student,
            args=config,
            train_dataset=train,
            eval_dataset=evaluation,
            processing_class=tokenizer,
            peft_config=lora_config(args) if args.use_peft else None,
            quantization_config=quantization_config,
            lm_dataset=load_records(args.lm_dataset_name) if args.lm_dataset_name is not None else None,
        )
    except UserError:
        raise
    except (ValueError, HfHubHTTPError) as error:
        # transformers, accelerate and peft refuse options with a ValueError; --verbose shows where.
        raise UserError(str(error)) from error


def _first_prompt(trainer: SwitchTrainer) -> str:
    """The first prompt as the student reads it, special tokens and line breaks visible, on one line."""
    data: Any = trainer.train_dataset
    tokenizer: Any = trainer.processing_class
    row = data[0]
    text = tokenizer.decode(row["prompt_ids"], skip_special_tokens=False).replace("\n", "\\n")
    if len(text) > SHOWN_CHARACTERS:
        half = SHOWN_CHARACTERS // 2
        text = f"{text[:half]} ... {text[-half:]}"
    special = sum(token in tokenizer.all_special_ids for token in row["prompt_ids"])
    return f"first prompt, {len(row['prompt_ids'])} tokens ({special} special): {text}"


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


def _checkpoint(wanted: str | None, folder: RunFolder, console: Console) -> str | None:
    words: dict[str, str | bool] = {"true": True, "false": False, "auto": "auto"}
    checkpoint, passed_over = chosen(words.get(wanted.lower(), wanted) if wanted else None, folder.path)
    for line in passed_over:
        console.progress(f"switchkd: warning: {line}")
    return checkpoint


def _resolved(args: RunArguments, trainer: SwitchTrainer) -> dict[str, Any]:
    """Every option with its final value, the method's defaults included; `--config` reads it again."""
    config = trainer.args
    values = config.to_dict()
    values |= written_out(trainer.plan)
    if trainer.calibration is not None:
        values["initial_threshold"] = trainer.calibration.initial_threshold
    own = {name: values[name] for name in own_fields() if name in values}
    return {**dataclasses.asdict(args), **own, **values}


def _is_done(folder: RunFolder) -> bool:
    return (folder.path / "summary.json").is_file()


def _check_same_run(resolved: dict[str, Any], before: Path) -> None:
    """Refuse to resume with options that make it another run than that of the folder."""
    saved = read_config(before)
    for name, value in (saved or {}).items():
        if name == "initial_threshold" and resolved.get(name) is None and resolved.get("target_teacher_share"):
            resolved[name] = value  # found before the first step; where it stands now is in the checkpoint
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
    ("rollout/completion_tokens", "rollout length [tokens]", 1),
    ("rollout/tokens_per_s", "rollouts [tokens/s]", 1),
)


def _logged(trainer: SwitchTrainer, key: str, step: int | None = None) -> list[float]:
    """What was logged under a key, at one step or at all."""
    entries = [entry for entry in trainer.state.log_history if step is None or entry["step"] == step]
    return [entry[key] for entry in entries if key in entry]


def _best(trainer: SwitchTrainer) -> dict[str, Any] | None:
    """The step whose weights were loaded at the end, and what made it the best; None where the last were kept."""
    state, name = trainer.state, trainer.args.metric_for_best_model
    if not trainer.args.load_best_model_at_end or state.best_global_step is None or name is None:
        return None
    metric = name if name.startswith("eval_") else f"eval_{name}"
    return {"step": state.best_global_step, "metric": metric, "value": state.best_metric}


def _table(trainer: SwitchTrainer, console: Console) -> str:
    rows, best, shown = [], _best(trainer), list(TABLE_ROWS)
    if trainer.plan.policy is not None and (measured := trainer.plan.policy.measured) is not None:
        at = next(index for index, row in enumerate(shown) if row[0] == "rollout/teacher_share")
        shown.insert(at + 1, (f"rollout/{measured}", f"{label_of(measured)} [{unit_of(measured)}]", 1))
    for key, name, factor in shown:
        values = _logged(trainer, key)
        if values:
            row = (name, factor * values[0], factor * values[-1])
            of_best = _logged(trainer, key, best["step"]) if best else []
            rows.append((*row, *([factor * of_best[-1] if of_best else None] if best else [])))
    headers = ("", "start", "end", *([f"best: step {best['step']}"] if best else []))
    return console.table(rows, headers) if rows else ""


def _summary(trainer: SwitchTrainer, seconds: float) -> dict[str, Any]:
    losses, shares = _logged(trainer, "loss"), _logged(trainer, "rollout/teacher_share")
    speeds = _logged(trainer, "rollout/tokens_per_s")
    summary: dict[str, Any] = {
        "method": trainer.args.method,
        "seed": trainer.args.seed,
        "steps": trainer.state.global_step,
        "skipped_steps": trainer.skipped_steps,
        "loss_first": losses[0] if losses else None,
        "loss_last": losses[-1] if losses else None,
        "teacher_share": sum(shares) / len(shares) if shares else None,
        "teacher_passes": trainer.teacher_passes,
        "tokens_per_s": sum(speeds) / len(speeds) if speeds else None,
        "seconds": seconds,
        "data": {name: dataclasses.asdict(report) for name, report in trainer.prepare_reports.items()},
    }
    best = _best(trainer)
    if best is not None:
        summary["best"] = best
    # Of the weights that are saved.
    for key in ("eval_loss", "eval_cross_entropy", "eval_rouge_l"):
        if values := _logged(trainer, key, best["step"] if best else None):
            summary[key] = values[-1]
    return summary
