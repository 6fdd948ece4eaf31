"""The model card of a student: what it learned, from whom and from what, and how to make it again."""

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from torch import nn

from switchkd.cli.display import markdown_table
from switchkd.cli.run_folder import plain, versions, without_secrets
from switchkd.methods import Method
from switchkd.training.config import SwitchConfig

CARD_FILE = "README.md"
#: A card with one of these was generated, by us, by `peft` or by `transformers`; any other README.md is someone's own.
GENERATED_MARKS = (
    "[switchkd](https://github.com/switchkd/switchkd)",
    "# Model Card for Model ID",
    "generated_from_trainer",
)
#: Options about this machine and where things go: no part of how the student was made.
NOT_SHOWN = (
    *("method", "output_dir", "logging_dir", "run_name", "project", "report_to", "disable_tqdm", "use_cpu"),
    *("push_to_hub", "eval_on_start", "do_train", "do_eval", "do_predict", "log_level", "log_level_replica"),
    *(
        "accelerator_config",
        "local_rank",
        "teacher_model_name_or_path",
        "resume_from_checkpoint",
        "overwrite_output_dir",
    ),
)
NOT_SHOWN_PREFIXES = ("hub_", "logging_", "log_", "save_", "dataloader_", "ddp_", "trackio_")
#: End of the key of an evaluation's metric -> what it is.
SCORES = {"loss": "loss [nats/token]", "cross_entropy": "cross-entropy [nats/token]", "rouge_l": "ROUGE-L"}
_NOT_EVALUATED = "Not evaluated during training. `switchkd evaluate` scores this folder."
_AFTER_SCORES = "\n\n## Run it again\n"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Origin:
    """Where the inputs of a run came from, in the words of whoever started it.

    Attributes:
        student: Folder or hub id of the student's first weights; None where nothing is known.
        teacher: Likewise of the teacher.
        data: File, folder or hub id of the training data.
        made: How the student was made of another model, e.g. "layers 0, 4 of gpt2".
        command: What starts the run again on a command line; None for a run from Python.
    """

    student: str | None = None
    teacher: str | None = None
    data: str | None = None
    made: str | None = None
    command: str | None = None

    @classmethod
    def of(cls, student: Any, teacher: Any, data: Any) -> "Origin":
        """Return what models (names or objects) and a data set say about where they came from."""
        return cls(_name(student), _name(teacher), _hub_data_set(data))


def hub_id(name: str | None) -> str | None:
    """Return the name of a model or data set if it is a hub id, None for a path."""
    if not name or not _HUB_ID.fullmatch(name) or name[0] == "." or Path(name).exists():
        return None
    return None if Path(name).suffix in (".json", ".jsonl", ".parquet", ".csv", ".gz") else name


def is_generated(folder: str | Path) -> bool:
    """Return whether a card may be written into a folder: it has none, or one that a program generated."""
    path = Path(folder) / CARD_FILE
    if not path.is_file():
        return True
    text = path.read_text(encoding="utf-8", errors="replace")
    return not text.strip() or any(mark in text for mark in GENERATED_MARKS)


def make_card(trainer: Any, *, model_name: str, dataset: Sequence[str], **metadata: Any) -> ModelCard:
    """Return the card of a trainer's student.

    Args:
        trainer: A `SwitchTrainer`.
        model_name: Heading of the card.
        dataset: Names of the training data; empty takes what the trainer knows.
        metadata: Of `huggingface_hub.ModelCardData`, over what the trainer knows; None leaves a value as it is.
    """
    args, plan, origin = trainer.args, trainer.plan, trainer.origin
    adapter = getattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config", None)
    names = list(dataset) or ([origin.data] if origin.data else [])
    known = {
        "base_model": hub_id(origin.student),
        "datasets": [one for name in names if (one := hub_id(name.partition(":")[0]))] or None,
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": _joined(["switchkd", "knowledge-distillation", plan.method.name, *(["lora"] if adapter else [])],
                        metadata.pop("tags", None)),
    }  # fmt: skip
    if adapter and known["base_model"]:
        known["base_model_relation"] = "adapter"
    data = ModelCardData(**known | {name: value for name, value in metadata.items() if value is not None})
    options = changed_options(args)
    taken = trainer.state.global_step
    steps = [f"{taken:,} optimizer step{'s' * (taken != 1)} of {_rows_per_step(args):,} prompts, seed {args.seed}"]
    if losses := _logged(trainer, "loss"):
        steps.append(f"loss {losses[0]:.4f} at the first log, {losses[-1]:.4f} at the last")
    template = resources.files("switchkd.training").joinpath("model_card.jinja").read_text(encoding="utf-8")
    return ModelCard.from_template(
        data,
        template_str=template,
        model_name=model_name,
        intro=_intro(trainer, bool(adapter)),
        method=plan.method.name,
        summary=plan.method.summary,
        source=_linked(plan.method.source),
        usage=_usage(args.hub_model_id or str(model_name)),
        models=_models(trainer, adapter),
        data=_data(trainer, names),
        learned=_table(_learned(trainer)),
        share=_share(trainer),
        steps="; ".join(steps) + ".",
        options=_table([(f"`{name}`", f"`{_one_line(value)}`") for name, value in options.items()]) if options else "",
        scores=_scores(trainer),
        is_command=origin.command is not None,
        command=without_secrets(origin.command or _python_call(origin, args, options, adapter)),
        versions=", ".join(f"{name} {version}" for name, version in versions().items() if name != "platform"),
        citation=citation(plan.method),
    )


