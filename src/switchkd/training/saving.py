"""How a student is saved, and how training goes on from what was saved.

Only sound weights are saved, with the configuration they came with and a model card; a checkpoint counts once it is
whole.
"""

import copy
import logging
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from switchkd.errors import UserError
from switchkd.models.vocabulary import forget_unreadable_pad
from switchkd.training.card import CARD_FILE, Origin, is_generated, make_card
from switchkd.training.checkpoints import chosen, write_manifest
from switchkd.training.config import SwitchConfig
from switchkd.training.guards import check_student
from switchkd.training.inputs import checksums, require_same
from switchkd.training.log import RunningMeans
from switchkd.training.peers import enter
from switchkd.training.text import TextSource

logger = logging.getLogger(__name__)


class SavingTrainer(Trainer):
    """A `transformers.Trainer` whose saved models have a card and no trace of the training in their configuration.

    Attributes:
        origin: Where models and data came from, for the card.
    """

    origin: Origin
    args: SwitchConfig
    model: nn.Module
    text: TextSource
    teacher_model: nn.Module | None
    teacher_passes: int
    skipped_steps: int
    _means: RunningMeans
    #: `use_cache` as the student's configuration had it; the Trainer switches it off.
    source_use_cache: bool | None = None
    #: `save_total_limit` while a checkpoint is written.
    _limit: int | None = None
    #: Counts of the checkpoint that training goes on from.
    _counted: dict[str, Any] | None = None
    #: What training begins with, where `auto_find_batch_size` may begin it again.
    _first_attempt: dict[str, Any] | None = None
    _checksums: dict[str, str] | None = None
    _seconds_before = 0.0
    _began = 0.0
    #: The optimizer step at which the weights were last found finite.
    _checked_at: int | None = None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the student as `transformers.Trainer` does, with a model card, unless its weights are nan or inf.

        Raises:
            UserError: They are; what was saved before stays.
        """
        self._check_weights()
        folder = Path(output_dir if output_dir is not None else str(self.args.output_dir))
        # Asked first: peft adds to any README.md that it finds.
        generated = is_generated(folder)
        super().save_model(output_dir, _internal_call)
        if not folder.name.startswith(PREFIX_CHECKPOINT_DIR):
            self._write_card(folder, generated=generated)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint as `transformers.Trainer` does, then what tells that it is whole; old ones go last."""
        enter("the saving of a checkpoint")
        limit, self._limit = self.args.save_total_limit, self.args.save_total_limit
        self.args.save_total_limit = None  # nothing is removed before the new one is whole
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        run = self._get_output_dir(trial=trial)
        folder = Path(run) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self.save_text_source(str(folder))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_manifest(folder, self.state.global_step)
            best = self.state.best_model_checkpoint
            rotate_checkpoints(output_dir=run, save_total_limit=limit, best_model_checkpoint=best, use_mtime=True)

    def _check_weights(self) -> None:
        check_student(self.model, self.state.global_step, self.args.learning_rate)
        self._checked_at = self.state.global_step

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        student: Any = self.accelerator.unwrap_model(self.model)
        forget_unreadable_pad(student)
        trained_with = getattr(student.config, "use_cache", None)
        if self.source_use_cache is not None:
            student.config.use_cache = self.source_use_cache
        # The arguments that are saved are those that were given, also while a checkpoint is written, but for tokens.
        args, self.args = self.args, self.args.without_tokens()
        self.args.save_total_limit = self._limit or args.save_total_limit
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args = args
            if self.source_use_cache is not None:
                student.config.use_cache = trained_with

    # ---- going on from a checkpoint

    def checkpoint_of(self, wanted: str | bool | None) -> str | None:
        """Return the checkpoint to go on from, as a path; None to start.

        Args:
            wanted: As `train` takes it.
        """
        checkpoint, passed_over = chosen(wanted, Path(str(self.args.output_dir)))
        for line in passed_over:
            warnings.warn(line, stacklevel=3)
        return checkpoint

    def _state_file(self, folder: str) -> Path:
        return Path(folder) / f"text_source_{self.args.process_index}.pt"

    def save_text_source(self, folder: str) -> None:
        """Write what decides about later steps' text, and what was counted so far, into a checkpoint."""
        counted = {
            "teacher_passes": self.teacher_passes,
            "skipped_steps": self.skipped_steps,
            "seconds": self.seconds,
            "means": self._means.state_dict(),
            # What the next row of the log is a mean of; transformers begins anew.
            "loss": float(self._tr_loss),
            "total_loss": float(self._total_loss_scalar),
            "logged_at": self._globalstep_last_logged,
        }
        state = {**self.text.state_dict(), "counted": counted, "inputs": self._inputs()}
        torch.save(state, self._state_file(folder))

    def _inputs(self) -> dict[str, str]:
        """Checksums of data and teacher, which do not change during a training."""
        if self._checksums is None:
            self._checksums = checksums(vars(self)["train_dataset"], self.teacher_model)
        return self._checksums

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_text_source(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.is_deepspeed_enabled:  # which has read the model itself
            self._load_text_source(checkpoint)

    def _load_text_source(self, resume_from_checkpoint: str) -> None:
        path = self._state_file(resume_from_checkpoint)
        if not path.is_file():
            raise UserError(
                f"resume_from_checkpoint: {resume_from_checkpoint} has no {path.name}: fewer processes wrote it than "
                "there are now; start as many as then"
            )
        state = torch.load(path, weights_only=True)
        self._counted, inputs = state.pop("counted"), state.pop("inputs")
        if not self.args.allow_other_inputs:
            require_same(inputs, self._inputs(), resume_from_checkpoint)
        self.text.load_state_dict(state)

    def go_on_counting(self) -> None:
        """Take up the counts of the checkpoint that training goes on from, if it does; called where training begins."""
        self._began = time.perf_counter()
        if self.args.auto_find_batch_size:
            self._forget_attempt()
        counted = self._counted
        if counted is None:
            return
        self.teacher_passes, self._seconds_before = counted["teacher_passes"], counted["seconds"]
        self.skipped_steps = counted.get("skipped_steps", 0)
        self._means.load_state_dict(counted["means"])
        self._tr_loss += counted["loss"]
        self._total_loss_scalar, self._globalstep_last_logged = counted["total_loss"], counted["logged_at"]

    def _forget_attempt(self) -> None:
        """Begin again as the first attempt did, whose batches were too large for the memory."""
        if self._first_attempt is None:
            self._first_attempt = {"passes": self.teacher_passes, "text": copy.deepcopy(self.text.state_dict())}
            return
        self.teacher_passes, self.skipped_steps = self._first_attempt["passes"], 0
        self.text.load_state_dict(copy.deepcopy(self._first_attempt["text"]))
        self._means.take()

    @property
    def seconds(self) -> float:
        """Seconds that the training took so far, those before a resume included."""
        return self._seconds_before + time.perf_counter() - self._began

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Return as transformers does where to begin; a run that has all its steps begins behind its last epoch."""
        begins: tuple[int, int] = super()._init_training_state(max_steps, *args, **kwargs)
        return (sys.maxsize, 0) if self.state.global_step >= max_steps else begins

    # ---- the card

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        dataset_name: str | list[str] | None = None,
    ) -> None:
        """Write the model card of the student, README.md in `output_dir`; `push_to_hub` and `save_model` do it too.

        The arguments are those of `transformers.Trainer`, and TRL's `dataset_name`. Those that are None are filled
        with what the trainer knows. A card that is there is replaced and its tags are kept, as transformers does; a
        README.md that no program generated stays.

        Args:
            language: Of the model, for the metadata.
            license: Of the model, for the metadata.
            tags: More tags.
            model_name: Heading of the card; the name of `hub_model_id` or `output_dir` if None.
            finetuned_from: Hub id of the student's first weights.
            tasks: The pipeline tag; text-generation if None. Of several the first is taken.
            dataset_tags: Hub ids of the training data, for the metadata.
            dataset: Names of the training data.
            dataset_args: Their configurations or splits, in the same order.
            dataset_name: Another name of `dataset`.
        """
        names, configurations = _listed(dataset) or _listed(dataset_name), _listed(dataset_args)
        names = [" ".join(pair) for pair in zip(names, configurations, strict=False)] or names
        self._write_card(
            Path(str(self.args.output_dir)),
            model_name=model_name,
            dataset=names,
            language=language,
            license=license,
            tags=tags,
            base_model=finetuned_from,
            pipeline_tag=(_listed(tasks) or [None])[0],
            datasets=_listed(dataset_tags) or None,
        )

    def _write_card(
        self,
        folder: Path,
        *,
        generated: bool | None = None,
        model_name: str | None = None,
        dataset: list[str] | None = None,
        tags: str | list[str] | None = None,
        **metadata: Any,
    ) -> None:
        if not self.is_world_process_zero():
            return
        path = folder / CARD_FILE
        if not (is_generated(folder) if generated is None else generated):
            logger.warning("%s was not generated; it stays, and no model card is written", path)
            return
        before = (ModelCard.load(path, ignore_metadata_errors=True).data.tags or []) if path.is_file() else []
        # Left out is a tag of peft's, which may hold a path of this machine; the hub makes it itself.
        kept = [tag for tag in before if not tag.startswith("base_model:")]
        hub_name = str(self.args.hub_model_id or "").rpartition("/")[2]
        card = make_card(
            self,
            model_name=model_name or hub_name or folder.resolve().name,
            dataset=dataset or [],
            tags=[*_listed(tags), *kept],
            **metadata,
        )
        card.save(path)


def _listed(value: str | list[str] | None) -> list[Any]:
    return [value] if isinstance(value, str) else list(value or [])
