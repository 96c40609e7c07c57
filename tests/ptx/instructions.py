"""What each instruction does, as the PTX ISA says. A name, type, modifier or operand that is not here is an error.

A rule has the types and modifiers that are known, and `run(group, instruction, guard)`. Most instructions are functions of
their operands' values alone: `@values` reads the operands as numbers of the instruction's type and writes the result.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .arithmetic import canonical, flush, fma32, fma64, from_bf16, saturate, to_bf16, to_f16
from .memory import UNSIGNED, Fault
from .program import Program, PtxError

SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOATS = {16: np.float16, 32: np.float32, 64: np.float64}
FULL_WARP = 0xFFFFFFFF
# The threads of a warp execute these together.
WARP_WIDE = frozenset(("shfl", "redux", "ldmatrix", "stmatrix"))


@dataclass
class Rule:
    run: Callable
    types: frozenset
    modifiers: frozenset


RULES: dict[str, Rule] = {}


def rule(names: str, types: str, modifiers: str = ""):
    """Make a function of (group, instruction, guard) the rule of these names."""

    def add(run):
        for name in names.split():
            RULES[name] = Rule(run, frozenset(types.split()), frozenset(modifiers.split()))
        return run

    return add


def values(names: str, types: str, modifiers: str = ""):
    """Make a function of (instruction, *operand values) the rule of these names."""

    def add(function):
        @rule(names, types, modifiers)
        def run(group, instruction, guard):
            destination, *sources = instruction.operands
            kinds = [instruction.type] * len(sources)
            if len(instruction.types) == 2:  # 16-bit operands of an fp32 sum: add.f32.bf16
                kinds[-1] = instruction.types[0]
            operands = [group.read(source, kind) for source, kind in zip(sources, kinds)]
            group.write(destination, function(instruction, *operands), guard)

        return function

    return add


def check(program: Program):
    """An error unless every instruction is known, with its types and modifiers."""
    if program.is_known:
        return
    for instruction in program.instructions:
        known = RULES.get(instruction.name)
        where = f"{program.name}, line {instruction.line}: {instruction.text}"
        if known is None:
            raise PtxError(f"{where}: unknown instruction {instruction.name}")
        for found, among in ((instruction.types, known.types), (instruction.modifiers, known.modifiers)):
            if unknown := [each for each in found if each not in among]:
                raise PtxError(f"{where}: {instruction.name} with {', '.join(unknown)} is not known")
    program.is_known = True


@functools.cache
def width_of(kind):
    """How many bits a type has."""
    return {"pred": 1, "bf16": 16, "f16x2": 32, "bf16x2": 32, "f32x2": 64}.get(kind) or int(kind[1:])


def is_float(kind):
    return kind[0] == "f" or kind == "bf16"


def halves(pair, width):
    """The lower and the upper half of each register."""
    return [(pair >> UNSIGNED[2 * width](shift)).astype(UNSIGNED[width]) for shift in (0, width)]


def joined(low, high):
    """Two halves as one register."""
    width = 8 * low.itemsize
    wide = UNSIGNED[2 * width]
    return low.astype(wide) | (high.astype(wide) << wide(width))


# --- control: machine.py executes these ---------------------------------------------------------------------------------


def _by_machine(group, instruction, guard):
    raise AssertionError(f"the machine executes {instruction.name}")


rule("bra", "", "uni")(_by_machine)
rule("ret exit", "")(_by_machine)
rule("bar barrier", "", "sync")(_by_machine)


# --- moves --------------------------------------------------------------------------------------------------------------


@rule("mov", "b16 b32 b64 u16 u32 u64 s32 s64 f32 f64 pred")
def _mov(group, instruction, guard):
    destination, source = instruction.operands
    width = width_of(instruction.type)
    if isinstance(source, list):
        part = width // len(source)
        value = np.zeros(1, dtype=UNSIGNED[width])
        for k, each in enumerate(source):
            value = value | (group.bits(each, part).astype(UNSIGNED[width]) << UNSIGNED[width](k * part))
        group.write(destination, value, guard)
    elif isinstance(destination, list):
        part = width // len(destination)
        value = group.bits(source, width)
        for k, each in enumerate(destination):
            group.write(each, (value >> UNSIGNED[width](k * part)).astype(UNSIGNED[part]), guard)
    else:
        group.write(destination, group.read(source, instruction.type), guard)


@rule("cvta", "u64", "to global")
def _cvta(group, instruction, guard):
    destination, source = instruction.operands
    group.write(destination, group.bits(source, 64), guard)


@rule("selp", "b16 b32 b64 u16 u32 u64 s32 s64 f32 f64")
def _selp(group, instruction, guard):
    destination, yes, no, predicate = instruction.operands
    width = width_of(instruction.type)
    group.write(destination, np.where(group.predicate(predicate), group.bits(yes, width), group.bits(no, width)), guard)


def extended(group, register, value, kind):
    """Bits of a signed type as wide as a register, with copies of their sign; others as they are."""
    if kind[0] != "s":
        return value
    width = width_of(kind)
    return value.view(SIGNED[width]).astype(SIGNED[group.launch.program.width_of_register(register)])


def _chosen(group, guard):
    """The threads that an access is made by: which of the group's, or all."""
    return slice(None) if guard is None else np.flatnonzero(group.spread(guard))


