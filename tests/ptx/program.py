"""Parses PTX text as nvcc's and Triton's compilers write it for sm_80, by a scanner and a few patterns.

PTX ISA 8.8, chapters 4 (syntax), 5 (state spaces and types) and 7 (functions). An unknown statement raises
PtxSyntaxError with its line.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field
from functools import cached_property

SIZES = {"pred": 1, "f16": 2, "bf16": 2, "f32": 4, "tf32": 4, "f64": 8, "f16x2": 4, "bf16x2": 4}
SIZES |= {f"{kind}{bits}": bits // 8 for kind in "bus" for bits in (8, 16, 32, 64)}


class PtxSyntaxError(ValueError):
    """A text that is no PTX, or PTX that this parser does not cover."""


@dataclass(frozen=True)
class Register:
    """A register by its unique name; `negated` where a predicate is written !p."""

    name: str
    negated: bool = False


@dataclass(frozen=True)
class Immediate:
    """A literal: an int, or the bits of a float that was written 0f..., 0d... or in decimals."""

    value: int | float


@dataclass(frozen=True)
class Symbol:
    """A label, a variable, a parameter or a function."""

    name: str


@dataclass(frozen=True)
class Vector:
    """{a, b, ...}; also the operands of call in parentheses."""

    parts: tuple[Operand, ...]


@dataclass(frozen=True)
class Address:
    """[base + offset]."""

    base: Operand
    offset: int


Operand = Register | Immediate | Symbol | Vector | Address


@dataclass(frozen=True)
class Instruction:
    """opcode.modifiers operands; `second` is q where the first operand is written p|q."""

    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    second: Register | None
    guard: Register | None
    line: str  # file:line of the source
    text: str

    @cached_property
    def types(self) -> list[str]:
        """The modifiers that are types, in order."""
        return [m for m in self.modifiers if m in SIZES]

    @cached_property
    def kind(self) -> str:
        """The class under which Counts counts it."""
        op = self.opcode
        if op in ("ld", "st", "atom", "red"):
            space = next((m for m in self.modifiers if m in _SPACES.split("|")), "generic")
            return f"{op}.{space}"
        if op in _KINDS:
            return _KINDS[op]
        return "float" if any("f" in t for t in self.types) else "integer"


@dataclass(frozen=True)
class Variable:
    """A variable in a state space; `data` is its initial value."""

    name: str
    space: str
    size: int
    align: int
    data: bytes | None = None


@dataclass
class Function:
    """A kernel (.entry) or a device function (.func): `registers` name -> type, `labels` name -> index into code."""

    name: str
    parameters: list[Variable]
    results: list[Variable] = field(default_factory=list)
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, str] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)
    entry: bool = True


@dataclass
class Program:
    """Functions and module-level variables by name."""

    functions: dict[str, Function]
    variables: dict[str, Variable]


_KINDS = {op: op for op in ("mma", "ldmatrix", "shfl", "vote", "redux", "bar", "bra", "cvt")}
_KINDS |= dict.fromkeys(("ex2", "lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "tanh"), "special")
_KINDS["cp"] = "cp.async"
_SPACES = "param|shared|local|global|const"
_VARIABLE = re.compile(
    rf"(?:\.(?:visible|extern|weak|common)\s+)*\.({_SPACES})\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+"
    r"(?:\.ptr\s+(?:\.\w+\s+)*?(?:\.align\s+\d+\s+)?)?"
    r"([\w$%.]+)\s*((?:\[\d*\])*)\s*(?:=\s*(.*))?$",
    re.DOTALL,
)
_SCAN = re.compile(
    r"""(?P<skip>\s+|//[^\n]*|/\*.*?\*/|\.(?:version|target|address_size|file)\b[^\n]*)
    |(?P<section>\.section\s+[^{]*\{[^}]*\})
    |\.loc\s+(?P<at>\d+)\s+(?P<line>\d+)[^\n]*
    |(?P<label>[$\w]+):
    |(?P<header>(?:\.(?:visible|extern|weak)\s+)*\.(?:entry|func)\b[^{;]*)(?P<end>[{;])
    |(?P<brace>[{}])
    |(?P<statement>[.@\w][^;]*);""",
    re.VERBOSE | re.DOTALL,
)
_OPERAND = re.compile(r"\{[^}]*\}|\([^)]*\)|\[[^\]]*\]|[^,\s][^,]*")
_INSTRUCTION = re.compile(
    r"(?:@(!?)\s*([\w$%]+)\s+)?([a-z]\w*)((?:(?:\.|::)\w+)*)\s*(.*)", re.DOTALL
)


def parse(text: str) -> Program:
    """Every function and variable of a PTX module."""
    return _Parser(text).program


class _Parser:
    def __init__(self, text: str) -> None:
        self.program = Program({}, {})
        # Triton's compiler writes the names of its files at the end
        paths = re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', text)
        self.files = {number: path.rsplit("/", 1)[-1] for number, path in paths}
        self.line = "?"
        self.function: Function | None = None
        # names declared in each open block -> their unique names
        self.scopes: list[dict[str, str]] = []
        at = 0
        while at < len(text):
            match = _SCAN.match(text, at)
            if match is None:
                raise PtxSyntaxError(f"not understood: {text[at : at + 120]!r}")
            at = match.end()
            self._take(match)

    def _take(self, match: re.Match[str]) -> None:
        kind = match.lastgroup
        if kind == "line" and match["line"] != "0":
            self.line = f"{self.files.get(match['at'], '?')}:{match['line']}"
        elif kind == "label" and self.function:
            self.function.labels[match["label"]] = len(self.function.code)
        elif kind == "end":
            self._header(match["header"], match["end"] == "{")
        elif kind == "brace":
            self._brace(match["brace"] == "{")
        elif kind == "statement":
            self._statement(match["statement"].strip())

    def _header(self, text: str, body: bool) -> None:
        found = re.match(
            r".*?\.(entry|func)\s*(\(([^)]*)\))?\s*([\w$]+)\s*(?:\(([^)]*)\))?", text, re.DOTALL
        )
        if found is None:
            raise PtxSyntaxError(f"no function: {text}")
        lists = [
            [_variable(p) for p in (t or "").split(",") if p.strip()] for t in found.group(3, 5)
        ]
        if not body:
            return
        self.function = Function(found[4], lists[1], lists[0], entry=found[1] == "entry")
        self.function.variables |= {v.name: v for v in lists[0] + lists[1]}
        self.program.functions[found[4]] = self.function
        self.scopes = [{}]

    def _brace(self, opens: bool) -> None:
        if opens:
            self.scopes.append({})
        else:
            self.scopes.pop()
            self.function = self.function if self.scopes else None

    def _statement(self, text: str) -> None:
        if text.startswith((".pragma", ".maxn", ".reqn", ".minn")):
            return
        if text.startswith(".reg"):
            self._registers(text)
        elif text.startswith("."):
            variable = _variable(text)
            if self.function is None:
                self.program.variables[variable.name] = variable
            else:
                self.function.variables[variable.name] = variable
        else:
            self._instruction(text)

    def _registers(self, text: str) -> None:
        assert self.function is not None
        type_, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
        for name in names.replace("\n", " ").split(","):
            many = re.fullmatch(r"\s*([\w$%]+)<(\d+)>\s*", name)
            for one in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name.strip()]:
                # a register of a nested block differs from one with the same name elsewhere
                unique = one
                while unique in self.function.registers and len(self.scopes) > 1:
                    unique += "'"
                self.scopes[-1][one] = unique
                self.function.registers[unique] = type_

    def _instruction(self, text: str) -> None:
        found = _INSTRUCTION.fullmatch(text)
        if found is None or self.function is None:
            raise PtxSyntaxError(f"no instruction: {text!r}")
        negated, guard, opcode, modifiers, rest = found.groups()
        operands: list[Operand] = []
        second = None
        for i, part in enumerate(_OPERAND.findall(rest)):
            if i == 0 and "|" in part and part[0] not in "[{(":
                part, other = part.split("|")
                register = self._operand(other.strip())
                second = register if isinstance(register, Register) else None
            operands.append(self._operand(part.strip()))
        condition = self._operand(guard) if guard else None
        if isinstance(condition, Register) and negated:
            condition = Register(condition.name, negated=True)
        names = tuple(m for m in re.split(r"\.|::", modifiers) if m)
        self.function.code.append(
            Instruction(
                opcode,
                names,
                tuple(operands),
                second,
                condition if isinstance(condition, Register) else None,
                self.line,
                " ".join(text.split()),
            )
        )

    def _operand(self, text: str) -> Operand:
        if text[0] in "{(":
            return Vector(
                tuple(self._operand(p.strip()) for p in text[1:-1].split(",") if p.strip())
            )
        if text[0] == "[":
            base, _, offset = text[1:-1].replace(" ", "").partition("+")
            return Address(self._operand(base), int(offset or "0", 0))
        if text[0] == "!":
            register = self._operand(text[1:].strip())
            return Register(register.name, True) if isinstance(register, Register) else register
        if re.match(r"[-+\d]", text):
            return Immediate(_number(text))
        for scope in reversed(self.scopes):
            if text in scope:
                return Register(scope[text])
        return Register(text) if text == "_" or text.startswith("%") else Symbol(text)


def _number(text: str) -> int | float:
    if text[:2] in ("0f", "0F"):
        return struct.unpack(">f", bytes.fromhex(text[2:]))[0]
    if text[:2] in ("0d", "0D"):
        return struct.unpack(">d", bytes.fromhex(text[2:]))[0]
    if re.fullmatch(r"-?\d*\.\d*(e[-+]?\d+)?", text):
        return float(text)
    return int(re.sub(r"^(-?)0(?=\d)", r"\g<1>0o", text.rstrip("U")), 0)


def _variable(text: str) -> Variable:
    found = _VARIABLE.fullmatch(text.strip())
    if found is None or found[3] not in SIZES:
        raise PtxSyntaxError(f"no variable: {text!r}")
    space, align, type_, name, dimensions, initial = found.groups()
    size = SIZES[type_]
    sizes = [int(n or 0) for n in re.findall(r"\[(\d*)\]", dimensions)]
    total = size
    for n in sizes:
        total *= n
    data = None
    if initial is not None or space in ("global", "const"):
        values = [
            _number(v.strip()) for v in (initial or "").strip(" {}\n").split(",") if v.strip()
        ]
        kind = {"f32": "f", "f64": "d"}.get(type_, {1: "B", 2: "H", 4: "I", 8: "Q"}[size])
        data = b"".join(
            struct.pack(f"<{kind}", v if kind in "fd" else int(v) % 256**size) for v in values
        ).ljust(total, b"\0")
    return Variable(name, space, total, int(align or size), data)
