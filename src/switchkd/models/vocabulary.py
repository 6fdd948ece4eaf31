"""May these two models be compared? Shared token ids, padded vocabulary rows, end-of-sequence sets."""

import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from switchkd.errors import UserError


def check_tokenizers(student_tokenizer: Any, teacher_tokenizer: Any) -> list[int]:
    """Return the ids that only one of two tokenizers knows; refuse two tokenizers that give one id two meanings.

    `config.vocab_size` says nothing here: models pad their embedding rows. What counts is what both can write:

    - An id that both know must be the same token in both. One exception: a slot that one side has reserved and the
      other has put to use ("<|reserved_special_token_5|>" against "<tool>"). Both models have a row for it and both
      texts mean it by that id, so it stays: it is written and compared like every other, under either name. Were it
      taken out, a teacher that ends its turns with such a token could not end any.
    - An id that only one side knows may be special, added or reserved there, such as a "[PAD]" for which a model was
      resized. It is returned: neither model may write it, and no comparison may count it (`excluded_ids` of `roll_out`
      and of the losses), also where the other model happens to have a padded row of that number.
    - Everything else is a real difference, and so is a token that both know under different ids.

    Args:
        student_tokenizer: Hugging Face tokenizer of the student.
        teacher_tokenizer: Hugging Face tokenizer of the teacher.

    Returns:
        Sorted ids, which one warning names, or an empty list.

    Raises:
        UserError: The first ids that differ are named; or the student's end of sequence is unknown to the teacher.
    """
    student, teacher = _Names.of(student_tokenizer), _Names.of(teacher_tokenizer)
    if student.token_of == teacher.token_of:
        _compare_habits(student_tokenizer, teacher_tokenizer)
        return []
    differing = [
        index
        for index in sorted(student.token_of.keys() | teacher.token_of.keys())
        if student.token_of.get(index) != teacher.token_of.get(index)
    ]
    shown = {
        index: f"{index} ({student.token_of.get(index)!r} against {teacher.token_of.get(index)!r})"
        for index in differing
    }
    real = [index for index in differing if not student.may_differ(index, teacher)]
    if real:
        raise UserError(
            f"student and teacher have different tokenizers: {len(real)} ids differ, first "
            f"{', '.join(shown[index] for index in real[:3])}; "
            "distillation compares distributions id by id, so choose two models of one family"
        )
    excluded = [index for index in differing if index not in student.token_of or index not in teacher.token_of]
    eos = student_tokenizer.eos_token_id
    if eos in excluded:
        raise UserError(
            f"the student ends its texts with id {eos} ({student.token_of[eos]!r}), which the teacher's tokenizer does "
            "not know: set the student tokenizer's eos_token to the token with which the teacher ends its own"
        )
    _compare_habits(student_tokenizer, teacher_tokenizer)
    parts = []
    if excluded:
        parts.append(f"{len(excluded)} known to one side only, never written nor compared: {_listed(excluded, shown)}")
    renamed = [index for index in differing if index not in excluded]
    if renamed:
        parts.append(f"{len(renamed)} reserved on one side, compared by id: {_listed(renamed, shown)}")
    warnings.warn(f"the tokenizers of student and teacher differ in special ids: {'; '.join(parts)}")
    return excluded


def _compare_habits(student: Any, teacher: Any) -> None:
    """Say where one side would end a text, or write a conversation, in a way that the other was not trained on."""
    templates = [getattr(tokenizer, "chat_template", None) for tokenizer in (student, teacher)]
    if None not in templates and templates[0] != templates[1]:
        warnings.warn(
            "the chat templates of student and teacher differ: conversations are written with the student's, so that "
            "the teacher reads prompts of a form that it may not know; save one chat_template with both tokenizers"
        )
    ends = [tokenizer.eos_token_id for tokenizer in (student, teacher)]
    if None not in ends and ends[0] != ends[1]:
        tokens = [tokenizer.eos_token for tokenizer in (student, teacher)]
        warnings.warn(
            f"the student ends its texts with {tokens[0]!r} (id {ends[0]}), the teacher with {tokens[1]!r} (id "
            f"{ends[1]}): a rollout ends at either"
        )


@dataclass(frozen=True)
class _Names:
    """What the ids of a tokenizer are called, and which of them no ordinary text gives."""

    token_of: dict[int, str]
    id_of: dict[str, int]
    set_apart: set[int]

    @classmethod
    def of(cls, tokenizer: Any) -> "_Names":
        id_of = tokenizer.get_vocab()
        token_of = {index: token for token, index in id_of.items()}
        set_apart = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        return cls(token_of, id_of, set_apart | {index for index, token in token_of.items() if _RESERVED.search(token)})

    def may_differ(self, index: int, other: "_Names") -> bool:
        """Whether an id that the two name differently is a slot of one side, not another meaning."""
        sides = [(mine, others) for mine, others in ((self, other), (other, self)) if index in mine.token_of]
        for mine, others in sides:
            if index not in mine.set_apart or mine.token_of[index] in others.id_of:
                return False
        return len(sides) == 1 or any(_RESERVED.search(mine.token_of[index]) for mine, _ in sides)


