"""`Engine`: rollouts written by vLLM, with the contract of `roll_out`."""

import json
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from switchkd.engine.arguments import (
    IdsLike,
    checked_draft_length,
    checked_eos,
    checked_excluded,
    checked_flag,
    checked_integer,
    checked_pad,
    checked_policy,
    checked_row_ids,
    checked_rows,
    checked_sampling,
)
from switchkd.engine.vllm.child import Child, default_python
from switchkd.engine.vllm.described import described, rollout_of, unpacked
from switchkd.engine.vllm.self_test import TEST_PROMPT, TEST_TOKENS, require_reference_text
from switchkd.engine.vllm.weights import named, write_model, write_tensors
from switchkd.engine.vllm.worker import EXTENSION
from switchkd.errors import UserError, check_count, check_range
from switchkd.models.forward import context_length, device_of
from switchkd.models.vocabulary import model_vocabulary_size
from switchkd.policies import Policy, StudentPolicy
from switchkd.rollout import Prompts, Rollout

#: Where the student's weights pass, if there is such a place: files in main memory.
MEMORY = Path("/dev/shm")
#: Drafted tokens where `draft_length` is "auto": vLLM's number is fixed at its start.
DRAFT_LENGTH = 4


def lengths_for(
    student: nn.Module, teacher: nn.Module | None, text: int, draft_length: str | int = "auto"
) -> dict[str, Any]:
    """Return the `draft_length` and the `max_model_len` of an engine.

    Args:
        student: Its student.
        teacher: Its teacher, None for a student alone.
        text: Most tokens of a prompt and its completion.
        draft_length: "auto" or a number, >= 1.
    """
    length = DRAFT_LENGTH if draft_length == "auto" else int(draft_length)
    contexts = [context_length(model) for model in (student, teacher) if model is not None]
    limits = [limit for limit in contexts if limit is not None]
    return {"draft_length": length, "max_model_len": min([text + slack(length), *limits])}


def slack(draft_length: int) -> int:
    """Return how many tokens must be left of `max_model_len`: near it vLLM gives a whole batch no drafts."""
    return 2 * (draft_length + 1)


