"""What a run is made of besides its options, as checksums: a resume with other data or another teacher is noticed."""

import hashlib
from typing import Any

from datasets import Dataset
from torch import nn

from switchkd.errors import UserError
from switchkd.models.copy import whole

#: Of every tensor of a teacher this many numbers are read: enough to tell two models apart, in no time.
NUMBERS = 1024


def checksums(data: Any, teacher: nn.Module | None) -> dict[str, str]:
    """Return name -> checksum of what training reads: the prepared training data, and the teacher's weights.

    Args:
        data: The prepared training data; something else than a `Dataset`, such as a stream, is left out.
        teacher: The teacher, None where there is none.
    """
    found = {}
    if isinstance(data, Dataset):
        found["training data"] = _of_data(data)
    if teacher is not None:
        found["teacher"] = of_weights(teacher)
    return found


def require_same(saved: dict[str, str], now: dict[str, str], checkpoint: str) -> None:
    """Refuse to go on from a checkpoint with other inputs.

    Args:
        saved: Of the run that wrote the checkpoint.
        now: Of this run.
        checkpoint: For the message.

    Raises:
        UserError: Names what differs.
    """
    other = [name for name in saved if name in now and saved[name] != now[name]]
    if other:
        raise UserError(
            f"resume_from_checkpoint: the {' and the '.join(other)} are not those that {checkpoint} was trained with; "
            "give the same, or set allow_other_inputs to go on with these"
        )


def _of_data(data: Dataset) -> str:
    digest = hashlib.sha256()
    names = sorted(name for name in data.column_names if name.endswith("_ids"))
    for table in data.select_columns(names).with_format("arrow").iter(batch_size=1000):
        for name in names:
            column = table[name].combine_chunks()
            digest.update(column.value_lengths().to_numpy(zero_copy_only=False).tobytes())
            digest.update(column.flatten().to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()


def of_weights(model: nn.Module) -> str:
    """Return a checksum of a model's weights, of some numbers of each tensor; one that is offloaded counts by shape."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)}".encode())
        if value.is_meta:
            continue
        step = max(value.numel() // NUMBERS, 1)
        with whole(value) as tensor:
            digest.update(tensor.flatten()[::step].float().cpu().numpy().tobytes())
    return digest.hexdigest()
