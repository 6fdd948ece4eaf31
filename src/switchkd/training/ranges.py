"""Ranges of the numbers of transformers that it does not check: outside them training fails late, or in silence."""

import math
from typing import Any

from switchkd.errors import UserError

LARGEST = float(2**31)
#: Option -> smallest and largest value, and whether the smallest itself is allowed.
RANGES: dict[str, tuple[float, float, bool]] = {
    "learning_rate": (0.0, LARGEST, True),
    "weight_decay": (0.0, LARGEST, True),
    "adam_beta1": (0.0, 1.0, True),
    "adam_beta2": (0.0, 1.0, True),
    "adam_epsilon": (0.0, LARGEST, True),
    "max_grad_norm": (0.0, LARGEST, True),
    "neftune_noise_alpha": (0.0, LARGEST, True),
    "warmup_steps": (0.0, LARGEST, True),
    "num_train_epochs": (0.0, LARGEST, True),
    "max_steps": (-1.0, LARGEST, True),
    "logging_steps": (0.0, LARGEST, False),
    "save_steps": (0.0, LARGEST, False),
    "eval_steps": (0.0, LARGEST, False),
    "save_total_limit": (1.0, LARGEST, True),
    "eval_accumulation_steps": (1.0, LARGEST, True),
    "dataloader_num_workers": (0.0, 1024.0, True),
    "per_device_train_batch_size": (1.0, LARGEST, True),
    "per_device_eval_batch_size": (1.0, LARGEST, True),
    "gradient_accumulation_steps": (1.0, LARGEST, True),
}


def check_training_ranges(options: Any) -> None:
    """Refuse numbers outside `RANGES`, nan and infinity among them.

    Args:
        options: An object with these attributes; None is allowed for each.

    Raises:
        UserError: Names the option.
    """
    for name, (low, high, inclusive) in RANGES.items():
        value = getattr(options, name)
        if value is None:
            continue
        inside = math.isfinite(value) and (low <= value if inclusive else low < value) and value <= high
        if not inside or (name.startswith("adam_beta") and value == 1.0):
            sign = ">=" if inclusive else ">"
            most = " and < 1" if name.startswith("adam_beta") else "" if high == LARGEST else f" and <= {high:g}"
            raise UserError(f"{name} must be a finite number {sign} {low:g}{most}, got {value}")
    if not isinstance(options.lr_scheduler_kwargs, dict | None):
        raise UserError(f"lr_scheduler_kwargs must be a JSON object, got {options.lr_scheduler_kwargs!r}")