def changed_options(args: SwitchConfig) -> dict[str, Any]:
    """Return the training options whose values differ from their defaults, without secrets and paths of outputs."""
    found = {}
    for field in dataclasses.fields(args):
        if field.name in NOT_SHOWN or field.name.startswith(NOT_SHOWN_PREFIXES) or not field.init:
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        value = plain(getattr(args, field.name))
        # TrainingArguments writes "off" in several ways: None, False, "" and [].
        off = not default and not value and isinstance(value, bool | str | list | dict)
        if value is not None and value != plain(default) and not off:
            found[field.name] = without_secrets(value)
    return found


def typed(value: Any) -> list[str]:
    """Return a value as the words that follow its flag on a command line."""
    return [_shown(item) for item in value] if isinstance(value, list) else [_shown(value)]


def citation(method: Method) -> str:
    """Return the BibTeX entries of a method's papers and of switchkd.

    A paper belongs to a method where its arXiv number or its title stands in the method's source.
    """
    text = resources.files("switchkd.training").joinpath("citations.bib").read_text(encoding="utf-8")
    own, *papers = [entry.strip() for entry in text.split("\n\n") if entry.strip()]
    return "\n\n".join([*(entry for entry in papers if _names_paper(method.source, entry)), own])


def _names_paper(source: str, entry: str) -> bool:
    fields: dict[str, str] = dict(re.findall(r"^  (\w+) = \{(.*)\},?$", entry, flags=re.MULTILINE))
    return fields.get("eprint", fields["title"]) in source


def _intro(trainer: Any, adapter: bool) -> str:
    origin = trainer.origin
    what = "A LoRA adapter of a student" if adapter else "A student"
    of = f" (`{origin.student}`)" if origin.student else ""
    if trainer.teacher_model is None:
        return f"{what} language model{of}, trained without a teacher."
    own = trainer.plan.method.own_teacher and origin.teacher is None
    by = "itself as it was before training" if own else f"`{origin.teacher}`" if origin.teacher else "a teacher"
    return f"{what} language model{of}, distilled from {by}."


def _usage(name: str) -> str:
    return (
        "from transformers import pipeline\n\n"
        f'generator = pipeline("text-generation", model="{name}")  # or the folder of this file\n'
        'print(generator("Once upon a time", max_new_tokens=64)[0]["generated_text"])'
    )


def _models(trainer: Any, adapter: Any) -> str:
    origin = trainer.origin
    student = trainer.accelerator.unwrap_model(trainer.model)
    start = "-" if origin.student is None and origin.made else _named(origin.student)
    rows = [("student", start, origin.made or "", _size(student))]
    if adapter:
        kinds = {str(plain(one.peft_type)): one for one in adapter.values()}
        said = ", ".join(
            kind + (f" of rank {one.r}, alpha {one.lora_alpha}" if hasattr(one, "r") else "")
            for kind, one in kinds.items()
        )
        rows[0] = (*rows[0][:2], f"adapter: {said}" + (f"; {origin.made}" if origin.made else ""), rows[0][3])
    if trainer.teacher_model is not None:
        copied = trainer.plan.method.own_teacher and origin.teacher is None
        made = "the student before training, with another prompt" if copied else ""
        rows.append(("teacher", _named(origin.teacher), made, _size(trainer.teacher_model)))
    return _table(rows, ("", "from", "made", "size"))


