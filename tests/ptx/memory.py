"""Memory that knows what belongs to whom: which bytes a launch may read and write, and which thread wrote or read them last.

`GlobalMemory` holds the tensors of a launch page by page, and only the pages that are touched: a tensor of 2³¹ elements whose
first and last program run costs a few pages. `SharedMemory` holds what the programs share among their own threads.
"""

import ctypes
import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from .program import PtxError

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
PAGE = 1 << 14
READABLE, WRITABLE = 1, 2
NOBODY, SEVERAL_PROGRAMS = -1, -2
SEVERAL_THREADS = -2
# A stamp says who touched a place, and when. Bits 40 and up: how many barriers the program had passed. Bit 39: several threads
# of the program. Below: the thread's number.
STAMP_BITS = 40
STAMP_MASK = (1 << STAMP_BITS) - 1
SEVERAL = 1 << (STAMP_BITS - 1)


class Fault(PtxError):
    """An access that must not be, by one of the threads that made it: its index among them."""

    def __init__(self, message, index):
        super().__init__(message)
        self.index = int(index)


@dataclass
class Operand:
    """A tensor of a launch."""

    name: str
    tensor: object
    is_input: bool
    is_output: bool
    may_stay_unwritten: bool = False

    def __post_init__(self):
        tensor = self.tensor
        self.item = tensor.element_size()
        # `data_ptr` would copy a copy-on-write tensor.
        self.start = tensor.data_ptr() if self.is_output else getattr(tensor, "const_data_ptr", tensor.data_ptr)()
        # Dimensions of stride 0 or size 1 say nothing about where elements lie.
        steps = sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride()) if size > 1 and stride)
        self.steps = steps[::-1]
        self.extent = 1 + sum((size - 1) * stride for stride, size in steps) if tensor.numel() else 0
        self.end = self.start + self.extent * self.item
        self.distinct = math.prod(size for _, size in steps)
        self.offsets, reach = None, 0
        for stride, size in steps:
            if stride <= reach:  # rows that overlap, as of an unfolded tensor
                self.offsets = np.unique(sum(np.ix_(*(np.arange(size) * stride for stride, size in steps))))
                self.distinct = len(self.offsets)
                break
            reach += (size - 1) * stride
        self.is_dense = self.extent == self.distinct

    def has(self, offsets):
        """Whether an element of the tensor lies at these offsets, counted in elements from its first."""
        if self.offsets is not None and not self.is_dense:
            return np.isin(offsets, self.offsets)
        inside = (offsets >= 0) & (offsets < self.extent)
        if self.is_dense:
            return inside
        left = np.where(inside, offsets, 0)
        for stride, size in self.steps:
            left = left - np.minimum(left // stride, size - 1) * stride
        return inside & (left == 0)

    def describe(self, address):
        """Where an address lies, for a message."""
        byte = int(address) - self.start
        if 0 <= byte < self.end - self.start:
            return f"{self.name}[{byte // self.item}]"
        beyond = f"{byte - (self.end - self.start)} bytes past the end" if byte >= 0 else f"{-byte} bytes before the start"
        return f"{beyond} of {self.name}"


@dataclass
class Report:
    """What a launch did.

    `instructions` are issued by warps. Bytes: `requested` by threads; in `sectors` of 32 bytes that a warp's access touches,
    each access by itself; `fetched`, the sectors that a program touches, each once, as a first-level cache has it; and `ideal`,
    each element of each tensor once.
    """

    name: str = ""
    programs: int = 0
    threads: int = 0
    instructions: int = 0
    requested: Counter = field(default_factory=Counter)
    sectors: Counter = field(default_factory=Counter)
    fetched: Counter = field(default_factory=Counter)
    ideal: Counter = field(default_factory=Counter)
    seconds: float = 0.0


class GlobalMemory:
    """The tensors of a launch; what is written reaches them by `store_back`.

    Args:
        operands: the launch's tensors.
        report: where accesses are counted, sectors too with `count_sectors`.
    """

    def __init__(self, operands, report, count_sectors=False):
        self.operands = [operand for operand in operands if operand.extent]
        self.report = report
        # The sectors that each program has touched; None where nobody counts them.
        self.touched = {"load": [], "store": []} if count_sectors else None
        for kind, role in (("load", "is_input"), ("store", "is_output")):
            # A tensor may be passed several times, where a kernel has no use for one of its parameters.
            given = {
                (each.start, tuple(each.steps)): each.distinct * each.item for each in self.operands if getattr(each, role)
            }
            report.ideal[kind] = sum(given.values())
        # Tensors that overlap are one span.
        spans: list[list[int]] = []
        for operand in sorted(self.operands, key=lambda each: each.start):
            if spans and operand.start < spans[-1][1]:
                spans[-1][1] = max(operand.end, spans[-1][1])
            else:
                spans.append([operand.start, operand.end])
        self.spans = spans
        self.starts, self.ends = (np.array([span[i] for span in spans], dtype=np.int64) for i in (0, 1))
        first_pages = self.starts // PAGE
        n_pages = (self.ends - 1) // PAGE - first_pages + 1
        # The table of pages has the spans one after the other.
        self.table_offsets = np.concatenate([[0], np.cumsum(n_pages)[:-1]]).astype(np.int64) - first_pages
        self.slots = np.full(int(n_pages.sum()), -1, dtype=np.int64)
        self.pages: list[tuple[int, int]] = []  # of each slot: its span and its address
        # No access is narrower than an element: states are kept for pieces of this many bytes.
        self.piece = min((operand.item for operand in self.operands), default=1)
        self._resize(16)
        # The first access that may come before or after that of another thread of its program; a launch that has one must give
        # the same in whatever order its warps run.
        self.hazard: Fault | None = None
        # Where no input is written, too, nobody can write what another thread has read before.
        writable = [operand for operand in self.operands if operand.is_output]
        self.tracks_reads = any(
            one.start < other.end and other.start < one.end for one in self.operands if one.is_input for other in writable
        )

    def _resize(self, capacity):
        old = getattr(self, "data", None)
        pieces = capacity * PAGE // self.piece
        data, state = np.zeros(capacity * PAGE, np.uint8), np.zeros(pieces, np.uint8)
        writer, reader = np.full(pieces, NOBODY, np.int64), np.full(pieces, NOBODY, np.int64)
        if old is not None:
            data[: len(old)], state[: len(self.state)] = old, self.state
            writer[: len(self.writer)], reader[: len(self.reader)] = self.writer, self.reader
        self.data, self.state, self.writer, self.reader = data, state, writer, reader

    def _add_pages(self, span, pages):
        for page in pages:
            slot, address = len(self.pages), int(page) * PAGE
            if (slot + 1) * PAGE > len(self.data):
                self._resize(2 * slot)
            self.pages.append((span, address))
            self.slots[self.table_offsets[span] + page] = slot
            start, end = max(self.spans[span][0], address), min(self.spans[span][1], address + PAGE)
            self.data[slot * PAGE + start - address : slot * PAGE + end - address] = bytes_at(start, end - start)
            for operand in self.operands:
                low, high = max(operand.start, start), min(operand.end, end)
                if low >= high:
                    continue
                first = (low - operand.start) // operand.item
                elements = operand.has(np.arange(first, (high - operand.start) // operand.item))
                mask = np.repeat(elements, operand.item // self.piece)
                at = (slot * PAGE + low - address) // self.piece
                may = READABLE * operand.is_input | WRITABLE * operand.is_output
                self.state[at : at + len(mask)] |= np.where(mask, np.uint8(may), np.uint8(0))

    def describe(self, address):
        """The tensor that an address belongs to, or that it is nearest to."""
        inside = [each for each in self.operands if each.start <= address < each.end]
        by_distance = sorted(self.operands, key=lambda each: min(abs(address - each.start), abs(address - each.end)))
        return " and ".join(dict.fromkeys(each.describe(address) for each in inside or by_distance[:1]))

    def place(self, address, n_bytes):
        """Where in `data` an address is; out of bounds and off its alignment is a fault."""
        if not len(self.starts):
            raise Fault("an access, but the launch has no memory", 0)
        span = np.searchsorted(self.starts, address, "right") - 1
        outside = (span < 0) | (address + n_bytes > self.ends[span])
        if outside.any():
            at = int(np.argmax(outside))
            raise Fault(f"out of bounds: {n_bytes} bytes at {self.describe(int(address[at]))}", at)
        misaligned = address & (n_bytes - 1)
        if misaligned.any():
            at = int(np.argmax(misaligned != 0))
            raise Fault(f"misaligned: {n_bytes} bytes at {self.describe(int(address[at]))}", at)
        page = address // PAGE
        slot = self.slots[self.table_offsets[span] + page]
        if (slot < 0).any():
            new = slot < 0
            for each in np.unique(span[new]):
                self._add_pages(int(each), np.unique(page[new & (span == each)]))
            slot = self.slots[self.table_offsets[span] + page]
        return slot * PAGE + (address & (PAGE - 1))

    def _count(self, kind, place, n_bytes, threads):
        self.report.requested[kind] += n_bytes * len(place)
        if self.touched is not None:
            warps = np.unique((threads // 32 << 40) + place // 32)
            self.report.sectors[kind] += 32 * len(warps)
            programs = (warps >> 40) // (self.report.threads // 32)
            self.touched[kind].append(np.unique((programs << 40) + (warps & ((1 << 40) - 1))))

    def _pieces(self, place, width):
        """The pieces of a value of `width` bits at `place`, one array for each."""
        if width < 8 * self.piece:
            raise Fault(f"{width // 8} bytes, narrower than any element", 0)
        for byte in range(0, width // 8, self.piece):
            yield (place + byte) // self.piece

    def load(self, address, width, n, threads, clock):
        """`n` neighbouring values of `width` bits for each thread."""
        place = self.place(address, width * n // 8)
        self._count("load", place, width * n // 8, threads)
        values = []
        for k in range(n):
            first = place + k * (width // 8)
            for at in self._pieces(first, width):
                unreadable = (self.state[at] & READABLE) == 0
                if unreadable.any():
                    index = int(np.argmax(unreadable))
                    where = self.describe(int(address[index]) + k * width // 8)
                    raise Fault(f"reads memory that is no input and that nobody has written: {where}", index)
                if (self.state[at] & WRITABLE).any():
                    self._check(self.writer[at], address, threads, clock, "reads what {} writes: {}")
                    if self.tracks_reads:
                        clock.note_readers(self.reader, at, threads)
            values.append(self.data.view(UNSIGNED[width])[first // (width // 8)])
        return values

    def store(self, address, width, values, threads, clock):
        """Neighbouring values of `width` bits, an array over threads for each."""
        n_bytes = width * len(values) // 8
        place = self.place(address, n_bytes)
        self._count("store", place, n_bytes, threads)
        data = self.data.view(UNSIGNED[width])
        for k, value in enumerate(values):
            first = place + k * (width // 8)
            at_value = first // (width // 8)
            clash = np.zeros(len(place), bool)
            for at in self._pieces(first, width):
                forbidden = (self.state[at] & WRITABLE) == 0
                if forbidden.any():
                    index = int(np.argmax(forbidden))
                    raise Fault(f"writes to no output: {self.describe(int(address[index]) + k * width // 8)}", index)
                if self.tracks_reads:
                    self._check(self.reader[at], address, threads, clock, "writes what {} also reads: {}")
                before = self.writer[at]
                other = clock.by_another(before, threads)
                clash |= other & clock.concurrent(before, threads) & (data[at_value] != value)
                self.writer[at] = clock.stamp(threads)
                self.state[at] |= READABLE
            data[at_value] = value
            clash |= data[at_value] != value  # two threads in this instruction
            if clash.any():
                index = int(np.argmax(clash))
                where = self.describe(int(address[index]) + k * width // 8)
                raise Fault(f"two threads write different values: {where}", index)

    def _check(self, before, address, threads, clock, message):
        """A fault where a thread of another program touched the place; of its own, with no barrier in between, a hazard."""
        race = clock.by_another(before, threads)
        if race.any():
            race &= clock.concurrent(before, threads)
        if race.any():
            across = race & ~clock.of_one_program(before, threads)
            index = int(np.argmax(across if across.any() else race))
            other = clock.describe(int(before[index]))
            fault = Fault(message.format(other, self.describe(int(address[index]))), index)
            if across.any():
                raise fault
            self.hazard = self.hazard or fault

    def difference(self, other):
        """An element that was written otherwise in another run of the launch, or None."""
        for slot, (span, address) in enumerate(self.pages):
            theirs = int(other.slots[self.table_offsets[span] + address // PAGE])
            if theirs < 0:
                return self.describe(max(self.spans[span][0], address))
            mine, yours = (data[n * PAGE : (n + 1) * PAGE] for data, n in ((self.data, slot), (other.data, theirs)))
            differ = mine != yours
            if differ.any():
                return self.describe(address + int(np.argmax(differ)))
        return None

    def store_back(self):
        """Copy what was written to the tensors, and sum up what was counted."""
        for kind, touched in (self.touched or {}).items():
            self.report.fetched[kind] = 32 * len(np.unique(np.concatenate(touched))) if touched else 0
        for slot, (span, address) in enumerate(self.pages):
            start, end = max(self.spans[span][0], address), min(self.spans[span][1], address + PAGE)
            inside = slice(slot * PAGE + start - address, slot * PAGE + end - address)
            pieces = slice(inside.start // self.piece, -(-inside.stop // self.piece))
            written = self.writer[pieces] != NOBODY
            if written.any():
                target = bytes_at(start, end - start)
                written = np.repeat(written, self.piece)
                target[written] = self.data[inside][written]

    def unwritten(self):
        """The outputs of which an element was never written, with one such element each."""
        found = {}
        for operand in self.operands:
            if not operand.is_output or operand.may_stay_unwritten:
                continue
            for first in range(0, operand.extent, PAGE):
                elements = np.arange(first, min(first + PAGE, operand.extent))
                elements = elements[operand.has(elements)]
                address = operand.start + elements * operand.item
                span = np.searchsorted(self.starts, address, "right") - 1
                slot = self.slots[self.table_offsets[span] + address // PAGE]
                at = (slot * PAGE + (address & (PAGE - 1))) // self.piece
                pieces = np.maximum(at, 0)[:, None] + np.arange(operand.item // self.piece)
                missing = (slot < 0) | (self.writer[pieces] == NOBODY).any(1)
                if missing.any():
                    found[operand.name] = int(elements[np.argmax(missing)])
                    break
        return found


def bytes_at(address, size):
    """The process's own memory, as an array."""
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=np.uint8)


class Clock:
    """How many barriers each program has passed: accesses of its threads on the two sides of one do not race."""

    def __init__(self, threads_per_program, n_programs):
        self.threads = threads_per_program
        self.passed = np.zeros(n_programs, dtype=np.int64)

    def stamp(self, threads):
        return (self.passed[threads // self.threads] << STAMP_BITS) | threads

    @staticmethod
    def by_another(before, threads):
        return (before != NOBODY) & ((before & STAMP_MASK) != threads)

    def of_one_program(self, before, threads):
        return (before != SEVERAL_PROGRAMS) & ((before & (SEVERAL - 1)) // self.threads == threads // self.threads)

    def concurrent(self, before, threads):
        """Whether a stamp and an access now, both of other threads, are in no order."""
        return ~(self.of_one_program(before, threads) & ((before >> STAMP_BITS) < self.passed[threads // self.threads]))

    def note_readers(self, reader, at, threads):
        """Leave a stamp at each place; one for several threads where there was one of another thread."""
        mine = self.stamp(threads)

        def joined(before):
            together = np.where(self.of_one_program(before, threads), mine | SEVERAL, SEVERAL_PROGRAMS)
            return np.where(self.by_another(before, threads), together, mine)

        reader[at] = joined(reader[at])
        # Where several threads of this instruction read one place, one of them has left its stamp: the others join it.
        left = reader[at]
        reader[at[self.by_another(left, threads) & (left != SEVERAL_PROGRAMS)]] |= SEVERAL
        reader[at[~self.of_one_program(left, threads)]] = SEVERAL_PROGRAMS

    def describe(self, stamp):
        if stamp == SEVERAL_PROGRAMS:
            return "threads of several programs"
        thread = stamp & (SEVERAL - 1)
        who = "several threads" if stamp & SEVERAL else f"thread {thread % self.threads}"
        return f"{who} of program {thread // self.threads}"


class SharedMemory:
    """The shared memory of several programs, one after the other. Between two barriers a place belongs to its writer."""

    def __init__(self, n_programs, size, threads_per_program):
        self.size, self.threads = size, threads_per_program
        self.stride = size + (-size) % 16 + 16
        self.data = np.zeros(n_programs * self.stride, np.uint8)
        self.written = np.zeros(len(self.data), bool)
        self.writer = np.full(len(self.data), NOBODY, np.int64)
        self.reader = np.full(len(self.data), NOBODY, np.int64)

    def place(self, address, n_bytes, threads):
        outside = (address < 0) | (address + n_bytes > self.size)
        if outside.any():
            raise Fault(f"out of bounds of {self.size} bytes of shared memory", np.argmax(outside))
        misaligned = address & (n_bytes - 1)
        if misaligned.any():
            raise Fault(f"misaligned: {n_bytes} bytes of shared memory", np.argmax(misaligned != 0))
        return address + threads // self.threads * self.stride

    def load(self, address, width, n, threads):
        place = self.place(address, width * n // 8, threads)
        values = []
        for k in range(n):
            first = place + k * (width // 8)
            for byte in range(width // 8):
                at = first + byte
                if not self.written[at].all():
                    raise Fault("reads shared memory that nobody has written", np.argmin(self.written[at]))
                self._check(self.writer[at], threads, "reads shared memory that another thread writes, with no barrier between")
                before = self.reader[at]
                self.reader[at] = np.where((before != NOBODY) & (before != threads), SEVERAL_THREADS, threads)
                self.reader[at[self.reader[at] != threads]] = SEVERAL_THREADS
            values.append(self.data.view(UNSIGNED[width])[first // (width // 8)])
        return values

    def store(self, address, width, values, threads):
        place = self.place(address, width * len(values) // 8, threads)
        data = self.data.view(UNSIGNED[width])
        for k, value in enumerate(values):
            first = place + k * (width // 8)
            at_value = first // (width // 8)
            clash = np.zeros(len(place), bool)
            for byte in range(width // 8):
                at = first + byte
                self._check(self.reader[at], threads, "writes shared memory that another thread reads, with no barrier between")
                before = self.writer[at]
                clash |= (before != NOBODY) & (before != threads) & (data[at_value] != value)
                self.writer[at] = threads
                self.written[at] = True
            data[at_value] = value
            clash |= data[at_value] != value
            if clash.any():
                raise Fault("two threads write different values to shared memory", np.argmax(clash))

    @staticmethod
    def _check(before, threads, message):
        race = (before != NOBODY) & (before != threads)
        if race.any():
            raise Fault(message, np.argmax(race))

    def barrier(self, programs):
        for who in (self.writer, self.reader):
            who.reshape(-1, self.stride)[programs] = NOBODY
