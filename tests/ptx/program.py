"""PTX text as a list of instructions. What is not understood is an error with its line."""

import functools
import itertools
import re
from dataclasses import dataclass

TYPE = re.compile(r"[busf](?:8|16|32|64)$|pred$|bf16$|(?:f16|bf16|f32)x2$")
DIRECTIVES = (".file", ".section", ".pragma", ".reqntid", ".maxntid", ".minnctapersm", ".local", ".loc")


class PtxError(Exception):
    """What a GPU would get wrong, or what is not known here."""


@dataclass
class Instruction:
    """`@guard name.modifiers.types operands`.

    An operand is a register, an immediate or a symbol as text, an address as (base, offset), or a vector as a list.
    """

    name: str
    modifiers: tuple[str, ...]
    types: tuple[str, ...]
    guard: tuple[str, bool] | None  # a predicate register, and the value it must have
    operands: list
    text: str
    line: int
    target: int = -1  # of a branch

    @property
    def type(self) -> str:
        return self.types[-1]

    def has(self, modifier: str) -> bool:
        return modifier in self.modifiers

    @property
    def names(self) -> list[str]:
        """The registers that it reads or writes, and whatever else its operands name."""
        names = [self.guard[0]] if self.guard else []
        for operand in self.operands:
            names += operand if isinstance(operand, list) else [operand[0] if isinstance(operand, tuple) else operand]
        return names


@dataclass
class Program:
    """A kernel: its parameters as (type, name), its instructions, and the width in bits of each kind of register."""

    name: str
    parameters: list[tuple[str, str]]
    instructions: list[Instruction]
    register_widths: dict[str, int]
    shared_symbols: frozenset[str]
    is_known: bool = False  # every instruction was found among those that can be executed

    def width_of_register(self, register: str) -> int:
        """`.reg .b32 %r<9>;` declares %r0 to %r8; inline assembly names its own."""
        width = self.register_widths.get(register)
        if width is None:
            width = self.register_widths[register] = self.register_widths[register.rstrip("0123456789")]
        return width

    @functools.cached_property
    def _last_named(self) -> dict[str, int]:
        return {name: pc for pc, instruction in enumerate(self.instructions) for name in instruction.names}

    @functools.cached_property
    def _lowest_ahead(self) -> list[int]:
        """For each instruction, one that nothing lies before which can still run: branches lead back."""
        back = [
            min(pc, instruction.target) if instruction.name == "bra" else pc for pc, instruction in enumerate(self.instructions)
        ]
        return list(itertools.accumulate(reversed(back), min))[::-1]

    def is_over(self, register: str, pc: int) -> bool:
        """Whether nothing that can still run from here names a register."""
        return self._last_named[register] < self._lowest_ahead[pc]


def parse(text: str, entry: str | None = None) -> Program:
    """The kernel named `entry`, or the only one.

    Args:
        text: a PTX module, as Triton or nvcc writes it.
        entry: the kernel's name; needed where the module has several.
    """
    # Blank out block comments, but keep their line breaks, for line numbers.
    text = re.sub(r"/\*.*?\*/", lambda comment: "\n" * comment[0].count("\n"), text, flags=re.S)
    heads = list(re.finditer(r"\.entry\s+([\w$]+)\s*\((.*?)\)", text, re.S))
    heads = [head for head in heads if entry in (None, head[1])]
    if len(heads) != 1:
        raise PtxError(f"expected one kernel{f' {entry}' if entry else ''}, found {len(heads)}")
    (head,) = heads
    parameters = re.findall(r"\.param\s+\.(\w+)\s[^,]*?([\w$]+)\s*(?:,|$)", head[2].strip())
    shared = frozenset(re.findall(r"\.shared\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[", text))
    if len(shared) > 1:
        raise PtxError(f"several symbols of shared memory are not known: {', '.join(sorted(shared))}")
    body = _Body(text, text.index("{", head.end()))
    program = Program(head[1], parameters, body.instructions, body.widths, shared)
    for instruction in program.instructions:
        if instruction.name == "bra":
            (label,) = instruction.operands
            if label not in body.labels:
                raise PtxError(f"line {instruction.line}: no label {label}")
            instruction.target = body.labels[label]
    return program


class _Body:
    """Statement by statement, up to the brace that closes the first."""

    def __init__(self, text: str, start: int):
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self.widths: dict[str, int] = {}
        self.scopes: list[dict[str, str]] = []  # the registers of inner braces, which inline assembly opens
        statement, first_line = "", 0
        for line, raw in enumerate(text[start:].split("\n"), text.count("\n", 0, start) + 1):
            rest = raw.split("//")[0].strip()
            if rest.startswith(DIRECTIVES):
                continue
            while rest:
                if not statement:
                    first_line = line
                    if rest[0] == "{":
                        self.scopes.append({})
                        rest = rest[1:].strip()
                        continue
                    if rest[0] == "}":
                        self.scopes.pop()
                        if not self.scopes:
                            return
                        rest = rest[1:].strip()
                        continue
                    if label := re.match(r"([\w$]+):\s*", rest):
                        self.labels[label[1]] = len(self.instructions)
                        rest = rest[label.end() :]
                        continue
                part, end, after = rest.partition(";")
                statement = f"{statement} {part}".strip()
                if not end:
                    break
                self._statement(statement, first_line)
                statement, rest = "", after.strip()
        raise PtxError("the kernel's body has no end")

    def _statement(self, statement: str, line: int):
        if statement.startswith(".reg"):
            _, kind, names = statement.split(None, 2)
            width = 1 if kind == ".pred" else int(re.search(r"\d+", kind)[0])
            for name in re.findall(r"%?[\w$]+(?:<\d+>)?", names):
                name = name.partition("<")[0]
                if len(self.scopes) > 1:
                    self.scopes[-1][name] = name = f"{name}@{line}"
                self.widths[name] = width
        elif statement.startswith("."):
            raise PtxError(f"line {line}: unknown directive {statement}")
        elif statement:
            self.instructions.append(self._instruction(statement, line))

    def _instruction(self, statement: str, line: int) -> Instruction:
        found = re.match(r"(?:@(!?)(%?\w+)\s+)?([a-z]\w*)((?:[.:]+\w+)*)\s*(.*)$", statement, re.S)
        if not found:
            raise PtxError(f"line {line}: cannot read {statement}")
        negated, guard, name, suffixes, operands = found.groups()
        suffixes = [suffix for suffix in re.split(r"\.|(?=::)", suffixes) if suffix]
        return Instruction(
            name,
            tuple(suffix for suffix in suffixes if not TYPE.match(suffix)),
            tuple(suffix for suffix in suffixes if TYPE.match(suffix)),
            (self._scoped(guard), negated != "!") if guard else None,
            [self._operand(token, line) for token in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", operands)],
            statement,
            line,
        )

    def _operand(self, token: str, line: int):
        if token[0] == "{":
            return [self._scoped(register) for register in re.findall(r"[^,\s{}]+", token)]
        if token[0] == "[":
            address = re.match(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\d+))?\s*\]$", token)
            if not address:
                raise PtxError(f"line {line}: unknown address {token}")
            return self._scoped(address[1]), int(address[2] or 0)
        return self._scoped(token)

    def _scoped(self, name: str) -> str:
        for scope in reversed(self.scopes[1:]):
            if name in scope:
                return scope[name]
        return name