@rule("ld", "b8 b16 b32 b64 u8 u16 u32 u64 s8 s16 s32 s64 f32 f64", "param global shared ::cta v2 v4 nc")
def _ld(group, instruction, guard):
    destination, source = instruction.operands
    width = width_of(instruction.type)
    if instruction.has("param"):
        name, offset = source
        if offset or name not in group.launch.values:
            raise Fault(f"unknown parameter {name}+{offset}", 0)
        group.write(
            destination,
            extended(group, destination, group.launch.values[name].astype(UNSIGNED[width]), instruction.type),
            guard,
        )
        return
    destinations = destination if isinstance(destination, list) else [destination]
    chosen = _chosen(group, guard)
    address = group.address(source)[chosen]
    if len(address) == 0:
        loaded = [np.zeros(0, dtype=UNSIGNED[width])] * len(destinations)
    elif instruction.has("shared"):
        loaded = group.launch.shared.load(address, width, len(destinations), group.threads[chosen])
    elif instruction.has("global"):
        loaded = group.launch.memory.load(address, width, len(destinations), group.numbers[chosen], group.launch.clock)
    else:
        raise Fault("an address space that is not known", 0)
    for register, value in zip(destinations, loaded):
        value = extended(group, register, value, instruction.type)
        if guard is not None:
            whole = np.zeros(group.threads.shape, dtype=value.dtype)
            whole[chosen] = value
            value = whole
        group.write(register, value, None if guard is None else group.spread(guard))


@rule("st", "b8 b16 b32 b64 u8 u16 u32 u64 f32 f64", "global shared ::cta v2 v4")
def _st(group, instruction, guard):
    destination, source = instruction.operands
    width = width_of(instruction.type)
    sources = source if isinstance(source, list) else [source]
    chosen = _chosen(group, guard)
    address = group.address(destination)[chosen]
    if len(address) == 0:
        return
    stored = [group.spread(group.bits(each, width))[chosen] for each in sources]
    if instruction.has("shared"):
        group.launch.shared.store(address, width, stored, group.threads[chosen])
    elif instruction.has("global"):
        group.launch.memory.store(address, width, stored, group.numbers[chosen], group.launch.clock)
    else:
        raise Fault("an address space that is not known", 0)


# --- among the threads of a warp ------------------------------------------------------------------------------------------


def _warps(group, value):
    return group.spread(value).reshape(-1, 32)


def _require_all(group, guard, mask):
    if guard is not None:
        raise Fault("some threads of a warp skip what all must execute", 0)
    if (group.bits(mask, 32) != FULL_WARP).any():
        raise Fault("not among all threads of a warp", 0)


