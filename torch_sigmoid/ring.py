"""The ranks of a process group as a ring, around which each rank's texts pass to all the others.

Texts go to both neighbours at once, so of W ranks each is at most W//2 steps away. While a rank computes with the texts of one
step, those of the next step are under way. The gradients of a rank's texts are summed over all ranks; for that each rank must
send at least W-1 blocks, whatever the way. Here the sums follow the texts from neighbour to neighbour, each rank adds its own
gradient, and the last rank sends the sum straight home. If each rank sent its block to the owner of the texts instead, as many
bytes would go, but most of them to far ranks, that is, between machines.

    step       0              1              2                      …   W//2 (in one direction only, if W is even)
    texts of   rank           rank ± 1       rank ± 2               …   rank ± W//2
    under way  texts, step 1  texts, step 2  texts, step 3,         …   gradients, step W//2 - 1; then home, step W//2
                                             gradients, step 1
"""

import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .dispatch import PLAIN_TYPES
from .internals import store_of, timeout_of

CALLER = "siglip_loss()"


class Alone:
    """A ring of one rank, which sends nothing."""

    size = 1
    rank = 0
    # How many texts each rank has, if not all have as many.
    sizes: Sequence[int] | None = None

    def round(self, text: Tensor, ids: Tensor) -> "Round":
        """Pass `text` and its `ids` around."""
        return Round(self, text, ids, self.sizes or [text.shape[0]] * self.size)

    def shift(self, sent: Tensor, received: Tensor, distance: int) -> list["dist.P2POp"]:
        """The messages by which each rank sends a tensor to the rank at this distance; none for a tensor without elements."""
        raise AssertionError("a ring of one has no other rank")

    def sum(self, value: Tensor) -> Tensor:
        """`value`, which is overwritten, summed over the ranks."""
        return value


class Ring(Alone):
    """The ranks of a process group, in a circle."""

    def __init__(self, group: "dist.ProcessGroup", sizes: Sequence[int] | None) -> None:
        self.group, self.sizes = group, sizes
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def shift(self, sent: Tensor, received: Tensor, distance: int) -> list["dist.P2POp"]:
        to, source = (dist.get_global_rank(self.group, (self.rank + sign * distance) % self.size) for sign in (1, -1))
        messages = (dist.isend, sent.contiguous(), to), (dist.irecv, received, source)
        return [dist.P2POp(kind, tensor, peer, self.group) for kind, tensor, peer in messages if tensor.numel()]

    def sum(self, value: Tensor) -> Tensor:
        dist.all_reduce(value, group=self.group)
        return value


def ring_of(group: "dist.ProcessGroup | None", sizes: Sequence[int] | None = None) -> Alone:
    """The ring of a group. `sizes`: how many texts each rank has, if not all have as many."""
    return Alone() if group is None or dist.get_world_size(group) == 1 else Ring(group, sizes)


class _Lane:
    """The texts that pass around the ring in one direction, +1 or -1, for `hops` steps, and the gradients that follow them."""

    def __init__(self, ring: Alone, direction: int, hops: int, load: tuple[Tensor, ...], sizes: Sequence[int]) -> None:
        self.ring, self.direction, self.hops, self.sizes = ring, direction, hops, sizes
        # The texts that are here, with their ids, and those under way.
        self.load = self.next_load = load
        # The gradient of the texts that are here, and what the ranks before this one have summed up of it, under way.
        self.gradient: Tensor | None = None
        self.sum: Tensor | None = None
        # The gradient of this rank's own texts from all ranks of this lane.
        self.home: Tensor | None = None

    def owner(self, step: int) -> int:
        """The rank whose texts are here at this step; after the last one, this rank, whose gradient comes home."""
        return self.ring.rank if step > self.hops else (self.ring.rank - self.direction * step) % self.ring.size

    def depart(self, step: int) -> list["dist.P2POp"]:
        """Messages to be under way during this step: the texts of the next one, the gradients of the last one.

        Two ranks match their messages by order, so every rank must list them in this one.
        """
        messages = []
        if step < self.hops:
            rows = self.sizes[self.owner(step + 1)]
            self.next_load = tuple(each.new_empty((rows, *each.shape[1:])) for each in self.load)
            for sent, received in zip(self.load, self.next_load):
                messages += self.ring.shift(sent, received, self.direction)
        gradient, self.gradient = self.gradient, None
        if gradient is not None:
            self.sum = gradient.new_empty((self.sizes[self.owner(step)], *gradient.shape[1:]))
            messages += self.ring.shift(
                gradient, self.sum, self.direction if step <= self.hops else -self.direction * self.hops
            )
        return messages

    def arrive(self, step: int) -> None:
        """What `depart` of this step has sent for is here."""
        self.load = self.next_load
        if self.sum is None:
            return
        if step > self.hops:
            self.home = self.sum
        elif self.gradient is not None:
            self.gradient += self.sum
        self.sum = None


