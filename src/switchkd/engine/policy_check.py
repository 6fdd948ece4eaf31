"""Whether a policy does what the engine relies on: checked on two tiny pairs of models, in a few seconds."""

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from switchkd.engine.entry import roll_out
from switchkd.errors import UserError, UserErrors
from switchkd.policies import Decision, Policy, Positions
from switchkd.rollout import Author, Rollout

DRAFT_LENGTHS = (2, 4, 8)
ROWS, TOKENS = 6, 24  # of the rollouts that are compared
SIZE, STEPS, TEXTS = 4, 3, 12_000  # of the texts that are counted: 4^3 different ones
UNIFORMS = 2000  # points of (0, 1) at which the decision of a random policy is averaged
CHI_SQUARE_LIMIT = 5.0  # standard deviations; a right policy exceeds it about once in a million checks
FIRST_TOKEN = 2


class NextTokenTable(nn.Module):
    """A causal model whose next-token distribution is a table over the last token: outcomes can be enumerated.

    Args:
        log_probs: `[V, V]`, a row for each last token.
    """

    def __init__(self, log_probs: Tensor) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(log_probs)
        self.head = nn.Linear(1, len(log_probs))
        self.config: Any = type("Config", (), {"vocab_size": len(log_probs), "_attn_implementation": "eager"})()
        self.config.get_text_config = lambda: self.config

    def get_output_embeddings(self) -> nn.Module:
        """Return a layer with one output for each id."""
        return self.head

    def get_input_embeddings(self) -> nn.Module:
        """Return the table."""
        return self.table

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        use_cache: Any = None,
        logits_to_keep: int = 0,
    ) -> Any:
        """Return the logits as transformers' models do."""
        logits = self.table(input_ids)
        logits = logits[:, -logits_to_keep:] if logits_to_keep else logits
        return type("Output", (), {"logits": logits, "past_key_values": past_key_values})()


def make_tables(size: int = SIZE, seed: int = 5, spread: float = 1.5) -> tuple[Tensor, Tensor]:
    """Return log-probabilities `[size, size]` of a student and a teacher, a row for each last token."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = ((torch.randn(size, size, generator=generator) * spread).log_softmax(-1) for _ in range(2))
    return student, teacher


def check_policy(policy: Policy) -> list[str]:
    """Return what was found to hold for a policy, one sentence each; what does not hold is an error.

    1. What `measure`, `decide`, `behaviour` and `initial_state` return has the right shape and type.
    2. A decision depends on nothing but the row's own distributions, position and state: not on other rows, not on a
       draw of the policy's own, and on the drafted token only if the policy says `redraws`.
    3. Rollouts with drafts of 2, 4 and 8 tokens have the tokens, authors and measures of the sequential reference, and
       a row has the same text alone as in a batch.
    4. Texts of three tokens over an alphabet of four have the probabilities that `decide` and `behaviour` say
       (chi-square over 12,000 texts). Left out for a policy with a state that also draws or reads the draft.

    Args:
        policy: With the options it is used with.

    Raises:
        UserErrors: What does not hold, a line each.
    """
    if not isinstance(policy, Policy):
        raise UserError(f"check_policy needs a switchkd.Policy, got {policy!r}")
    held: list[str] = []
    for check in (_returns_what_it_should, _reads_its_row_only, _draft_length_changes_nothing, _texts_are_as_likely):
        try:
            wrong, holds = check(policy)
        except UserError:
            raise
        except Exception as error:  # whatever the code of the policy does
            raise UserError(f"{type(policy).__name__} fails with {type(error).__name__}: {error}") from error
        if wrong:
            raise UserErrors([f"{type(policy).__name__}: {message}" for message in wrong])
        held.append(holds)
    return held


def _positions(rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities of student and teacher `[N, V]`, drafted tokens, positions and noise `[N]`."""
    generator = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(rows, 11, generator=generator).mul(2).log_softmax(-1) for _ in range(2))
    drafted = torch.randint(11, (rows,), generator=generator)
    position = torch.randint(40, (rows,), generator=generator)
    return student, teacher, drafted, position, torch.rand(rows, generator=generator, dtype=torch.float64)


def _decide(policy: Policy, rows: Any = slice(None), drafted: Tensor | None = None) -> Any:
    """The measure of some of nine positions and what the policy decides on them."""
    student, teacher, drawn, position, uniform = _positions(9)
    state = policy.initial_state(9, torch.device("cpu"))
    drawn = drawn if drafted is None else drafted
    measure = torch.full((9,), math.nan)[rows]
    if policy.needs_teacher:
        measure = policy.measure(student[rows], teacher[rows], drawn[rows])
    noise = uniform[rows] if policy.random else None
    at = Positions(measure, position[rows], None if state is None else state[rows], noise)
    return measure, policy.decide(at)