@rule("shfl", "b32", "sync bfly idx up down")
def _shfl(group, instruction, guard):
    destination, source, b, c, mask = instruction.operands
    _require_all(group, guard, mask)
    if "|" in destination:
        raise Fault("a shuffle that also tells who took part is not known", 0)
    lane = np.arange(32)
    b, c = (_warps(group, group.bits(each, 32)).astype(np.int64) for each in (b, c))
    b, segment, clamp = b & 31, (c >> 8) & 31, c & 31
    lowest, highest = lane & segment, (lane & segment) | (clamp & ~segment)
    if instruction.has("bfly"):
        other = lane ^ b
    elif instruction.has("idx"):
        other = lowest | (b & ~segment)
    else:
        other = lane - b if instruction.has("up") else lane + b
    inside = other >= highest if instruction.has("up") else other <= highest
    other = np.where(inside, other, lane)
    group.write(destination, np.take_along_axis(_warps(group, group.bits(source, 32)), other, 1).ravel())


REDUCTIONS = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


@rule("redux", "b32 u32 s32", "sync add min max and or xor")
def _redux(group, instruction, guard):
    destination, source, mask = instruction.operands
    _require_all(group, guard, mask)
    value = _warps(group, group.read(source, instruction.type))
    (operation,) = (REDUCTIONS[each] for each in instruction.modifiers if each in REDUCTIONS)
    group.write(destination, np.repeat(operation.reduce(value, axis=1, dtype=value.dtype), 32))


def _matrix_places(group, instruction, guard, address, n_matrices):
    """Where in shared memory each thread's two 16-bit elements of each 8×8 matrix lie.

    Thread t gives the address of row t % 8 of matrix t // 8, and holds elements 2·(t % 4) and the next of row t // 4; with
    .trans of column t // 4.
    """
    if guard is not None:
        raise Fault("some threads of a warp skip what all must execute", 0)
    rows = _warps(group, group.address(address))
    if (rows[:, : 8 * n_matrices] % 16).any():
        raise Fault("misaligned: rows of a matrix in shared memory", 0)
    lane = np.arange(32)
    line, first = lane // 4, lane % 4 * 2
    for k in range(n_matrices):
        if instruction.has("trans"):
            yield [(rows[:, 8 * k + first + half] + 2 * line).ravel() for half in (0, 1)]
        else:
            yield [(rows[:, 8 * k + line] + 2 * (first + half)).ravel() for half in (0, 1)]


@rule("ldmatrix", "b16", "sync aligned m8n8 x1 x2 x4 trans shared")
def _ldmatrix(group, instruction, guard):
    registers, address = instruction.operands
    for register, places in zip(registers, _matrix_places(group, instruction, guard, address, len(registers))):
        group.write(register, joined(*(group.launch.shared.load(place, 16, 1, group.threads)[0] for place in places)))


@rule("stmatrix", "b16", "sync aligned m8n8 x1 x2 x4 trans shared")
def _stmatrix(group, instruction, guard):
    address, registers = instruction.operands
    for register, places in zip(registers, _matrix_places(group, instruction, guard, address, len(registers))):
        for place, half in zip(places, halves(group.spread(group.bits(register, 32)), 16)):
            group.launch.shared.store(place, 16, [half], group.threads)


# --- arithmetic -----------------------------------------------------------------------------------------------------------

NUMBERS = "u16 s16 u32 s32 u64 s64 f32 f64 f32x2"


