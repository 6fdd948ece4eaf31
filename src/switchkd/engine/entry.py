"""`roll_out`: write completions under a policy, batched, with the author and evidence of every token."""

import math
import time
import warnings
import weakref
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from switchkd.engine.arguments import (
    IdsLike,
    checked_draft_length,
    checked_eos,
    checked_excluded,
    checked_flag,
    checked_integer,
    checked_model,
    checked_pad,
    checked_policy,
    checked_prompts,
    checked_row_ids,
    checked_sampling,
    with_readable_padding,
)
from switchkd.engine.block import BlockDecoder
from switchkd.engine.draft_length import DraftLength
from switchkd.engine.readable import require_readable, unserved_reason
from switchkd.engine.request import Request
from switchkd.engine.sequential import decode_sequentially
from switchkd.engine.static import StaticDecoder, unserved_static
from switchkd.errors import UserError
from switchkd.models.forward import device_of, eval_mode
from switchkd.models.known import known
from switchkd.models.vocabulary import model_vocabulary_size, readable_pad_id, shared_vocabulary_size
from switchkd.policies import Policy
from switchkd.rollout import Author, Rollout
from switchkd.sampling import Warping


@torch.no_grad()
def roll_out(
    student: nn.Module,
    teacher: nn.Module | None,
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
    teacher_prompt_mask: IdsLike | None = None,
    return_teacher_hidden: bool = False,
    return_drafted_ids: bool = False,
    max_active_rows: int | None = None,
    excluded_ids: Sequence[int] = (),
    cuda_graphs: bool = False,
) -> Rollout:
    """Return completions written by student and teacher under `policy`.

    At every position the student drafts a token, the policy reads both next-token distributions of the same prefix
    and decides who writes, and the token is drawn from the chosen distribution, coupled to the draft. Both models
    run in eval mode with caches on; their modes are restored afterwards, also after an error. The result depends on
    (seed, row id, position) only: not on padding, batch composition or row order.

    Args:
        student: A causal language model of transformers.
        teacher: Likewise; None where the policy needs no teacher.
        prompt_ids: Left-padded prompts `[B, P]`: integers in a tensor, an array or lists, as all ids and masks here;
            or one list of ids for each row, of any lengths.
        prompt_mask: True (or 1) at prompt tokens, `[B, P]`; None if nothing is padded, and for lists.
        policy: Who writes the next token, see `switchkd.policies`.
        max_new_tokens: Length limit C of a completion, in tokens, >= 1.
        seed: Seed of the counter-based randomness.
        temperature: Applied to both models before sampling *and* comparing; 0 is greedy.
        top_k: Likewise; 0 keeps every id.
        top_p: Likewise, in (0, 1].
        draft_length: Tokens the student drafts before the teacher checks them: a number, or "auto" to choose it round
            by round from measured times, which are remembered for the pair of models. 1 is the sequential reference.
            In float32 the result is the same for all.
        eos_token_id: An id, several, or None to run to the length limit.
        pad_token_id: Fills completions after their end; the first EOS id, else 0, if None. The models never read it,
            so that it may lie outside their vocabulary.
        row_ids: Identity of each row for the randomness, integers `[B]`; 0 .. B-1 if None.
        teacher_prompt_ids: Prompts for the teacher where they differ from the student's, as `prompt_ids`, `[B, P']`.
        teacher_prompt_mask: Their mask `[B, P']`.
        return_teacher_hidden: Keep the teacher's last hidden state that predicted each token.
        return_drafted_ids: Keep the student's draft at each position, also where the teacher wrote something else.
        max_active_rows: How many rows are decoded at once, all if None; waiting prompts take the places of finished
            ones. It bounds memory and changes no text.
        excluded_ids: Ids that neither model may write and no comparison counts: both distributions are renormalised
            without them. `switchkd.models.vocabulary.check_tokenizers` returns those that only one tokenizer knows;
            without them the models are compared on all leading ids that both score, whatever their names.
        cuda_graphs: Decode with static shapes: on a GPU the rounds are captured as CUDA graphs, whose memory stays
            with the student for the next rollout; on CPU the same functions run as they are, which is slower. Models
            that are read through their own forward are decoded without, with a warning.

    Returns:
        A `Rollout` on the student's device, C being the longest completion.

    Raises:
        UserError: An argument outside its range, an empty prompt, one that does not fit a model's context, or a model
            that `switchkd.engine.readable.require_readable` refuses.
    """
    checked_model("student", student)
    if teacher is not None:
        checked_model("teacher", teacher)
    checked_policy(policy)
    if teacher is None and policy.needs_teacher:
        raise UserError(f"{type(policy).__name__} needs a teacher, got None")
    widths = [model_vocabulary_size(model) for model in (student, teacher) if model is not None]
    eos = checked_eos(eos_token_id, max(widths))
    if not policy.needs_teacher:
        teacher = None
    temperature, top_k, top_p = checked_sampling(temperature, top_k, top_p)
    max_new_tokens = checked_integer("max_new_tokens", max_new_tokens, 1)
    cuda_graphs = checked_flag("cuda_graphs", cuda_graphs)
    draft_length = checked_draft_length(draft_length)
    seed = checked_integer("seed", seed)
    if max_active_rows is not None:
        max_active_rows = checked_integer("max_active_rows", max_active_rows, 1)
    if checked_flag("return_teacher_hidden", return_teacher_hidden) and teacher is None:
        raise UserError(f"return_teacher_hidden needs a teacher, which {type(policy).__name__} does not call")

    # What the models read in place of padding, which may be an id they have no row for.
    fill = readable_pad_id(None, eos, student, teacher)
    pad = fill if pad_token_id is None else checked_pad(pad_token_id)
    prompts = checked_prompts(student, prompt_ids, prompt_mask, max_new_tokens, "student", pad)
    rows = len(prompts)
    row_ids = checked_row_ids(row_ids, rows, device_of(student))
    size = widths[0] if teacher is None else min(widths)
    excluded = checked_excluded(excluded_ids, size)
    teacher_prompts = None
    if teacher is not None:
        if not excluded:  # whoever excludes ids has compared the tokenizers, and was warned there
            shared_vocabulary_size(*widths)
        if teacher_prompt_ids is None:
            if teacher_prompt_mask is not None:
                raise UserError("teacher_prompt_mask goes with teacher_prompt_ids, which is None")
            teacher_prompt_ids, teacher_prompt_mask = prompt_ids, prompt_mask
        teacher_prompts = checked_prompts(
            teacher, teacher_prompt_ids, teacher_prompt_mask, max_new_tokens, "teacher", pad
        )
        if len(teacher_prompts) != rows:
            raise UserError(f"teacher_prompt_ids has {len(teacher_prompts)} rows, prompt_ids {rows}")
        teacher_prompts = with_readable_padding(teacher_prompts, widths[1], fill)

    request = Request(
        student=student,
        teacher=teacher,
        prompts=with_readable_padding(prompts, widths[0], fill),
        teacher_prompts=teacher_prompts,
        policy=policy,
        warping=Warping(temperature, top_k, top_p, size, excluded),
        max_new_tokens=max_new_tokens,
        seed=seed,
        row_ids=row_ids,
        eos=eos,
        pad_token_id=fill,
        return_teacher_hidden=return_teacher_hidden,
        return_drafted_ids=checked_flag("return_drafted_ids", return_drafted_ids),
    )
    started = time.perf_counter()
    with eval_mode(student, teacher):
        for role, model, read in request.readers():
            require_readable(model, role, padded=not bool(read.mask.all()), length=read.width + max_new_tokens)
        static = cuda_graphs and _served(request) and _served_static(request)
        if static or (draft_length != 1 and _served(request)):
            chooser = _chooser(student, teacher) if draft_length == "auto" else DraftLength(draft_length)
            result = (StaticDecoder if static else BlockDecoder)(request, chooser, max_active_rows).run()
        else:
            parts = [decode_sequentially(part) for part in request.split(max_active_rows)]
            result = parts[0] if len(parts) == 1 else _joined(parts, fill)
    result.prompt_ids = prompts.ids
    result.completion_ids.masked_fill_(~result.completion_mask, pad)
    if result.drafted_ids is not None:
        result.drafted_ids.masked_fill_(~result.completion_mask, pad)
    seconds = time.perf_counter() - started
    result.stats["seconds"] = seconds
    result.stats["tokens_per_s"] = int(result.completion_mask.sum()) / max(seconds, 1e-9)
    return result