def _returns_what_it_should(policy: Policy) -> tuple[list[str], str]:
    wrong = []
    measure, decision = _decide(policy)
    expected = {
        "measure() returns": (measure, torch.float32),
        "decide() returns an author": (decision.author, torch.uint8),
        "decide() returns a threshold": (decision.threshold, torch.float32),
    }
    for what, (value, dtype) in expected.items():
        if not isinstance(value, Tensor) or value.shape != (9,) or value.dtype != dtype:
            got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            wrong.append(f"{what} of {got} for 9 positions; it must be {dtype} [9]")
    if wrong:
        return wrong, ""
    allowed = (Author.STUDENT, Author.TEACHER) if policy.needs_teacher else (Author.STUDENT,)
    others = set(decision.author.tolist()) - set(map(int, allowed))
    if others:
        names = " or ".join(f"Author.{author.name}" for author in allowed)
        why = "" if policy.needs_teacher else ", because needs_teacher is False"
        wrong.append(f"decide() returns the author {others.pop()}; it must be {names}{why}")
    state = policy.initial_state(9, torch.device("cpu"))
    if policy.stateful != (state is not None):
        wrong.append(f"stateful is {policy.stateful}, but initial_state() returns {type(state).__name__}")
    elif state is not None and (decision.state is None or decision.state.shape != state.shape):
        other = None if decision.state is None else list(decision.state.shape)
        wrong.append(
            f"decide() returns a state of {other}; it must have the shape of the one it was given, {[*state.shape]}"
        )
    if policy.measured is not None and bool(measure.isnan().any()):
        wrong.append(f"measured is {policy.measured!r}, but measure() returns nan")
    if policy.needs_teacher:
        student, teacher, *_ = _positions(9)
        behaviour = policy.behaviour(student, teacher)
        if behaviour.shape != teacher.shape or float(behaviour.logsumexp(-1).abs().max()) > 1e-4:
            wrong.append("behaviour() must return log-probabilities that sum to 1, of the shape of the teacher's")
    return wrong, "measure, decide and behaviour return what the engine expects"


def _reads_its_row_only(policy: Policy) -> tuple[list[str], str]:
    def same(first: Any, second: Any) -> bool:
        pairs = ((first[0], second[0]), (first[1].author, second[1].author), (first[1].threshold, second[1].threshold))
        return all(torch.allclose(one.float(), two.float(), equal_nan=True) for one, two in pairs)

    whole = _decide(policy)
    if not same(whole, _decide(policy)):
        return [
            "it decides otherwise when asked again: a decision may depend on the distributions, the position, the "
            "state and, with random = True, the given noise, and on nothing that the policy keeps or draws itself"
        ], ""
    for rows in (torch.tensor([4, 1, 7]), *torch.arange(9).split(1)):
        part = (whole[0][rows], Decision(whole[1].author[rows], whole[1].threshold[rows]))
        if not same(part, _decide(policy, rows)):
            return ["its decision about a row changes with the rows beside it: compare nothing across rows"], ""
    if not policy.redraws and not same(whole, _decide(policy, drafted=(_positions(9)[2] + 1) % 11)):
        return ["it reads the drafted token: set redraws = True, or texts are biased towards what it prefers"], ""
    return [], "a decision depends on its own row alone"


def _draft_length_changes_nothing(policy: Policy) -> tuple[list[str], str]:
    student, teacher = _tiny_llama(0), _tiny_llama(1)
    with torch.no_grad():
        for own, other in zip(student.parameters(), teacher.parameters(), strict=True):
            own.copy_(0.8 * other + 0.2 * own)  # related, as real pairs are
    prompts = [[3, 5, 7][: 1 + row % 3] for row in range(ROWS)]

    def written(draft_length: int, rows: range) -> Rollout:
        return roll_out(
            student,
            teacher,
            [prompts[row] for row in rows],
            policy=policy,
            max_new_tokens=TOKENS,
            draft_length=draft_length,
            row_ids=torch.tensor(rows),
            eos_token_id=0,
        )

    reference = written(1, range(ROWS))
    for draft_length in DRAFT_LENGTHS:
        if where := _first_difference(reference, written(draft_length, range(ROWS))):
            return [
                f"draft_length {draft_length} gives another rollout than 1: {where}; what decide() returns for a "
                "position must not depend on how many positions it is asked about at once"
            ], ""
    alone = written(DRAFT_LENGTHS[1], range(2, 3))
    length = int(alone.completion_mask.sum())
    if reference.completion_ids[2, :length].tolist() != alone.completion_ids[0, :length].tolist():
        return ["a row gets another text alone than in a batch"], ""
    return [], f"drafts of {', '.join(map(str, DRAFT_LENGTHS))} tokens give the sequential reference's rollout"


