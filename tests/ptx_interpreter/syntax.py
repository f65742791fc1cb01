"""The parsed form of PTX: plain records, no behaviour beyond finding things by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from .errors import LaunchError


@dataclass(frozen=True)
class Register:
    """`index` counts the registers of `bits` width of one kernel: it is a row of the register
    file."""

    name: str
    bits: int
    index: int


@dataclass(frozen=True)
class Immediate:
    """An integer, or the bits of a float constant (`float_bits` 32 for 0f.., 64 for 0d..)."""

    value: int
    float_bits: int = 0


@dataclass(frozen=True)
class Special:
    name: str  # "tid.x"


@dataclass(frozen=True)
class Symbol:
    """A label, a variable, a parameter; `_` is the sink."""

    name: str
    offset: int = 0


@dataclass(frozen=True)
class Negated:
    register: Register


@dataclass(frozen=True)
class Pair:
    """`%r1|%p2`"""

    first: "Operand"
    second: "Operand"


@dataclass(frozen=True)
class Vector:
    items: tuple


@dataclass(frozen=True)
class Address:
    base: "Register | Symbol | None"
    offset: int


Operand = Register | Immediate | Special | Symbol | Negated | Pair | Vector | Address


@dataclass(frozen=True)
class Source:
    """A .loc: file number and line, and where that was inlined."""

    file: int
    line: int
    inlined_at: tuple[int, int] | None = None


@dataclass(frozen=True)
class Instruction:
    line: int  # of the PTX text, from 1
    source: Source | None  # the last .loc
    text: str
    guard: tuple[Register, bool] | None  # @%p or, with True, @!%p
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]

    @property
    def name(self) -> str:
        return ".".join((self.opcode, *self.modifiers))


@dataclass(frozen=True)
class Variable:
    space: str
    name: str
    align: int
    size: int | None  # None: extern shared, as large as the launch says
    content: bytes = b""


@dataclass(frozen=True)
class Parameter:
    name: str
    type_name: str
    offset: int
    size: int


@dataclass
class Entry:
    """One kernel. `labels` maps to instruction indices; `len(instructions)` is the end."""

    name: str = ""
    parameters: list[Parameter] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    branch_targets: dict[str, list[str]] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)
    register_counts: dict[int, int] = field(default_factory=dict)
    tuning: dict[str, str] = field(default_factory=dict)


class Entries(Mapping):
    """Kernels by name, parsed when first asked for: a file may hold a dozen templates."""

    def __init__(self, parsers: dict[str, Callable[[], Entry]]):
        self._parsers = parsers
        self._parsed: dict[str, Entry] = {}

    def __getitem__(self, name: str) -> Entry:
        if name not in self._parsed:
            self._parsed[name] = self._parsers[name]()
        return self._parsed[name]

    def __contains__(self, name) -> bool:
        return name in self._parsers

    def __iter__(self):
        return iter(self._parsers)

    def __len__(self) -> int:
        return len(self._parsers)

    def replaced(self, entry: Entry) -> "Entries":
        """The same kernels but for this one."""
        return Entries({**self._parsers, entry.name: lambda: entry})


@dataclass
class Module:
    header: dict[str, str] = field(default_factory=dict)
    files: dict[int, str] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)
    entries: Entries = field(default_factory=lambda: Entries({}))

    def place(self, source: Source | None) -> str:
        """`gemm.cu:40`, or `intrinsics.hpp:440 (inlined at gemm.cu:19)`."""
        if source is None:
            return "no source line (compile with -lineinfo)"
        place = f"{self.files.get(source.file, '?')}:{source.line}"
        if source.inlined_at:
            file, line = source.inlined_at
            place += f" (inlined at {self.files.get(file, '?')}:{line})"
        return place

    def entry(self, name: str) -> Entry:
        """The kernel of that name, or the only one whose name contains it."""
        return self.entries[self.find(name)]

    def find(self, name: str) -> str:
        """The full name of that kernel."""
        if name in self.entries:
            return name
        found = [entry for entry in self.entries if name in entry]
        if len(found) != 1:
            known = ", ".join(sorted(self.entries)) or "none"
            raise LaunchError(
                f"{name!r} fits {len(found)} kernels {found}; this module has: {known}"
            )
        return found[0]
