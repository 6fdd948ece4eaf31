"""What a running `switchkd train` shows and logs."""

import sys
from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments

from switchkd.cli.console import rendered, terminal
from switchkd.cli.options import is_terminal
from switchkd.cli.rollouts import completions_table
from switchkd.cli.run_folder import RunFolder
from switchkd.rollout import label_of
from switchkd.training.skipping import SKIPPED_FILE

# What a progress line shows: key of the log, and how.
SHOWN = {
    "loss": "loss {:.4f}",
    "eval_loss": "eval loss {:.4f}",
    "eval_cross_entropy": "eval cross-entropy {:.4f}",
    "eval_rouge_l": "eval ROUGE-L {:.1f}",
    "rollout/teacher_share": "teacher {:.0%}",
    "rollout/tokens_per_s": "{:.0f} tokens/s",
    "learning_rate": "lr {:.2e}",
}


class RunCallback(ProgressCallback):
    """Appends every log to metrics.jsonl, prints a line for it to standard error, and keeps a bar on a terminal.

    Args:
        folder: Where the log goes.
        show_bar: Whether a terminal gets a bar.
        measured: What the policy compares, if anything; it stands beside the teacher's share.
        completions: Returns the rollouts of the last log, which a terminal gets as a table.
    """

    def __init__(
        self,
        folder: RunFolder,
        show_bar: bool,
        *,
        measured: str | None,
        completions: Callable[[], list[dict[str, Any]]],
    ) -> None:
        super().__init__()
        self.shown: dict[str, str] = {}
        for key, text in SHOWN.items():
            self.shown[key] = text
            if key == "rollout/teacher_share" and measured is not None:
                self.shown[f"rollout/{measured}"] = f"{label_of(measured)} {{:.3f}}"
        self.completions = completions
        self.folder = folder
        self.show_bar = show_bar and is_terminal(sys.stderr)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the bar; take back what an interrupted run logged after the checkpoint."""
        for name in ("completions.jsonl", SKIPPED_FILE):
            self.folder.forget_after(name, state.global_step)
        # As the checkpoint has them: whatever happened to the file since, it has the rows of the whole run.
        logged = [{"step": row["step"], **row} for row in state.log_history]
        self.folder.write_again("metrics.jsonl", logged)
        if self.show_bar:
            super().on_train_begin(args, state, control, **kwargs)  # type: ignore[no-untyped-call]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar; log the last step whatever `logging_steps` says."""
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Move the bar of an evaluation."""
        if self.show_bar:
            super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)  # type: ignore[no-untyped-call]

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the log to its file and show its main numbers."""
        if not state.is_world_process_zero or not logs:
            return
        self.folder.append("metrics.jsonl", [{"step": state.global_step, **logs}])
        parts = [text.format(logs[key]) for key, text in self.shown.items() if key in logs]
        if parts:
            tqdm.write(f"step {state.global_step}/{state.max_steps}: {', '.join(parts)}", file=sys.stderr)
        rows, screen = self.completions() if "loss" in logs else [], terminal(sys.stderr)
        if rows and screen is not None:
            tqdm.write(rendered(screen, completions_table(rows, state.global_step)), file=sys.stderr)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)
