"""Several processes that train a run together, as torchrun or ``accelerate launch`` start them.

All of them execute the same calls. The first one, of rank 0, also evaluates, ranks and writes; what
it found out and decided, it tells the others (`shared`), so that all of them take the same path.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
PATIENCE = timedelta(days=7)
"""How long processes wait for the first one, which may rank millions of passages meanwhile.

If one ends with an error, torchrun ends the others at once."""


def processes() -> int:
    """How many processes torchrun or the like started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _connected() -> Any:
    """`torch.distributed`, with the processes connected."""
    import torch  # not above: commands ask for `processes` and `is_first`, and start fast

    if not torch.distributed.is_initialized():
        on_gpus = torch.cuda.is_available()
        if on_gpus:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if on_gpus else "gloo", timeout=PATIENCE)
    return torch.distributed


def is_first() -> bool:
    """Whether this process evaluates and writes; true where there is one."""
    return processes() == 1 or os.environ.get("RANK", "0") == "0"


def shared(value: T) -> T:
    """The first process's value, in all processes; they wait for it."""
    if processes() == 1:
        return value
    values = [value]
    _connected().broadcast_object_list(values)
    return values[0]


def wait() -> None:
    """Wait until all processes are here."""
    if processes() > 1:
        _connected().barrier()


def gathered(values: Tensor) -> Tensor:
    """Rows (B, …) of all processes in the order of their ranks, with gradients if floating-point.

    B may differ between them, other dimensions and the type may not.
    """
    import torch
    from sentence_transformers.util import all_gather, get_world_size

    if get_world_size() == 1:
        return values
    sizes = all_gather(torch.tensor([len(values)], device=values.device))
    longest = int(sizes.max())  # what is gathered has one shape
    filler = values.new_zeros(longest - len(values), *values.shape[1:])
    rows = all_gather(torch.cat([values, filler]), with_grad=values.is_floating_point())
    there = torch.arange(longest, device=values.device) < sizes[:, None]
    return rows[there.flatten()]
