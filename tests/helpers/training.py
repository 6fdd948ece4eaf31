"""What tests of training share: parameters before and after, what reached the loss, what was logged."""

# About half of the tokens of two fresh tiny models lie on each side of this JSD, nats.
MIDDLE = {"initial_threshold": 0.42, "schedule": "constant"}
TIMES = {"rollout/tokens_per_s", "train_runtime", "train_samples_per_second", "train_steps_per_second"}


def parameters(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def trained(trainer):
    trainer.train()
    return parameters(trainer.model)


def largest_difference(first, second):
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def watch_batches(trainer):
    """Record (inputs, count) of every micro-batch that reaches the loss."""
    seen = []
    compute_loss = trainer.compute_loss

    def watched(model, inputs, return_outputs=False, num_items_in_batch=None):
        seen.append(({name: value.clone() for name, value in inputs.items()}, num_items_in_batch))
        return compute_loss(model, inputs, return_outputs, num_items_in_batch)

    trainer.compute_loss = watched
    return seen


def logged(trainer, *, times=False):
    """The log history of training steps, without what a clock measured."""
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    skipped = set() if times else TIMES
    return [
        {key: value for key, value in entry.items() if key not in skipped and not key.startswith("time/")}
        for entry in entries
    ]