def _arithmetic(instruction, operation, *operands):
    """IEEE for floats, with .ftz and .sat; modulo the width for integers; each half of a pair for itself."""
    kind = instruction.types[0]
    if kind in ("f16", "bf16"):
        raise Fault("16-bit arithmetic is not known", 0)
    if instruction.type == "f16":
        operands = [each.astype(np.float32) for each in operands]
    if kind == "f32x2":
        if instruction.has("sat"):
            raise Fault("pairs with .sat are not known", 0)
        lows, highs = zip(*([half.view(np.float32) for half in halves(pair, 32)] for pair in operands))
        results = [_float_operation(instruction, operation, *each) for each in (lows, highs)]
        return joined(*(each.astype(np.float32).view(np.uint32) for each in results))
    if kind[0] == "f":
        return _float_operation(instruction, operation, *operands)
    return operation(*operands)


def _float_operation(instruction, operation, *operands):
    if instruction.has("ftz"):
        return _saturated(instruction, canonical(flush(operation(*map(flush, operands)))))
    return _saturated(instruction, canonical(operation(*operands)))


def _saturated(instruction, result):
    return saturate(result) if instruction.has("sat") else result


@values("add", f"{NUMBERS} f16 bf16", "rn ftz sat")
def _add(instruction, a, b):
    return _arithmetic(instruction, np.add, a, b)


@values("sub", f"{NUMBERS} f16 bf16", "rn ftz sat")
def _sub(instruction, a, b):
    return _arithmetic(instruction, np.subtract, a, b)


def _widened(value):
    kinds = SIGNED if value.dtype.kind == "i" else UNSIGNED
    return value.astype(kinds[16 * value.itemsize])


@values("mul", NUMBERS, "rn ftz sat lo hi wide")
def _mul(instruction, a, b):
    if instruction.has("wide"):
        return _widened(a) * _widened(b)
    if instruction.has("hi"):
        if a.itemsize == 8:
            raise Fault("mul.hi of 64 bits is not known", 0)
        return ((_widened(a) * _widened(b)) >> _widened(a).dtype.type(8 * a.itemsize)).astype(a.dtype)
    return _arithmetic(instruction, np.multiply, a, b)


@rule("mad", "u32 s32 u64 s64", "lo wide")
def _mad(group, instruction, guard):
    destination, a, b, c = instruction.operands
    kind = instruction.type
    a, b = group.read(a, kind), group.read(b, kind)
    if instruction.has("wide"):
        a, b = _widened(a), _widened(b)
        kind = f"{kind[0]}{2 * width_of(kind)}"
    group.write(destination, a * b + group.read(c, kind), guard)


@values("fma", "f32 f64 f32x2 f16 bf16", "rn rm ftz sat")
def _fma(instruction, a, b, c):
    if instruction.has("rm") and instruction.type != "f32":
        raise Fault("fma.rm of f32 only is known", 0)
    rounding = "rm" if instruction.has("rm") else "rn"
    fused = fma64 if instruction.type == "f64" else lambda a, b, c: fma32(a, b, c, rounding)
    return _arithmetic(instruction, fused, a, b, c)


def _divided(group, guard, a, b):
    """Quotient and remainder of integers, rounded toward zero, for the threads that `guard` lets through."""
    by_zero = group.spread(b == 0) if guard is None else group.spread(b == 0)[group.spread(guard)]
    if by_zero.any():
        raise Fault("an integer division by 0", np.argmax(by_zero))
    b = np.where(b == 0, b.dtype.type(1), b)
    remainder = np.fmod(a, b)
    return (a - remainder) // b, remainder


@rule("div", "u32 s32 u64 s64 f32 f64", "rn approx full ftz")
def _div(group, instruction, guard):
    destination, a, b = instruction.operands
    a, b = group.read(a, instruction.type), group.read(b, instruction.type)
    if instruction.type[0] != "f":
        group.write(destination, _divided(group, guard, a, b)[0], guard)
    elif instruction.has("rn"):
        group.write(destination, _float_operation(instruction, np.divide, a, b), guard)
    else:
        group.write(
            destination, _float_operation(instruction, _approximate_quotient(instruction, group.launch.model), a, b), guard
        )