class Engine:
    """A vLLM engine in a process of its own: the student is its draft model, the teacher its target model.

    Without a teacher the student is its only model and writes alone.

    It starts with a self-test: two rows must be what `roll_out` writes with the same models. Use it as a context
    manager, or call `close`; it ends with this process at the latest.

    Args:
        student: A model of transformers or peft, a folder or a hub id. A model is written to a temporary folder.
        teacher: Likewise; None for a student alone.
        python: The Python of an environment with vLLM; this one if None.
        draft_length: Tokens that the student drafts before the teacher checks them, >= 1. It changes no text.
        dtype: In which all models compute: float32, bfloat16 or float16; the teacher's, else the student's, if None.
        max_model_len: Most tokens of a prompt, its completion and 2 (draft_length + 1) more; vLLM decides if None.
        max_num_seqs: Most rows written at once; vLLM decides if None.
        gpu_memory_utilization: Share of a GPU's memory that vLLM takes, in (0, 1]; vLLM decides if None.
        tensor_parallel_size: Over how many GPUs each layer of both models is split.
        enable_sleep_mode: Let `sleep` give the memory back between rollouts. GPU only.
        trust_remote_code: Run code that comes with a model.
        self_test: Compare two rows with `roll_out` at the start; models given by name are loaded for it.
        student_name: Where the weights of a `student` that is an object are, so that they are not written again.
        teacher_name: Likewise.
        environment: Variables to set for vLLM's process.
        engine_options: Passed on to `vllm.LLM`; numbers, text, lists and dicts.

    Raises:
        UserError: Vocabularies of different sizes, no vLLM or another version, an engine that does not start, or one
            that writes another text than the reference.
    """

    def __init__(
        self,
        student: nn.Module | str,
        teacher: nn.Module | str | None,
        *,
        python: str | None = None,
        draft_length: int = DRAFT_LENGTH,
        dtype: str | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        gpu_memory_utilization: float | None = None,
        tensor_parallel_size: int = 1,
        enable_sleep_mode: bool = False,
        trust_remote_code: bool = False,
        self_test: bool = True,
        student_name: str | None = None,
        teacher_name: str | None = None,
        environment: dict[str, str] | None = None,
        **engine_options: Any,
    ) -> None:
        check_count("draft_length", draft_length, 1)
        check_count("tensor_parallel_size", tensor_parallel_size, 1)
        if gpu_memory_utilization is not None:
            check_range("gpu_memory_utilization", gpu_memory_utilization, 0.0, 1.0)
        place = {"trust_remote_code": trust_remote_code}
        models = [student] if teacher is None else [student, teacher]
        configs = [_config(model, place) for model in models]
        widths = [_width(model, config) for model, config in zip(models, configs, strict=True)]
        if widths[0] != widths[-1]:
            raise UserError(
                f"vllm: the student scores {widths[0]} ids and the teacher {widths[1]}; vLLM needs models of one size "
                "of vocabulary, use the transformers engine"
            )
        if max_model_len is not None and self_test:
            max_model_len = max(max_model_len, TEST_PROMPT + TEST_TOKENS + slack(draft_length))
        self.alone = teacher is None
        self.vocabulary_size, self.draft_length = widths[0], 0 if self.alone else draft_length
        self.dtype = dtype or _dtype(models[-1], configs[-1])
        self.device = device_of(student) if isinstance(student, nn.Module) else torch.device("cpu")
        self._sleeps, self._weights_folder = enable_sleep_mode, MEMORY if MEMORY.is_dir() else None
        self._child: Any = Child(python or default_python(), environment)
        try:
            with tempfile.TemporaryDirectory(prefix="switchkd-models-") as folder:
                names = [
                    named(model, Path(folder) / str(number), name)
                    for number, (model, name) in enumerate(zip(models, (student_name, teacher_name), strict=False))
                ]
                drafting = {"method": "draft_model", "model": names[0], "num_speculative_tokens": draft_length}
                options = {
                    "model": names[-1],
                    "speculative_config": None if self.alone else drafting,
                    "worker_extension_cls": EXTENSION,
                    "dtype": self.dtype,
                    "max_model_len": max_model_len,
                    "max_num_seqs": max_num_seqs,
                    "tensor_parallel_size": tensor_parallel_size,
                    "enable_sleep_mode": enable_sleep_mode,
                    "skip_tokenizer_init": True,
                    # Not tried with CUDA graphs. Without a cache of prefixes none can be stale.
                    "enforce_eager": True,
                    "enable_prefix_caching": False,
                    "seed": 0,
                    **place,
                    **({} if gpu_memory_utilization is None else {"gpu_memory_utilization": gpu_memory_utilization}),
                }
                given = {name: value for name, value in {**options, **engine_options}.items() if value is not None}
                #: What vLLM's configuration came to: version, runner, max_model_len, dtype.
                self.facts: dict[str, Any] = self._child.ask("start", options=_as_json(given))
            if self_test:
                require_reference_text(self, student, teacher, place)
            self.sleep()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def roll_out(
        self,
        prompt_ids: IdsLike,
        prompt_mask: IdsLike | None = None,
        *,
        policy: Policy,
        max_new_tokens: int = 256,
        seed: int = 0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        draft_length: int | Literal["auto"] = "auto",
        eos_token_id: int | Iterable[int] | None = None,
        pad_token_id: int | None = None,
        row_ids: IdsLike | None = None,
        teacher_prompt_ids: IdsLike | None = None,
        return_teacher_hidden: bool = False,
        return_drafted_ids: bool = False,
        cuda_graphs: bool = False,
        excluded_ids: Sequence[int] = (),
    ) -> Rollout:
        """Return completions written by student and teacher under `policy`; in float32 those of `switchkd.roll_out`.

        Args:
            prompt_ids: As `switchkd.roll_out` takes them; of two tokens at least where there is a teacher.
            prompt_mask: Likewise, as all that follow.
            policy: Who writes; one of the user's own comes from a file and has numbers or text as options.
            max_new_tokens: Length limit C of a completion, in tokens, >= 1.
            seed: Seed of the counter-based randomness.
            temperature: Of both models; 0 is greedy.
            top_k: 0 keeps every id.
            top_p: In (0, 1].
            draft_length: "auto" or the engine's own, which cannot change; not read where the student writes alone.
            eos_token_id: An id, several, or None to run to the length limit.
            pad_token_id: Fills completions after their end; the first EOS id, else 0, if None.
            row_ids: Identity of each row for the randomness; 0 .. B-1 if None.
            teacher_prompt_ids: Refused: vLLM's two models read one text.
            return_teacher_hidden: Refused: the states stay in vLLM.
            return_drafted_ids: Keep the student's draft at each position, also where the teacher wrote something else.
            cuda_graphs: Refused: those of the transformers engine.
            excluded_ids: Ids that neither model may write and no comparison counts.

        Returns:
            A `Rollout` on the student's device. `stats` has `requests` and `undrafted` besides: requests sent, and how
            many of them ended early and were asked on.

        Raises:
            UserError: An argument outside its range, one that vLLM cannot honour, or an engine that has ended.
        """
        checked_policy(policy)
        if self.alone and type(policy) is not StudentPolicy:
            raise UserError(
                f"vllm: this engine has no teacher, so that the student writes alone, not {type(policy).__name__}; "
                "start it with a teacher"
            )
        if teacher_prompt_ids is not None:
            raise UserError(
                "vllm: the teacher cannot read prompts of its own (teacher_prompt): vLLM's two models read one text; "
                "use the transformers engine"
            )
        if checked_flag("return_teacher_hidden", return_teacher_hidden):
            raise UserError("vllm: return_teacher_hidden is not possible: the teacher's states stay in vLLM's process")
        if checked_flag("cuda_graphs", cuda_graphs):
            raise UserError("vllm: cuda_graphs are those of the transformers engine; vLLM has its own (enforce_eager)")
        if checked_draft_length(draft_length) not in ("auto", self.draft_length) and not self.alone:
            raise UserError(f"vllm: draft_length is {self.draft_length} since the engine started, not {draft_length}")
        size = self.vocabulary_size
        eos = checked_eos(eos_token_id, size)
        temperature, top_k, top_p = checked_sampling(temperature, top_k, top_p)
        max_new_tokens = checked_integer("max_new_tokens", max_new_tokens, 1)
        excluded = checked_excluded(excluded_ids, size)
        pad = next(iter(eos), 0) if pad_token_id is None else checked_pad(pad_token_id)
        prompts = checked_rows(prompt_ids, prompt_mask, "student", pad, size)
        self._check_lengths(prompts, max_new_tokens)
        job = {
            "policy": described(policy),
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "vocabulary_size": size,
            "excluded_ids": list(excluded),
            "seed": checked_integer("seed", seed),
            "row_ids": checked_row_ids(row_ids, len(prompts), torch.device("cpu")).tolist(),
            "max_new_tokens": max_new_tokens,
        }
        started = time.perf_counter()
        self.wake_up()
        answer = self._child.ask("roll_out", job=job, prompts=prompts.rows(), eos=eos)
        self.sleep()
        keeps = checked_flag("return_drafted_ids", return_drafted_ids)
        result = rollout_of(unpacked(answer["columns"]), prompts.to(self.device), pad, keeps_drafted=keeps)
        result.measured = policy.measured
        counts, seconds = answer["counts"], time.perf_counter() - started
        result.stats = {
            "student_passes": counts["rounds"] * (self.draft_length or 1),
            "teacher_passes": 0 if self.alone else counts["rounds"],
            **{name: counts[name] for name in ("drafted", "kept", "requests", "undrafted")},
            "seconds": seconds,
            "tokens_per_s": int(result.completion_mask.sum()) / max(seconds, 1e-9),
        }
        return result

    def write(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        prompt_ids: IdsLike,
        prompt_mask: IdsLike | None = None,
        *,
        max_active_rows: int | None = None,
        **options: Any,
    ) -> Rollout:
        """Return `roll_out` of the engine, called as `switchkd.roll_out` is.

        Args:
            student: Not read: the engine has a student of its own, see `load_student`.
            teacher: Likewise.
            prompt_ids: As `roll_out` takes them.
            prompt_mask: Likewise.
            max_active_rows: Not read: `max_num_seqs` bounds the rows since the engine started.
            options: Of `roll_out`.
        """
        return self.roll_out(prompt_ids, prompt_mask, **options)

    def load_student(self, student: nn.Module | dict[str, Tensor]) -> None:
        """Give vLLM the student's present weights: the next rollout is written with them.

        Args:
            student: The model, adapters included, or a state dict with the names of transformers.

        Raises:
            UserError: vLLM's student has other tensors, or the engine has ended.
        """
        with tempfile.TemporaryDirectory(prefix="switchkd-student-", dir=self._weights_folder) as folder:
            if isinstance(student, nn.Module):
                file = write_model(student, Path(folder))
            else:
                file = write_tensors(student, Path(folder))
            self.wake_up()
            self._child.ask("load_student", file=str(file))
            self.sleep()

    def sleep(self) -> None:
        """Give the memory of weights and cache back until the next rollout, where `enable_sleep_mode` is set."""
        if self._sleeps:
            self._child.ask("sleep")

    def wake_up(self) -> None:
        """Undo `sleep`."""
        if self._sleeps:
            self._child.ask("wake_up")

    def close(self) -> None:
        """End vLLM's process."""
        self._child.close()

    def _check_lengths(self, prompts: Prompts, max_new_tokens: int) -> None:
        lengths = prompts.mask.sum(-1)
        if int(lengths.min()) < 2 and not self.alone:
            raise UserError(
                f"vllm: the prompt of row {int(lengths.argmin())} has one token; vLLM samples a token after the "
                "prefill, so prompts need two: put a beginning-of-sequence token before it, or use the transformers "
                "engine"
            )
        left = 0 if self.alone else slack(self.draft_length)
        needed, has = int(lengths.max()) + max_new_tokens + left, self.facts["max_model_len"]
        if needed > has:
            raise UserError(
                f"vllm: a prompt of {int(lengths.max())} tokens, {max_new_tokens} new ones and {left} of slack exceed "
                f"max_model_len {has}; shorten the prompts or the completions, or give a larger max_model_len"
            )


def _config(model: nn.Module | str, place: dict[str, Any]) -> Any:
    if isinstance(model, nn.Module):
        return model.config
    try:
        return AutoConfig.from_pretrained(model, **place)
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"vllm: cannot read the configuration of {model}: {reason}") from error


def _width(model: nn.Module | str, config: Any) -> int:
    if isinstance(model, nn.Module):
        return model_vocabulary_size(model)
    return int(config.get_text_config().vocab_size)


def _dtype(model: nn.Module | str, config: Any) -> str:
    """In which a model computes; vLLM's own choice for float32 weights would be half of it."""
    found = next(model.parameters()).dtype if isinstance(model, nn.Module) else config.dtype
    return str(found or torch.float32).removeprefix("torch.")


def _as_json(options: dict[str, Any]) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(json.dumps(options))
    except TypeError as error:
        raise UserError(f"vllm: options of the engine must be numbers, text, lists or dicts: {error}") from error
    return found