class Round:
    """Each rank's texts in turn, this rank's own first, while the next ones are under way in both directions.

    texts = ring.round(text, ids)
    for rank, text, ids in texts:
        texts.give(gradient_of(text))
    texts.collected()
    """

    def __init__(self, ring: Alone, text: Tensor, ids: Tensor, sizes: Sequence[int]) -> None:
        self._ring, self._text, self._ids = ring, text, ids
        hops = (1, ring.size // 2), (-1, (ring.size - 1) // 2)
        self._lanes = [_Lane(ring, direction, n, (text, ids), sizes) for direction, n in hops]
        self._lane: _Lane | None = None
        self._own: Tensor | None = None

    def __iter__(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The rank that owns the texts, the texts, their ids."""
        farthest = self._lanes[0].hops
        # Two steps more than there are texts, for the gradients that follow.
        for step in range(farthest + 2):
            messages = [message for lane in self._lanes for message in lane.depart(step)]
            pending = dist.batch_isend_irecv(messages) if messages else []
            if step == 0:
                yield self._ring.rank, self._text, self._ids
            for lane in self._lanes:
                if 0 < step <= lane.hops:
                    self._lane = lane
                    texts, ids = lane.load
                    yield lane.owner(step), texts, ids
            for work in pending:
                work.wait()
            for lane in self._lanes:
                lane.arrive(step)

    def give(self, to_texts: Tensor) -> None:
        """The gradient, from this rank's images, of the texts that came last. The round keeps and overwrites this tensor.

        All ranks must give one for each of the texts, or none for any.
        """
        if self._lane is None:
            self._own = to_texts
        else:
            self._lane.gradient = to_texts

    def collected(self) -> Tensor:
        """After the loop: the gradient of this rank's own texts, summed over all ranks."""
        assert self._own is not None
        for lane in self._lanes:
            if lane.home is not None:
                self._own += lane.home
                lane.home = None
        return self._own


def is_dtensor(value: object) -> bool:
    """Whether `value` is a DTensor. As long as nobody has imported their module, there are none."""
    if type(value) in PLAIN_TYPES or not isinstance(value, Tensor):
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def resolved(group: object) -> "dist.ProcessGroup | None":
    """The process group that `group=` stands for, with an error that says what it may be."""
    if group is None:
        return None
    if group == "world":
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(f'{CALLER}: group="world" needs torch.distributed.init_process_group, which was not called')
        return dist.group.WORLD
    if dist.is_available():
        if isinstance(group, DeviceMesh):
            return _group_of_mesh(group)
        if isinstance(group, dist.ProcessGroup):
            return _joined(group)
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(
                f"{CALLER}: group must hold this rank, got what torch.distributed.new_group gives to ranks outside of the group"
            )
    expected = 'a process group of this rank, a DeviceMesh of one dimension or "world"'
    raise TypeError(f"{CALLER}: group must be {expected}, got {group!r}")


def _joined(group: "dist.ProcessGroup") -> "dist.ProcessGroup":
    """`group`, if it lives and holds this rank."""
    try:
        rank = dist.get_rank(group)
    except ValueError as error:
        raise ValueError(f"{CALLER}: group must be a living process group, got one that was destroyed") from error
    if rank < 0:
        ranks = dist.get_process_group_ranks(group)
        raise ValueError(f"{CALLER}: group must hold this rank, {dist.get_rank()}, got a group of ranks {_spans(ranks)}")
    return group


def _group_of_mesh(mesh: "DeviceMesh") -> "dist.ProcessGroup":
    names = mesh.mesh_dim_names
    if mesh.ndim != 1:
        example = f'mesh["{names[0]}"]' if names else 'mesh["dp"] of init_device_mesh(..., mesh_dim_names=("dp", ...))'
        raise ValueError(
            f"{CALLER}: group must be a DeviceMesh of one dimension, got {mesh}; pass the one that the batch is split over, "
            f"e.g. {example}"
        )
    if mesh.get_coordinate() is None:
        ranks = mesh.mesh.tolist()
        raise ValueError(f"{CALLER}: group must hold this rank, {dist.get_rank()}, got a DeviceMesh of ranks {_spans(ranks)}")
    only: dist.ProcessGroup = mesh.get_group()
    return only


_has_warned = False


def warn_if_forgotten() -> None:
    """Warn, once, that no group was passed although torch.distributed runs on several ranks."""
    global _has_warned
    if _has_warned or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    _has_warned = True
    warnings.warn(
        f"{CALLER}: torch.distributed runs on {dist.get_world_size()} ranks, but group is None: each rank gets the loss of its "
        'own batch, without the texts of the other ranks. For the loss of all ranks pass group="world", a process group or a '
        "DeviceMesh of one dimension. If you want the loss of each rank's own batch, pass a group of this rank alone, such as "
        "torch.distributed.new_group([rank], use_local_synchronization=True).",
        stacklevel=4,
    )


# What each rank tells the others at each step: three numbers, and a text of so many bytes.
TEXT_SIZE = 488
_FAILURES: tuple[type[Exception], ...] = (TypeError, ValueError, RuntimeError)


def agree(
    group: "dist.ProcessGroup", told: str, error: Exception | None = None, rows: tuple[int, int] = (0, 0)
) -> list[tuple[int, int]]:
    """Compare what every rank tells, and raise the same error on all of them if one has failed or tells something else.

    One message per rank, which the hosts exchange: no device is waited for. If a rank does not call, that is an error when the
    group's timeout is over, or at once if its process has ended.

    Args:
        told: what must be the same on every rank.
        error: why this rank cannot go on.
        rows: two numbers that need not be the same.

    Returns:
        The `rows` of each rank.
    """
    kind = 0
    if error is not None:
        told = f"{type(error).__name__}: {str(error).removeprefix(f'{CALLER}: ')}"
        kind = next((i for i, each in enumerate(_FAILURES, 1) if isinstance(error, each)), 2)
    text = bytearray(told.encode()[:TEXT_SIZE].ljust(TEXT_SIZE))
    numbers = torch.tensor([kind, *rows], device="cpu").view(torch.uint8)
    own = torch.cat([numbers, torch.frombuffer(text, dtype=torch.uint8)])
    found = own.new_empty((dist.get_world_size(group), own.numel()))
    ranks = dist.get_process_group_ranks(group)
    try:
        _host_group(group).allgather([list(found)], [own]).wait()
    except RuntimeError as failure:
        raise RuntimeError(
            f"{CALLER}: expected a call on each of the ranks {_spans(ranks)}, but one has ended or did not call in time"
        ) from failure
    numbers, texts = found[:, :-TEXT_SIZE].view(torch.int64), found[:, -TEXT_SIZE:]
    if (texts == texts[0]).all():
        if error is not None:
            raise error
        return [(first, second) for _, first, second in numbers.tolist()]
    ranks_of: dict[str, list[int]] = {}
    for rank, each in zip(ranks, texts.tolist()):
        ranks_of.setdefault(bytes(each).decode(errors="replace").rstrip(), []).append(rank)
    got = "; ".join(f"on rank {_spans(those)}: {each}" for each, those in ranks_of.items())
    kinds = {kind for kind, _, _ in numbers.tolist() if kind}
    failure_type = _FAILURES[kinds.pop() - 1] if len(kinds) == 1 else ValueError
    raise failure_type(f"{CALLER}: expected the same on each rank, got {got}") from error


def _spans(ranks: Sequence[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5"."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][-1] + 1:
            spans[-1].append(rank)
        else:
            spans.append([rank])
    return ", ".join(f"{span[0]}-{span[-1]}" if len(span) > 1 else str(span[0]) for span in spans)


# For a group whose hosts cannot talk over gloo, one of the same ranks that can; it goes when the group goes.
_host_groups: "WeakKeyDictionary[dist.ProcessGroup, Any]" = WeakKeyDictionary()


def _host_group(group: "dist.ProcessGroup") -> Any:
    """A group of the same ranks, with the same timeout, that sends what lies in the host's memory."""
    if "cpu:gloo" in dist.get_backend_config(group).split(","):
        return group
    if group not in _host_groups:
        # torch.distributed.new_group would have to be called by every rank of the world. With use_local_synchronization it need
        # not, but then hangs if ranks have unequally many groups: it names the group by their number.
        store = dist.PrefixStore("torch_sigmoid/", store_of(group))  # type: ignore[attr-defined]  # torch exports it all the same
        _host_groups[group] = dist.ProcessGroupGloo(store, dist.get_rank(group), dist.get_world_size(group), timeout_of(group))
    return _host_groups[group]