def _approximate_quotient(instruction, model):
    full = instruction.has("full")

    def divide(a, b):
        exact = np.atleast_1d(a.astype(np.float64) / b.astype(np.float64))
        result = model.round("div.full" if full else "div", exact, a.view(np.uint32), b.view(np.uint32))
        if full:
            return result
        # For 2^126 < |b| < 2^128 div.approx gives 0, or NaN of an infinite dividend.
        beyond = (np.abs(b) > np.float32(2.0**126)) & np.isfinite(b)
        zero = np.copysign(np.float32(0), exact.astype(np.float32))
        return np.where(beyond, np.where(np.isinf(a), np.float32(np.nan), zero), result)

    return divide


@rule("rem", "u32 s32 u64 s64")
def _rem(group, instruction, guard):
    destination, a, b = instruction.operands
    group.write(destination, _divided(group, guard, *(group.read(each, instruction.type) for each in (a, b)))[1], guard)


def approximate(name, function, modifiers="approx ftz", special=None):
    """A rule for an instruction of one fp32 operand, whose error is the model's."""

    @rule(name, "f32", modifiers)
    def run(group, instruction, guard):
        destination, source = instruction.operands

        def rounded(x):
            exact = np.atleast_1d(function(x.astype(np.float64)))
            if instruction.has("rn"):
                return exact.astype(np.float32)
            result = group.launch.model.round(name, exact, x.view(np.uint32))
            return result if special is None else special(x, result)

        group.write(destination, _float_operation(instruction, rounded, group.read(source, "f32")), guard)

    return run


def _exact_powers(x, result):
    """An assumption, not the ISA's word: 2^x of an integer is exact, which libdevice's tanh of fp64 takes for granted."""
    return np.where(x == np.rint(x), np.exp2(x.astype(np.float64)).astype(np.float32), result)


approximate("ex2", np.exp2, special=_exact_powers)
approximate("lg2", np.log2)
approximate("rsqrt", lambda x: 1.0 / np.sqrt(x))
approximate("sqrt", np.sqrt, "approx rn ftz")
approximate("tanh", np.tanh, "approx")
_rcp32 = approximate("rcp", lambda x: 1.0 / x, "approx rn ftz")


@rule("rcp", "f32 f64", "approx rn ftz")
def _rcp(group, instruction, guard):
    destination, source = instruction.operands
    if instruction.type == "f32":
        _rcp32(group, instruction, guard)
    elif instruction.has("rn"):
        group.write(destination, 1.0 / group.read(source, "f64"), guard)
    else:
        # From the upper 32 bits of the operand to those of the result; the lower ones are 0.
        bits = group.bits(source, 64)
        x = (bits & np.uint64(0xFFFFFFFF00000000)).view(np.float64)
        upper = (flush(1.0 / flush(x)).view(np.uint64) + np.uint64(0x80000000)) >> np.uint64(32)
        magnitude = upper & np.uint64(0x7FFFFFFF)
        movable = (magnitude != 0) & (magnitude < np.uint64(0x7FF00000))
        upper = np.where(movable, (upper.astype(np.int64) + group.launch.model.step("rcp64", bits)).astype(np.uint64), upper)
        group.write(destination, upper << np.uint64(32), guard)


def _sign_bits(kind):
    return {"f16x2": 0x80008000, "bf16x2": 0x80008000}.get(kind) or 1 << (width_of(kind) - 1)


@rule("neg abs", "s16 s32 s64 f16 bf16 f16x2 bf16x2 f32 f64", "ftz")
def _sign(group, instruction, guard):
    destination, source = instruction.operands
    kind, negates = instruction.type, instruction.name == "neg"
    if kind[0] == "s":
        value = group.read(source, kind)
        group.write(destination, -value if negates else np.abs(value), guard)
        return
    width = width_of(kind)
    bits, sign = group.bits(source, width), UNSIGNED[width](_sign_bits(kind))
    bits = bits ^ sign if negates else bits & ~sign
    group.write(destination, flush(bits.view(FLOATS[width])) if instruction.has("ftz") else bits, guard)


