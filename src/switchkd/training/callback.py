"""Where the Trainer's loop calls back: before an optimizer step, after it, at an evaluation and at a checkpoint."""

from typing import Any

from transformers import TrainerCallback


class LoopCallback(TrainerCallback):
    """Hands on what happens between the methods that the Trainer lets a subclass override."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.began_at = 0
        #: Whether the optimizer is updating the weights.
        self.updates = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began_at = state.global_step
        self.trainer.go_on_counting()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.begin_step()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.check_step()
        self.updates = True

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.updates = False

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.check_update()
        self.trainer.finish_step()

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        # A resumed run evaluates where it begins; the run it continues has drawn its conclusions already.
        if metrics and "eval_loss" in metrics and (self.began_at == 0 or state.global_step > self.began_at):
            self.trainer.text.observe_loss(metrics["eval_loss"])