def _data(trainer: Any, names: Sequence[str]) -> str:
    reports = trainer.prepare_reports
    source = ", ".join(f"`{name}`" for name in names) or "not named"
    rows = [
        (name, source if name == "train" else "", one.columns, f"{one.kept:,}", f"{one.dropped_over_long:,}",
         "-" if one.truncated_completions is None else f"{one.truncated_completions:,}")
        for name, one in reports.items()
    ]  # fmt: skip
    if "train" not in reports and trainer.train_dataset is not None:
        rows.insert(0, ("train", source, "prepared before", f"{len(trainer.train_dataset):,}", "-", "-"))
    args = trainer.args
    limits = f"Limits: prompts {args.max_prompt_length}, completions {args.max_completion_length} tokens."
    head = ("set", "source", "columns", "records used", "dropped (prompt over-long)", "completions cut")
    return f"{_table(rows, head)}\n\n{limits}" if rows else "No training data."


def _learned(trainer: Any) -> list[tuple[str, str]]:
    args, plan = trainer.args, trainer.plan
    options = {**plan.objective.options, "loss_temperature": args.loss_temperature, "ce_weight": args.ce_weight}
    idle = {"loss_temperature": 1.0, "ce_weight": 0.0}
    said = [f"{name} {_shown(value)}" for name, value in options.items() if value != idle.get(name)]
    rows = [("objective", f"`{plan.objective.name}`" + "".join(f", {one}" for one in said))]
    if plan.minillm is not None:
        rows.append(("policy gradient", f"mixture weight {plan.minillm[0]:g}, clip range {plan.minillm[1]:g}"))
    if plan.policy is None or not plan.writes_text:
        return [*rows, ("text", "the answers of the data set")]
    if plan.method.teacher_text:
        rows.append(("text", "answers that the teacher wrote once before training"))
    else:
        part = trainer.text.on_policy_fraction
        rows.append(
            (
                "text",
                "rolled out in every step"
                if part == 1
                else f"rolled out in {part:.0%} of the steps; the answers of the data set in the others",
            )
        )
    warping = f"temperature {args.temperature:g}, top_k {args.top_k}, top_p {args.top_p:g}"
    rows.append(("sampling", warping))
    controller = trainer.text.controller
    options = {
        name: value
        for name, value in {**plan.policy_options, **(args.policy_kwargs or {})}.items()
        if controller is None or name != "initial_threshold"  # it was only where the search began
    }
    writer = "".join(f", {name} {_shown(value)}" for name, value in options.items())
    rows.append(("who writes", f"`{type(plan.policy).__name__}`{writer}"))
    if controller is not None:
        found = _logged(trainer, "rollout/initial_threshold_nats")
        start = f"{found[0]:.4g} nats at the first log, " if found else ""
        wanted = f"to have {controller.target_teacher_share:.0%} of the tokens by the teacher"
        rows.append(("threshold found", f"{start}{controller.threshold:.4g} nats at the end, {wanted}"))
    return rows


def _logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def _share(trainer: Any) -> str:
    shares = _logged(trainer, "rollout/teacher_share")
    if not shares:
        return ""
    mean = sum(shares) / len(shares)
    return (
        f"The teacher wrote {mean:.1%} of the rolled-out tokens on average: {shares[0]:.1%} at the first log, "
        f"{shares[-1]:.1%} at the last."
    )


def _scores(trainer: Any) -> str:
    args, state = trainer.args, trainer.state
    best = state.best_global_step if args.load_best_model_at_end else None
    last: dict[str, tuple[float, int]] = {}
    for entry in state.log_history:
        for key, value in entry.items():
            if key.startswith("eval_") and (best is None or entry["step"] == best):
                last[key] = value, entry["step"]
    rows = []
    for key, (value, step) in last.items():
        ending = next((ending for ending in SCORES if key.endswith(f"_{ending}")), None)
        if ending is None or not math.isfinite(value):
            continue
        data = key.removeprefix("eval_").removesuffix(ending).strip("_") or "evaluation data"
        samples = f"{args.eval_rouge_l_samples} prompts, sampled with decoding seed {args.seed}"
        how = samples if ending == "rouge_l" else "on the reference answers"
        rows.append((SCORES[ending], f"{value:.4g}", data, how, f"{step:,}" + (" (best)" if best else "")))
    if not rows:
        return _NOT_EVALUATED
    return _table(rows, ("measure", "value", "data", "how", "step"))