@values("min max", "u16 s16 u32 s32 u64 s64 f32 f64", "ftz NaN")
def _extreme(instruction, a, b):
    is_min = instruction.name == "min"
    if instruction.type[0] != "f":
        return np.minimum(a, b) if is_min else np.maximum(a, b)
    if instruction.has("ftz"):
        a, b = flush(a), flush(b)
    result = np.fmin(a, b) if is_min else np.fmax(a, b)
    # -0 is less than +0.
    negative = np.signbit(a) | np.signbit(b) if is_min else np.signbit(a) & np.signbit(b)
    result = np.where((a == 0) & (b == 0), np.where(negative, a.dtype.type(-0.0), a.dtype.type(0.0)), result)
    if instruction.has("NaN"):
        result = canonical(np.where(np.isnan(a) | np.isnan(b), a.dtype.type(np.nan), result))
    return result


# --- comparisons ----------------------------------------------------------------------------------------------------------

COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
UNORDERED = {f"{name}u": name for name in ("eq", "ne", "lt", "le", "gt", "ge")}
ALL_COMPARISONS = f"{' '.join(COMPARISONS)} {' '.join(UNORDERED)} num nan"


def compare(name, a, b):
    if a.dtype.kind != "f":
        return COMPARISONS[name](a, b)
    unordered = np.isnan(a) | np.isnan(b)
    if name in ("num", "nan"):
        return unordered if name == "nan" else ~unordered
    if name in UNORDERED:
        return COMPARISONS[UNORDERED[name]](a, b) | unordered
    return COMPARISONS[name](a, b) & ~unordered


@rule("setp", "b16 b32 b64 u16 u32 u64 s16 s32 s64 f16 bf16 f16x2 bf16x2 f32 f64", f"{ALL_COMPARISONS} ftz")
def _setp(group, instruction, guard):
    destination, *sources = instruction.operands
    if len(sources) != 2:
        raise Fault("setp that combines with another predicate is not known", 0)
    name, kind = instruction.modifiers[0], instruction.type
    if kind.endswith("x2"):
        pairs = [halves(group.bits(source, 32), 16) for source in sources]
        for register, a, b in zip(destination.split("|"), *pairs):
            a, b = (from_bf16(each) if kind == "bf16x2" else each.view(np.float16) for each in (a, b))
            group.write(register, compare(name, a, b), guard)
        return
    a, b = (group.read(source, kind) for source in sources)
    if instruction.has("ftz"):
        a, b = flush(a), flush(b)
    if kind[0] == "b" and kind != "bf16" and name not in ("eq", "ne"):
        raise Fault("bits have no order", 0)
    group.write(destination, compare(name, a, b), guard)


# --- bits -----------------------------------------------------------------------------------------------------------------

BITS = "pred b16 b32 b64"


@values("and", BITS)
def _and(instruction, a, b):
    return a & b


@values("or", BITS)
def _or(instruction, a, b):
    return a | b


@values("xor", BITS)
def _xor(instruction, a, b):
    return a ^ b


@values("not", BITS)
def _not(instruction, a):
    return ~a


@rule("shl shr", "b16 b32 b64 u16 u32 u64 s16 s32 s64")
def _shift(group, instruction, guard):
    destination, source, amount = instruction.operands
    kind = instruction.type
    value, amount, width = group.read(source, kind), group.bits(amount, 32), width_of(kind)
    shift = np.minimum(amount, width - 1).astype(value.dtype)
    result = value << shift if instruction.name == "shl" else value >> shift
    if kind[0] != "s":
        result = np.where(amount >= width, value.dtype.type(0), result)
    group.write(destination, result, guard)