def _first_difference(first: Rollout, second: Rollout) -> str:
    """Where two rollouts of the same prompts differ first, in words; nothing where they do not."""
    shape = first.completion_ids.shape
    if second.completion_ids.shape != shape:
        return f"texts of up to {second.completion_ids.shape[1]} instead of {shape[1]} tokens"
    for name in ("completion_ids", "author", "divergence", "threshold"):
        one, two = getattr(first, name), getattr(second, name)
        differs = ~torch.isclose(one.float(), two.float(), atol=1e-4, rtol=1e-4, equal_nan=True)
        if bool(differs.any()):
            row, position = (int(index) for index in differs.nonzero()[0])
            return (
                f"{name} of row {row} at position {position} is {two[row, position].item():g} instead of "
                f"{one[row, position].item():g}"
            )
    return ""


def _tiny_llama(seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=13,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            initializer_range=0.5,
        )
        return LlamaForCausalLM(config).eval()


def _texts_are_as_likely(policy: Policy) -> tuple[list[str], str]:
    if policy.stateful and (policy.redraws or policy.random):
        return [], "probabilities of texts were not counted: the state depends on draws"
    deviation = chi_square(policy, make_tables())
    if deviation > CHI_SQUARE_LIMIT:
        return [
            f"texts do not have the probabilities that decide() and behaviour() say (chi-square is {deviation:.0f} "
            "standard deviations too large)"
        ], ""
    return [], f"{TEXTS} texts have the probabilities that decide and behaviour say"


def chi_square(policy: Policy, tables: tuple[Tensor, Tensor], draft_length: int = 2) -> float:
    """Return by how many standard deviations the counts of texts miss their probabilities; inf for an impossible text.

    Args:
        policy: Whose state, if any, depends on no draw.
        tables: Of `make_tables`.
        draft_length: Of the rollout.
    """
    size = len(tables[0])
    student, teacher = (NextTokenTable(table) for table in tables)
    prompts = torch.full((TEXTS, 1), FIRST_TOKEN)
    rollout = roll_out(student, teacher, prompts, policy=policy, max_new_tokens=STEPS, draft_length=draft_length)
    expected = torch.ones(size**STEPS, dtype=torch.float64)
    for index, text in enumerate(itertools.product(range(size), repeat=STEPS)):
        for position, token in enumerate(text):
            expected[index] *= next_token(policy, tables, (FIRST_TOKEN, *text[:position]))[token]
    places = torch.tensor([size**power for power in range(STEPS - 1, -1, -1)])
    observed = torch.bincount((rollout.completion_ids * places).sum(1), minlength=size**STEPS).double()
    possible = expected > 0.0
    if bool((observed[~possible] > 0.0).any()):
        return math.inf
    wanted = TEXTS * expected[possible]
    freedom = int(possible.sum()) - 1
    statistic = float(((observed[possible] - wanted) ** 2 / wanted).sum())
    return (statistic - freedom) / math.sqrt(2 * freedom)


def next_token(policy: Policy, tables: tuple[Tensor, Tensor], prefix: tuple[int, ...]) -> Tensor:
    """Return the distribution of the next token after a prefix, float64 `[V]`, by the policy's own methods."""
    size = len(tables[0])
    drafted = torch.arange(size)
    state = policy.initial_state(1, drafted.device)
    for position, last in enumerate(prefix):
        student, teacher = (table[last].expand(size, size) for table in tables)
        measure = torch.full((size,), math.nan)
        if policy.needs_teacher:
            measure = policy.measure(student, teacher, drafted)
        if policy.stateful:
            decision = policy.decide(Positions(measure[:1], torch.tensor([position]), state))
            state, by_teacher = decision.state, (decision.author == Author.TEACHER).double().expand(size)
        elif position + 1 == len(prefix):
            by_teacher = _teacher_probability(policy, measure, position)
    own = student[0].double().exp()
    handed_over = (own * by_teacher).sum()  # the draft is replaced by a draw from the behaviour
    result = own * (1.0 - by_teacher)
    if policy.needs_teacher:
        result = result + handed_over * policy.behaviour(student[:1], teacher[:1])[0].double().exp()
    return result


def _teacher_probability(policy: Policy, measure: Tensor, position: int) -> Tensor:
    """For each drafted token `[V]` how probably the teacher gets the position."""
    repeats = UNIFORMS if policy.random else 1
    noise = (torch.arange(repeats, dtype=torch.float64) + 0.5) / repeats
    uniform = noise.repeat_interleave(len(measure)) if policy.random else None
    asked = measure.repeat(repeats)
    decision = policy.decide(Positions(asked, torch.full_like(asked, position, dtype=torch.int64), None, uniform))
    return (decision.author == Author.TEACHER).double().view(repeats, -1).mean(0)
