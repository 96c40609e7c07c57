"""Runs a kernel: which threads stand where, and who waits for whom.

All threads of a launch (of 2¹⁴ at a time) advance together. Threads that stand at the same instruction are a `Group`; a branch
that only some of them take splits it. The group at the lowest instruction runs first, so those that took the shorter way
wait for the others, and groups that meet become one again: divergence always reconverges. A GPU promises less; what this
machine executes is one of the orders that it may choose. Accesses of different programs that depend on the order are an error.
Where threads of one program read what another one writes, with no barrier in between, the launch runs again warp by warp, in
both orders, and must give the same: Triton lets idle threads read along whose results nobody uses.
"""

import functools
import time

import numpy as np

from .arithmetic import EXACT, from_bf16
from .instructions import FLOATS, RULES, SIGNED, WARP_WIDE, check, width_of
from .memory import UNSIGNED, Clock, Fault, GlobalMemory, Report, SharedMemory
from .program import PtxError

WARP = 32
# So many that an fp64 array with one value for each of them fits in a core's cache.
THREADS_AT_ONCE = 1 << 14
# What a register holds where a skipped instruction did not write it: a NaN in every type.
POISON = 0x7FF77FF77FF77FF7

__all__ = ["PtxError", "launch"]


@functools.cache
def _immediate(text, width):
    """A number as the instruction spells it: 0f3F800000 and 0d3FF0000000000000 give the bits of fp32 and fp64."""
    is_float = text[:2].lower() == {32: "0f", 64: "0d"}.get(width) and len(text) == 2 + width // 4
    try:
        value = int(text[2:], 16) if is_float else int(text.rstrip("U"), 0)
    except ValueError:
        raise Fault(f"unknown operand {text}", 0) from None
    return np.array([value % (1 << width)], dtype=UNSIGNED[width])


