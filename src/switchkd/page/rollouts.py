"""The page of `switchkd rollout --html`: its completions with their writers marked."""

from collections.abc import Mapping, Sequence
from typing import Any

from switchkd.page.document import Page, Section
from switchkd.page.writers import view, within


def rollouts_page(rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], said: str) -> Page:
    """Return the page of some rollouts.

    Args:
        rows: Of `Rollout.to_dicts(tokenizer, eos_token_id)`, with `top_tokens` where they are known.
        summary: Of the command.
        said: A sentence on all of them.
    """
    views = [view(row, f"{number} of {len(rows)}", f"rollout-{number}") for number, row in enumerate(rows, 1)]
    shown, left_out = within(views)
    words = [f"{left_out} of {len(rows)} completions are left out to keep the page small."] if left_out else []
    missing = (
        [] if any("top_tokens" in row for row in rows) else ["the likeliest tokens of both models: --top_tokens 5"]
    )
    return Page(
        title="switchkd rollout",
        subtitle=f"policy {summary['policy']}, seed {summary['seed']}: {said}",
        sections=[Section("Rollouts", shown, words, legend=True)],
        missing=missing,
    )
