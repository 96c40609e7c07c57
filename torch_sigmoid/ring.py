"""The ranks of a process group as a ring, around which texts pass, and in the end their gradients."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import process_group
from .internals import store_of


class AloneRound:
    """The texts of the only rank."""

    def __init__(self, text: Tensor, ids: Tensor) -> None:
        self.text, self.ids = text, ids
        self.to_text: Tensor | None = None

    def __iter__(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        yield 0, self.text, self.ids

    def give(self, to_texts: Tensor) -> None:
        self.to_text = to_texts

    def collected(self) -> Tensor:
        assert self.to_text is not None
        return self.to_text


class Alone:
    """A ring of one."""

    size = 1
    rank = 0

    def round(self, text: Tensor, ids: Tensor) -> AloneRound:
        return AloneRound(text, ids)

    def sum(self, value: Tensor) -> Tensor:
        return value


class Round(AloneRound):
    """Each rank's texts in turn, this rank's own first."""

    def __init__(self, ring: "Ring", text: Tensor, ids: Tensor) -> None:
        super().__init__(text, ids)
        self.ring = ring
        self.given: Tensor | None = None

    def __iter__(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        text, ids = self.text, self.ids
        for step in range(self.ring.size):
            self.given = None
            yield (self.ring.rank - step) % self.ring.size, text, ids
            if self.given is not None:
                self.to_text = self.ring.passed_on(self.given if self.to_text is None else self.to_text + self.given)
            text, ids = self.ring.passed_on(text), self.ring.passed_on(ids)

    def give(self, to_texts: Tensor) -> None:
        self.given = to_texts

    def collected(self) -> Tensor:
        assert self.to_text is not None
        return self.to_text


class Ring(Alone):
    """The ranks of a process group, each of which sends to the next and receives from the one before."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.next, self.before = (dist.get_global_rank(group, (self.rank + step) % self.size) for step in (1, -1))

    def round(self, text: Tensor, ids: Tensor) -> Round:
        return Round(self, text, ids)

    def passed_on(self, tensor: Tensor) -> Tensor:
        tensor = tensor.contiguous()
        received = torch.empty_like(tensor)
        sending = dist.P2POp(dist.isend, tensor, self.next, self.group)
        for work in dist.batch_isend_irecv([sending, dist.P2POp(dist.irecv, received, self.before, self.group)]):
            work.wait()
        return received

    def sum(self, value: Tensor) -> Tensor:
        dist.all_reduce(value, group=self.group)
        return value


def ring_of(group: "dist.ProcessGroup | None") -> Alone:
    return Alone() if group is None or dist.get_world_size(group) == 1 else Ring(group)


def resolved(group: "dist.ProcessGroup | str | None") -> "dist.ProcessGroup | None":
    return None if group is None else process_group(group)


_calls: dict[str, int] = {}


def agree(group: dist.ProcessGroup, told: str, error: Exception | None) -> None:
    """Raises on every rank if a rank has failed, or the ranks have told different things."""
    store = store_of(group)
    call = _calls[group.group_name] = _calls.get(group.group_name, 0) + 1
    rank, size = dist.get_rank(group), dist.get_world_size(group)

    def key(call: int, rank: int) -> str:
        return f"torch_sigmoid/siglip/{call}/{rank}"

    store.set(key(call, rank), told if error is None else str(error))
    found = [each.decode() for each in store.multi_get([key(call, other) for other in range(size)])]
    if call > 1:
        store.delete_key(key(call - 1, rank))
    if error is not None:
        raise error
    if len(set(found)) > 1:
        raise ValueError(f"siglip_loss(): all ranks must have features of one shape and dtype, got {'; '.join(found)}")