def _chooser(student: nn.Module, teacher: nn.Module | None) -> DraftLength:
    """Return the chooser of draft lengths of a pair: what one rollout taught about its speed, the next one uses."""
    if teacher is None:
        return DraftLength()
    record = known(student)
    if record.drafting is None or record.drafting[0]() is not teacher:
        record.drafting = (weakref.ref(teacher), DraftLength())
    chooser: DraftLength = record.drafting[1]
    return chooser.restart()


def _served(request: Request) -> bool:
    """Whether both models can be read row by row; one warning, once, for each model that cannot."""
    served = True
    for role, model, read in request.readers():
        reason = unserved_reason(model, read.width + request.max_new_tokens)
        if reason is not None:
            served = False
            if not known(model).warned:
                known(model).warned = True
                warnings.warn(f"the {role} is decoded token by token, more slowly: {reason}")
    return served


def _served_static(request: Request) -> bool:
    """Whether static shapes serve both models; one warning, once, where they do not."""
    reason = unserved_static(request)
    if reason is not None and not known(request.student).warned:
        known(request.student).warned = True
        warnings.warn(f"cuda_graphs is not used: {reason}")
    return reason is None


def _joined(parts: list[Rollout], pad_token_id: int) -> Rollout:
    """Return the rows of several rollouts as one."""
    length = max(part.completion_ids.shape[1] for part in parts)

    def column(name: str, fill: float) -> Tensor:
        tensors = [getattr(part, name) for part in parts]
        missing = [length - tensor.shape[1] for tensor in tensors]
        return torch.cat(
            [
                torch.cat([tensor, tensor.new_full((len(tensor), short, *tensor.shape[2:]), fill)], dim=1)
                for tensor, short in zip(tensors, missing, strict=True)
            ]
        )

    return Rollout(
        prompt_ids=torch.cat([part.prompt_ids for part in parts]),
        prompt_mask=torch.cat([part.prompt_mask for part in parts]),
        completion_ids=column("completion_ids", pad_token_id),
        completion_mask=column("completion_mask", False),
        author=column("author", int(Author.NONE)),
        divergence=column("divergence", math.nan),
        threshold=column("threshold", math.nan),
        teacher_hidden=None if parts[0].teacher_hidden is None else column("teacher_hidden", 0.0),
        drafted_ids=None if parts[0].drafted_ids is None else column("drafted_ids", pad_token_id),
        measured=parts[0].measured,
        stats={name: sum(part.stats[name] for part in parts) for name in parts[0].stats},
    )