def add_scores(folder: Path, scored: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the scores of `switchkd evaluate` into the card of a folder, if it has a card of ours.

    Args:
        folder: Of the model.
        scored: Test set -> the summary of its evaluation.
    """
    path = folder / CARD_FILE
    if not path.is_file() or _AFTER_SCORES not in (text := path.read_text(encoding="utf-8")):
        return
    rows = []
    for name, summary in scored.items():
        decoding = summary["decoding"]
        seeds = ", ".join(map(str, decoding["decoding_seeds"]))
        how = f"{summary['examples']:,} prompts, decoding seeds {seeds}, temperature {decoding['temperature']:g}"
        values = {"ROUGE-L": summary["rouge_l"], "exact match [%]": summary["exact_match"], **summary["by_scorer"]}
        ends = {**summary["intervals"], "ROUGE-L": summary["intervals"].get("rouge_l")}
        for measure, value in values.items():
            low_high = ends.get(measure)
            interval = f" ({low_high[0]:.1f} to {low_high[1]:.1f})" if low_high else ""
            rows.append((measure, f"{value:.1f}{interval}", f"{name}: `{summary['dataset_name']}`", how))
    found = _table(rows, ("measure", "value (95% interval over prompts)", "data", "how"))
    before, _, after = text.partition(_AFTER_SCORES)
    before = before.replace(_NOT_EVALUATED, "").rstrip()
    path.write_text(f"{before}\n\nSampled answers:\n\n{found}{_AFTER_SCORES}{after}", encoding="utf-8")


def _python_call(origin: Origin, args: SwitchConfig, options: Mapping[str, Any], adapter: Any) -> str:
    lines = ["from switchkd import SwitchConfig, SwitchTrainer", "", "trainer = SwitchTrainer("]
    lines.append(f"    model={_literal(origin.student)},")
    if origin.teacher is not None:
        lines.append(f"    teacher_model={_literal(origin.teacher)},")
    lines.append("    args=SwitchConfig(")
    lines += [f"        {name}={value!r}," for name, value in {"method": args.method, **options}.items()]
    lines += ["    ),", f"    train_dataset=...,{f'  # {origin.data}' if origin.data else ''}"]
    lines += ["    peft_config=...,"] if adapter else []
    return "\n".join([*lines, ")", "trainer.train()"])


def _literal(name: str | None) -> str:
    return "..." if name is None else repr(name)


def _rows_per_step(args: SwitchConfig) -> int:
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def _size(model: nn.Module) -> str:
    config: Any = model.config
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    part = f", {_count(trained)} of them trained" if trained not in (0, total) else ""
    return f"{config.get_text_config().model_type}, {_count(total)} parameters{part}"


def _count(number: int) -> str:
    return f"{number / 1e6:,.1f}M" if number >= 1e6 else f"{number:,}"


def _name(model: Any) -> str | None:
    if isinstance(model, str):
        return model
    return getattr(getattr(model, "config", None), "_name_or_path", "") or None


def _hub_data_set(data: Any) -> str | None:
    """The hub id that a `datasets.Dataset` was downloaded from."""
    sources = getattr(getattr(data, "info", None), "download_checksums", None) or {}
    found = {match[1] for source in sources if (match := re.match(r"hf://datasets/([^@]+?)(?:@|$)", str(source)))}
    return found.pop() if len(found) == 1 else None


def _named(name: str | None) -> str:
    linked = hub_id(name)
    if linked is not None:
        return f"[`{name}`](https://huggingface.co/{name})"
    return f"`{name}`" if name else "given as an object"


def _linked(source: str) -> str:
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", source)


def _joined(own: list[str], more: str | Sequence[str] | None) -> list[str]:
    return list(dict.fromkeys([*own, *([more] if isinstance(more, str) else more or [])]))


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)


def _one_line(value: Any) -> str:
    return " ".join(_shown(value).split())


def _table(rows: Sequence[Sequence[str]], headers: Sequence[str] = ("", "")) -> str:
    return markdown_table(rows, headers)
