"""How a student is saved: only if its weights are sound, with the configuration it came with, and with a model card."""

import logging
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from switchkd.models.vocabulary import forget_unreadable_pad
from switchkd.training.card import CARD_FILE, Origin, is_generated, make_card
from switchkd.training.guards import check_student

logger = logging.getLogger(__name__)


class SavingTrainer(Trainer):
    """A `transformers.Trainer` whose saved models have a card and no trace of the training in their configuration.

    Attributes:
        origin: Where models and data came from, for the card.
    """

    origin: Origin
    model: nn.Module
    #: `use_cache` as the student's configuration had it; the Trainer switches it off.
    source_use_cache: bool | None = None
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

    def _check_weights(self) -> None:
        check_student(self.model, self.state.global_step, self.args.learning_rate)
        self._checked_at = self.state.global_step

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        student: Any = self.accelerator.unwrap_model(self.model)
        forget_unreadable_pad(student)
        trained_with = getattr(student.config, "use_cache", None)
        if self.source_use_cache is not None:
            student.config.use_cache = self.source_use_cache
        try:
            super()._save(output_dir, state_dict)
        finally:
            if self.source_use_cache is not None:
                student.config.use_cache = trained_with

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