class Group:
    """Threads at one instruction: their numbers, ascending, and their registers, which hold one value or one for each."""

    def __init__(self, launch, pc, threads, registers):
        self.launch, self.pc, self.threads, self.registers = launch, pc, threads, registers
        self._numbers = None

    @property
    def numbers(self):
        """The threads' numbers in the whole launch, where `threads` count those that run together."""
        if self._numbers is None:
            size = self.launch.threads_per_program
            self._numbers = self.launch.programs[self.threads // size] * size + self.threads % size
        return self._numbers

    def split(self, chosen, pc):
        over = self.launch.program.is_over
        registers = {
            name: value if len(value) == 1 else value[chosen] for name, value in self.registers.items() if not over(name, pc)
        }
        return Group(self.launch, pc, self.threads[chosen], registers)

    def merge(self, other):
        threads = np.concatenate([self.threads, other.threads])
        order = np.argsort(threads, kind="stable")
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        registers = {}
        over = self.launch.program.is_over
        for name in self.registers.keys() | other.registers.keys():
            if over(name, self.pc):
                continue
            mine, theirs = self.registers.get(name), other.registers.get(name)
            if mine is not None and theirs is not None and len(mine) == len(theirs) == 1 and mine[0] == theirs[0]:
                registers[name] = mine
                continue
            dtype = (theirs if mine is None else mine).dtype
            registers[name] = together = np.empty(len(threads), dtype)
            together[place[: len(self.threads)]] = poison(dtype) if mine is None else mine
            together[place[len(self.threads) :]] = poison(dtype) if theirs is None else theirs
        return Group(self.launch, self.pc, threads[order], registers)

    def spread(self, value):
        """One value for each thread."""
        return np.broadcast_to(value, self.threads.shape)

    # Reading operands.

    def bits(self, operand, width):
        """As unsigned numbers of `width` bits."""
        value = self.registers.get(operand)
        if value is not None:
            return value if value.itemsize * 8 == width else value.astype(UNSIGNED[width])
        if operand in SPECIAL_REGISTERS:
            return SPECIAL_REGISTERS[operand](self.launch, self.threads).astype(UNSIGNED[width])
        if operand in self.launch.program.shared_symbols:
            return np.zeros(1, dtype=UNSIGNED[width])
        if operand[0] == "%" or operand in self.launch.program.register_widths:
            raise Fault(f"{operand} is read and was never written", 0)
        return _immediate(operand, width)

    def read(self, operand, kind):
        """As numbers of a PTX type; bf16 as fp32, bits as unsigned, a predicate as bool."""
        if kind == "pred":
            if operand not in self.registers and operand[0] != "%":
                return np.array([int(operand, 0) != 0])
            return self.predicate(operand)
        if kind == "bf16":
            return from_bf16(self.bits(operand, 16))
        width = width_of(kind)
        bits = self.bits(operand, width)
        if kind.endswith("x2") or kind[0] in "bu":
            return bits
        return bits.view((SIGNED if kind[0] == "s" else FLOATS)[width])

    def predicate(self, operand):
        value = self.registers.get(operand)
        if value is None:
            raise Fault(f"{operand} is read and was never written", 0)
        return value

    def address(self, operand):
        """One address for each thread."""
        base, offset = operand
        if base in self.launch.program.shared_symbols:
            return self.spread(np.array([offset], dtype=np.int64))
        return self.spread(self.bits(base, 64).view(np.int64) + offset)

    # Writing registers.

    def write(self, register, value, guard=None):
        """Set a register, of the threads that `guard` lets through, to numbers of any type of its width."""
        if register == "_":
            return
        value = value if value.ndim else np.atleast_1d(value)
        if value.dtype != bool:
            value = np.ascontiguousarray(value).view(UNSIGNED[8 * value.itemsize])
            width = self.launch.program.width_of_register(register)
            if width != 8 * value.itemsize:
                value = value.astype(UNSIGNED[width])
        if guard is not None and not guard.all():
            value = np.where(guard, value, self.registers.get(register, poison(value.dtype)))
        self.registers[register] = value


@functools.cache
def poison(dtype):
    return np.array([True if dtype.kind == "b" else POISON % (1 << 8 * dtype.itemsize)], dtype=dtype)


SPECIAL_REGISTERS = {
    "%tid.x": lambda launch, threads: threads % launch.threads_per_program,
    "%ctaid.x": lambda launch, threads: launch.programs[threads // launch.threads_per_program],
    "%ntid.x": lambda launch, threads: np.array([launch.threads_per_program]),
    "%nctaid.x": lambda launch, threads: np.array([launch.n_programs]),
    "%laneid": lambda launch, threads: threads % WARP,
}


class Launch:
    """What all groups of a launch share."""

    def __init__(self, program, values, memory, model, threads_per_program, n_programs):
        self.program, self.values, self.memory, self.model = program, values, memory, model
        self.report = memory.report
        self.threads_per_program = threads_per_program
        self.clock = Clock(threads_per_program, n_programs)
        self.shared: SharedMemory
        self.programs: np.ndarray  # the numbers of those that run together
        self.n_programs = n_programs
        self.hazard: str | None = None  # the first access whose order is left open

    def run(self, program_numbers, shared_bytes, order):
        """Run these programs to their end: all threads together, or from barrier to barrier one warp after the other."""
        self.programs = np.asarray(program_numbers, dtype=np.int64)
        n_threads = len(program_numbers) * self.threads_per_program
        self.shared = SharedMemory(len(program_numbers), shared_bytes, self.threads_per_program)
        threads = np.arange(n_threads, dtype=np.int64)
        warps = threads % self.threads_per_program // WARP
        in_turn = [threads] if order is None else [threads[warps == warp] for warp in range(warps.max() + 1)[::order]]
        parties = [[Group(self, 0, together, {})] for together in in_turn]
        while any(parties):
            parties = [self._run_to_barrier(groups) for groups in parties]
            arrived: dict[int, list] = {}
            for group in (group for groups in parties for group in groups):
                arrived.setdefault(group.pc, []).append(group.threads)
                group.pc += 1
            for pc, threads in arrived.items():
                programs, counts = np.unique(np.concatenate(threads) // self.threads_per_program, return_counts=True)
                if (counts != self.threads_per_program).any():
                    index = int(np.argmax(counts != self.threads_per_program))
                    found = f"{counts[index]} of {self.threads_per_program} threads of program {self.programs[programs[index]]}"
                    raise PtxError(f"{self.where(pc)}: a barrier that only {found} reach")
                self.clock.passed[self.programs[programs]] += 1
                self.shared.barrier(programs)

    def where(self, pc):
        instruction = self.program.instructions[pc]
        return f"{self.program.name}, line {instruction.line}: {instruction.text}"

    def _run_to_barrier(self, groups):
        """Until every thread has ended or stands at a barrier; returns the groups of those that do."""
        instructions = self.program.instructions
        waiting = sorted(groups, key=lambda group: group.pc)
        parked: list[Group] = []
        stalled: list[Group] = []  # at an instruction that a warp's threads must execute together

        def joined(group, others):
            """With the group that waits at the same place."""
            same = next((each for each in others if each.pc == group.pc), None)
            if same is None:
                return group
            others.remove(same)
            return group.merge(same)

        while waiting:
            group = waiting.pop(0)
            while waiting and waiting[0].pc == group.pc:
                group = group.merge(waiting.pop(0))
            limit = waiting[0].pc if waiting else len(instructions)
            n_warps = len(np.unique(group.threads // WARP)) if len(group.threads) % WARP else len(group.threads) // WARP
            while group.pc < limit:
                instruction = instructions[group.pc]
                self.report.instructions += n_warps
                guard = None
                if instruction.guard is not None:
                    register, wanted = instruction.guard
                    guard = group.predicate(register) == wanted
                if instruction.name == "bra":
                    taken = group.spread(np.True_ if guard is None else guard)
                    if taken.all():
                        group.pc = instruction.target
                    elif not taken.any():
                        group.pc += 1
                    else:
                        waiting.append(group.split(taken, instruction.target))
                        waiting.append(group.split(~taken, group.pc + 1))
                        break
                elif instruction.name in ("ret", "exit"):
                    if guard is not None:
                        raise PtxError(f"{self.where(group.pc)}: a conditional end is not known")
                    break
                elif instruction.name in ("bar", "barrier"):
                    if guard is not None or instruction.operands != ["0"]:
                        raise PtxError(f"{self.where(group.pc)}: a barrier of another kind is not known")
                    parked.append(joined(group, parked))
                    break
                elif instruction.name in WARP_WIDE and not are_whole_warps(group.threads):
                    group = joined(group, stalled)
                    (waiting if are_whole_warps(group.threads) else stalled).append(group)
                    break
                else:
                    self._execute(instruction, group, guard)
                    group.pc += 1
            else:
                waiting.append(group)
            waiting.sort(key=lambda each: each.pc)
        if stalled:
            some = self._name(int(stalled[0].threads[0]))
            raise PtxError(f"{self.where(stalled[0].pc)}: not reached by whole warps, but by {some}")
        return parked

    def _name(self, thread):
        program = self.programs[thread // self.threads_per_program]
        return f"thread {thread % self.threads_per_program} of program {program}"

    def _execute(self, instruction, group, guard):
        try:
            RULES[instruction.name].run(group, instruction, guard)
        except Fault as fault:
            raise PtxError(self._message(group, guard, fault)) from None
        if self.memory.hazard is not None and self.hazard is None:
            self.hazard = self._message(group, guard, self.memory.hazard)

    def _message(self, group, guard, fault):
        threads = group.threads if guard is None else group.threads[group.spread(guard)]
        # The index counts the threads that made an access; other faults are not of one thread.
        threads = threads if len(threads) > fault.index else group.threads
        return f"{self.where(group.pc)}: {self._name(int(threads[fault.index]))}: {fault}"


def are_whole_warps(threads):
    if len(threads) % WARP:
        return False
    warps = threads.reshape(-1, WARP)
    return not (warps[:, 0] % WARP).any() and (warps[:, -1] - warps[:, 0] == WARP - 1).all()


def launch(program, n_programs, threads, arguments, operands, *, shared=0, model=EXACT, only=None, count_sectors=False):
    """Run a kernel's programs and write their results to the tensors; returns a `Report`.

    Args:
        program: what `parse` gives.
        n_programs: the size of the grid, which has one dimension.
        threads: of a program.
        arguments: a number for each parameter; an address where that is a pointer.
        operands: the tensors, as `memory.Operand`s. A kernel may touch nothing else.
        shared: bytes of shared memory of a program.
        model: the error of approximate instructions.
        only: numbers of the programs to run; all by default.
        count_sectors: count sectors of memory too, which takes as long again.

    Raises:
        PtxError: what a GPU would get wrong, or what is not known here.
    """
    begun = time.perf_counter()
    check(program)
    if len(arguments) != len(program.parameters):
        raise PtxError(f"{program.name}: {len(arguments)} arguments for {len(program.parameters)} parameters")
    values = {}
    for (kind, name), value in zip(program.parameters, arguments):
        width = int(kind[1:])
        if kind[0] == "f":
            raise PtxError(f"{program.name}: {name} is {kind}: parameters of floating point are not known")
        if not -(1 << (width - 1)) <= int(value) < (1 << width):
            raise PtxError(f"{program.name}: {name} is {value}, which does not fit {kind}")
        values[name] = np.array([int(value) % (1 << width)], dtype=UNSIGNED[width])
    numbers = range(n_programs) if only is None else only
    at_once = max(1, THREADS_AT_ONCE // threads)

    def executed(order=None):
        report = Report(program.name, len(numbers), threads)
        state = Launch(program, values, GlobalMemory(operands, report, count_sectors), model, threads, n_programs)
        with np.errstate(all="ignore"):
            for first in range(0, len(numbers), at_once):
                state.run(numbers[first : first + at_once], shared, order)
        return state

    state = executed()
    memory, report = state.memory, state.report
    if state.hazard:
        for order in (1, -1):
            if element := memory.difference(executed(order).memory):
                raise PtxError(f"{state.hazard}; {element} depends on which warp is first")
    if only is None and (missing := memory.unwritten()):
        where = " and ".join(f"{name}[{element}]" for name, element in missing.items())
        raise PtxError(f"{program.name}: no thread of any program has written {where}")
    memory.store_back()
    report.seconds = time.perf_counter() - begun
    return report
