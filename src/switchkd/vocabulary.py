"""May these two models be compared? Shared token ids, padded vocabulary rows, end-of-sequence sets."""

import warnings
from collections.abc import Iterable
from typing import Any

from switchkd.errors import UserError


def check_tokenizers(student_tokenizer: Any, teacher_tokenizer: Any) -> None:
    """Refuse two tokenizers that give one id two meanings.

    `config.vocab_size` says nothing here: models pad their embedding rows. What counts is that every id that either
    tokenizer knows stands for the same token in the other.

    Args:
        student_tokenizer: Hugging Face tokenizer of the student.
        teacher_tokenizer: Hugging Face tokenizer of the teacher.

    Raises:
        UserError: The first ids that differ are named.
    """
    student_tokens = {index: token for token, index in student_tokenizer.get_vocab().items()}
    teacher_tokens = {index: token for token, index in teacher_tokenizer.get_vocab().items()}
    if student_tokens == teacher_tokens:
        return
    differing = sorted(
        index
        for index in student_tokens.keys() | teacher_tokens.keys()
        if student_tokens.get(index) != teacher_tokens.get(index)
    )
    shown = ", ".join(
        f"{index} ({student_tokens.get(index)!r} against {teacher_tokens.get(index)!r})" for index in differing[:3]
    )
    raise UserError(
        f"student and teacher have different tokenizers: {len(differing)} ids differ, first {shown}; "
        "distillation compares distributions id by id, so choose two models of one family"
    )


def shared_vocabulary_size(student_size: int, teacher_size: int, *, warn: bool = True) -> int:
    """Return the number of leading ids both models can read and write.

    Args:
        student_size: Width of the student's logits.
        teacher_size: Width of the teacher's logits.
        warn: Warn when the two differ.

    Returns:
        The smaller width: both distributions are cut to it and renormalised, so that neither model ever writes an id
        the other lacks. No model is resized.
    """
    shared = min(student_size, teacher_size)
    if warn and student_size != teacher_size:
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


def normalize_eos(eos_token_id: int | Iterable[int] | None) -> list[int]:
    """Return end-of-sequence ids as a sorted list without repeats; None gives an empty list."""
    if eos_token_id is None:
        return []
    if isinstance(eos_token_id, int):
        return [eos_token_id]
    return sorted({int(value) for value in eos_token_id})


def eos_union(*sources: Any) -> list[int]:
    """Return every end-of-sequence id that any of the models or tokenizers ends a text with.

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
    return sorted(found)


def require_eos(*sources: Any) -> list[int]:
    """Return `eos_union(*sources)`, refusing the case where nothing ever ends a text.

    Raises:
        UserError: No source has an end-of-sequence id.
    """
    found = eos_union(*sources)
    if not found:
        raise UserError(
            "no end-of-sequence token anywhere: neither the tokenizer nor the models' generation_config name one, so "
            "no completion would ever end; set tokenizer.eos_token (and save it with the model)"
        )
    return found
