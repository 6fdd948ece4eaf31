"""The options that say which models a command loads and how they are sampled, and loading them."""

import argparse
from typing import Any

from switchkd.cli.options import flag
from switchkd.errors import UserError, check_choice, check_warping

DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_pair_options(group: Any, *, student: str = "student: folder or hub id", teacher: str | None = None) -> None:
    """Add the options of a student and its teacher to a group of a parser.

    Args:
        group: Of a parser.
        student: Help of `--model_name_or_path`.
        teacher: Help of `--teacher_model_name_or_path`.
    """
    group.add_argument("--model_name_or_path", metavar="STUDENT", help=student)
    group.add_argument("--teacher_model_name_or_path", metavar="TEACHER", help=teacher or "teacher: folder or hub id")
    group.add_argument("--dtype", default="auto", help="weights: auto (as saved), float32, bfloat16 or float16")
    group.add_argument("--attn_implementation", metavar="NAME", help="attention of both models, e.g. sdpa or eager")
    group.add_argument("--model_revision", metavar="NAME", help="branch, tag or commit of the student on the hub")
    group.add_argument("--teacher_model_revision", metavar="NAME", help="the same of the teacher")
    group.add_argument(
        "--trust_remote_code", **flag("run code that comes with a model or tokenizer; only for sources you trust")
    )
    group.add_argument(
        "--allow_pickled_weights", **flag("read weights that are not in safetensors; only from sources you trust")
    )


def add_sampling_options(group: Any, *, max_completion_length: int, batch_size: int, at_once: str) -> None:
    """Add the options of sampling from both models to a group of a parser.

    Args:
        group: Of a parser.
        max_completion_length: Default, tokens.
        batch_size: Default.
        at_once: Help of `--batch_size`.
    """
    group.add_argument(
        "--max_completion_length", type=int, default=max_completion_length, metavar="N", help="length limit, tokens"
    )
    group.add_argument("--temperature", type=float, default=1.0, metavar="T", help="of both models; 0 is greedy")
    group.add_argument("--top_k", type=int, default=0, metavar="K", help="0 keeps every token")
    group.add_argument("--top_p", type=float, default=1.0, metavar="P", help="1 keeps every token")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the sampling")
    group.add_argument("--batch_size", type=int, default=batch_size, metavar="N", help=at_once)


def check_pair_options(options: argparse.Namespace, **required: str) -> None:
    """Refuse a missing model or data set, and values out of range.

    Args:
        options: Of a command with `add_pair_options`.
        required: Option -> what it is, for those that must be given.

    Raises:
        UserError: Names the option.
    """
    for name, meaning in required.items():
        if getattr(options, name) is None:
            raise UserError(f"give --{name}, {meaning}")
    check_choice("dtype", options.dtype, DTYPES)
    for name in ("max_samples", "max_prompt_length", "max_completion_length", "batch_size"):
        value = getattr(options, name, None)
        if value is not None and value < 1:
            raise UserError(f"{name} must be >= 1, got {value}")
    check_warping(options.temperature, options.top_k, options.top_p)


def read_tokenizer(options: argparse.Namespace, name: str | None = None) -> Any:
    """Return the tokenizer of the student, or one that is named."""
    from switchkd.models.loading import load_tokenizer

    place = {"trust_remote_code": options.trust_remote_code, "revision": options.model_revision}
    return load_tokenizer(name or options.model_name_or_path, init_kwargs=place, template=options.chat_template_path)


def read_model(options: argparse.Namespace, role: str = "student") -> Any:
    """Return the student or the teacher on the device where it runs.

    Args:
        options: Of a command with `add_pair_options`.
        role: `teacher`, or how messages call the other model.
    """
    from switchkd.models.loading import default_device, load_model

    prefix = "teacher_" if role == "teacher" else ""
    kwargs = {
        "dtype": options.dtype,
        "trust_remote_code": options.trust_remote_code,
        "revision": getattr(options, f"{prefix}model_revision"),
        "attn_implementation": options.attn_implementation,
    }
    given = {name: value for name, value in kwargs.items() if value is not None}
    if options.allow_pickled_weights:
        given["use_safetensors"] = None
    return load_model(getattr(options, f"{prefix}model_name_or_path"), given, role=role).to(default_device())


def read_excluded_ids(options: argparse.Namespace, tokenizer: Any) -> list[int]:
    """Return the ids that only the student's tokenizer or only the teacher's knows."""
    from switchkd.models.loading import excluded_with

    place = {"trust_remote_code": options.trust_remote_code, "revision": options.teacher_model_revision}
    return excluded_with(tokenizer, options.teacher_model_name_or_path, init_kwargs=place)