# "<|reserved_special_token_5|>", "<unused42>", "[unused1]", "<|extra_0|>": slots that a vocabulary keeps free.
_RESERVED = re.compile(r"^[<\[].*(reserved|unused|extra_).*[>\]]$", re.IGNORECASE)


def _listed(ids: list[int], shown: dict[int, str]) -> str:
    return ", ".join(shown[index] for index in ids[:3]) + (", ..." if len(ids) > 3 else "")


def shared_vocabulary_size(student_size: int, teacher_size: int) -> int:
    """Return the number of leading ids both models can read and write.

    Args:
        student_size: Width of the student's logits.
        teacher_size: Width of the teacher's logits.

    Returns:
        The smaller width: both distributions are cut to it and renormalised, so that neither model ever writes an id
        the other lacks. No model is resized.
    """
    shared = min(student_size, teacher_size)
    if student_size != teacher_size:
        warnings.warn(
            f"student and teacher score {student_size} and {teacher_size} ids; comparing the shared first {shared}, "
            "renormalised"
        )
    return shared


def model_vocabulary_size(model: Any) -> int:
    """Return the width of a causal language model's logits, read from its output layer where it has one."""
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    return int(weight.shape[0]) if weight is not None else int(model.config.get_text_config().vocab_size)


def readable_pad_id(pad_token_id: int | None, eos_token_ids: Iterable[int], *models: Any) -> int:
    """Return an id to pad with that every model can read.

    Masks say what is padding, never ids, so that any readable one will do. The padding token of a tokenizer can be
    newer than the models and stand outside their embeddings.

    Args:
        pad_token_id: Taken where it is readable; a tokenizer's, or None.
        eos_token_ids: The first readable one is taken otherwise.
        models: Causal language models; None is skipped.

    Returns:
        0 where nothing else can be read.
    """
    width = min(model_vocabulary_size(model) for model in models if model is not None)
    wanted = [*([] if pad_token_id is None else [pad_token_id]), *eos_token_ids]
    return next((index for index in wanted if 0 <= index < width), 0)


def forget_unreadable_pad(model: Any) -> None:
    """Take a padding id that the model has no row for out of its configurations, which could not be loaded again.

    transformers' Trainer copies the tokenizer's padding id there, whether or not the model was resized for it.
    """
    width = model_vocabulary_size(model)
    configs: list[Any] = [model.config.get_text_config(), getattr(model, "generation_config", None)]
    for config in configs:
        pad = getattr(config, "pad_token_id", None)
        if isinstance(pad, int) and not 0 <= pad < width:
            config.pad_token_id = None


def normalize_eos(eos_token_id: int | Iterable[int] | None) -> list[int]:
    """Return end-of-sequence ids as a sorted list without repeats; None gives an empty list."""
    if eos_token_id is None:
        return []
    if isinstance(eos_token_id, int):
        return [eos_token_id]
    return sorted({int(value) for value in eos_token_id})


def eos_union(*sources: Any) -> list[int]:
    """Return every end-of-sequence id that any of the models or tokenizers ends a text with.

    An id that none of the models scores ends nothing and is left out: a tokenizer's may be newer than the models.

    Args:
        sources: Models (their generation config, else their config is asked), tokenizers, or None.

    Returns:
        Sorted ids, possibly none.
    """
    found: set[int] = set()
    for source in sources:
        for holder in (source, getattr(source, "generation_config", None), getattr(source, "config", None)):
            value = getattr(holder, "eos_token_id", None)
            if value is not None:
                found.update(normalize_eos(value))
    widths = [model_vocabulary_size(source) for source in sources if hasattr(source, "get_output_embeddings")]
    return sorted(index for index in found if not widths or index < max(widths))


def require_eos(*sources: Any) -> list[int]:
    """Return `eos_union(*sources)`, refusing the case where nothing ever ends a text.

    Raises:
        UserError: No source has an end-of-sequence id.
    """
    found = eos_union(*sources)
    if not found:
        raise UserError(
            "no end-of-sequence token anywhere: neither the tokenizer nor the models' generation_config name one, so "
            "no completion would ever end (one that no model scores does not count); set tokenizer.eos_token (and save "
            "it with the model)"
        )
    return found