@rule("bfe", "u32 s32")
def _bfe(group, instruction, guard):
    destination, source, position, length = instruction.operands
    position, length = (group.bits(each, 32).astype(np.int64) & 255 for each in (position, length))
    value = group.read(source, instruction.type).astype(np.int64)
    field = (value >> np.minimum(position, 63)) & ((np.int64(1) << np.minimum(length, 32)) - 1)
    if instruction.type == "s32":
        sign = (value >> np.minimum(position + length - 1, 31)) & 1
        field = np.where((length > 0) & (sign == 1), field - (np.int64(1) << np.minimum(length, 32)), field)
    group.write(destination, field.astype(np.uint32), guard)


@values("popc", "b32")
def _popc(instruction, a):
    return np.bitwise_count(a).astype(np.uint32)


@values("prmt", "b32")
def _prmt(instruction, a, b, selector):
    wide = joined(a, b)
    result = np.zeros(1, dtype=np.uint32)
    for k in range(4):
        nibble = (selector >> np.uint32(4 * k)) & np.uint32(15)
        byte = ((wide >> ((nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(255)).astype(np.uint32)
        sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
        result = result | (np.where(nibble & np.uint32(8), sign, byte) << np.uint32(8 * k))
    return result


# --- conversions ----------------------------------------------------------------------------------------------------------

TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
CONVERTED = "u8 s8 u16 s16 u32 s32 u64 s64 f16 bf16 f16x2 bf16x2 f32 f64"


@rule("cvt", CONVERTED, f"rn ftz sat {' '.join(TO_INTEGER)}")
def _cvt(group, instruction, guard):
    destination, *sources = instruction.operands
    to, source = instruction.types
    if to.endswith("x2"):
        narrow = to_bf16 if to == "bf16x2" else to_f16
        high, low = (narrow(group.read(each, "f32")) for each in sources)
        group.write(destination, joined(*np.broadcast_arrays(low, high)), guard)
        return
    value = group.read(sources[0], source)
    modes = [TO_INTEGER[each] for each in instruction.modifiers if each in TO_INTEGER]
    if is_float(to) and is_float(source):
        result = _float_to_float(instruction, value, to, source, modes)
    elif is_float(to):
        if to == "bf16" or modes:
            raise Fault("another conversion from integers than to the nearest is not known", 0)
        if instruction.has("sat") or instruction.has("ftz"):
            raise Fault("integers with .sat or .ftz are not known", 0)
        result = value.astype(FLOATS[width_of(to)])
    elif is_float(source):
        if instruction.has("sat"):
            raise Fault(".sat to integers is not known", 0)
        value = flush(value) if instruction.has("ftz") else value
        result = extended(group, destination, _float_to_integer(value, to, modes), to)
    elif instruction.modifiers:
        raise Fault("integers with a modifier are not known", 0)
    else:
        result = value.astype((SIGNED if source[0] == "s" else UNSIGNED)[width_of(to)]).view(UNSIGNED[width_of(to)])
        result = extended(group, destination, result, to)
    group.write(destination, result, guard)


def _float_to_float(instruction, value, to, source, modes):
    flushes = instruction.has("ftz")
    if flushes and source == "f32":
        value = flush(value)
    for mode in modes:
        value = mode(value)
    value = _saturated(instruction, value)
    if to in ("bf16", "f16"):
        if source != "f32":
            raise Fault(f"a conversion from {source} to {to} is not known", 0)
        return to_bf16(value) if to == "bf16" else to_f16(value)
    value = value.astype(FLOATS[width_of(to)])
    return flush(value) if flushes and to == "f32" else value


def _float_to_integer(value, to, modes):
    width = width_of(to)
    if width == 64 or len(modes) != 1:
        raise Fault(f"another conversion to {to} is not known", 0)
    low, high = (-(1 << (width - 1)), (1 << (width - 1)) - 1) if to[0] == "s" else (0, (1 << width) - 1)
    if np.isnan(value).any() and value.dtype != np.float32:
        raise Fault("a NaN of fp64 as an integer is not known", 0)
    whole = np.clip(np.where(np.isnan(value), 0.0, modes[0](value.astype(np.float64))), low, high).astype(np.int64)
    return (whole & ((1 << width) - 1)).astype(UNSIGNED[width])
