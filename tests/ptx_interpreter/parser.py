"""PTX text -> `Module`: entries with instructions, registers, labels, variables, source lines.

The grammar is the part of PTX that nvcc and inline assembly produce. Directives that carry no
meaning for execution (debug sections, alignment hints of parameters, register limits) are skipped
by name; anything else unknown is a `ParseError`.
"""

import re
from functools import partial

from .errors import ParseError, Unsupported
from .ptx_types import SIZES, bits_of
from .syntax import (
    Address,
    Entries,
    Entry,
    Immediate,
    Instruction,
    Module,
    Negated,
    Operand,
    Pair,
    Parameter,
    Register,
    Source,
    Special,
    Symbol,
    Variable,
    Vector,
)
from .tokens import Tokens

ENTRY = re.compile(
    r"^[ \t]*(?:\.(?:visible|weak|extern)[ \t]+)*(\.entry\s+([\w$%]+))", re.MULTILINE
)
BRACE = re.compile(r'[{}]|"[^"]*"|//[^\n]*|/\*.*?\*/', re.DOTALL)
SPACES = {".shared", ".local", ".const", ".global", ".param"}
SPECIALS = re.compile(
    r"%(n?tid|n?ctaid)\.[xyz]$|%(laneid|warpid|nwarpid|smid|nsmid|gridid|clock|clock_hi|clock64"
    r"|globaltimer|globaltimer_lo|globaltimer_hi|lanemask_(eq|lt|le|gt|ge)|total_smem_size"
    r"|dynamic_smem_size)$"
)
# Between the parameters of a kernel and its body: bounds for ptxas, recorded but not needed.
TUNING = {".maxntid", ".reqntid", ".minnctapersm", ".maxnctapersm", ".maxnreg", ".pragma"}


def _integer(token: str) -> int:
    return int(token.rstrip("U"), 0) if not re.fullmatch(r"0\d+U?", token) else int(token, 8)


def parse(text: str) -> Module:
    """Parses a PTX file, its kernels not before they are needed; `ParseError` names the line."""
    module = Module()
    parsers, outside, end = {}, [], 0
    for match in ENTRY.finditer(text):
        if match.start() < end:
            continue
        outside.append(text[end : match.start()])
        start, end = match.start(1), _end_of_body(text, match.end())
        outside.append("\n" * text.count("\n", match.start(), end))
        line = text.count("\n", 0, start) + 1
        tokens = partial(Tokens, text[start:end], line)
        parsers[match.group(2)] = lambda tokens=tokens: _Function(tokens(), module).parse()
    outside.append(text[end:])
    module.entries = Entries(parsers)
    _parse_outside(Tokens("".join(outside)), module)
    return module


def _end_of_body(text: str, start: int) -> int:
    """Behind the brace that closes the first one after `start`."""
    depth = 0
    for match in BRACE.finditer(text, start):
        if match.group() == "{":
            depth += 1
        elif match.group() == "}":
            depth -= 1
            if depth == 0:
                return match.end()
    return len(text)


def _parse_outside(tokens: Tokens, module: Module) -> None:
    """Everything but the kernels."""
    while tokens.token:
        token = tokens.token
        if token in (".version", ".target", ".address_size"):
            module.header[token] = " ".join(tokens.rest_of_line()[1:])
        elif token == ".file":
            _, number, name, *_ = tokens.rest_of_line()
            module.files[int(number)] = name.strip('"')
        elif token == ".section":
            tokens.skip_to("}")
        elif token in (".visible", ".extern", ".weak", ".common"):
            tokens.take()
        elif token in SPACES:
            variable = _variable(tokens)
            module.variables[variable.name] = variable
        elif token == ".func":
            raise Unsupported(
                f"PTX line {tokens.line}: .func (a device function that was not inlined)"
            )
        else:
            raise ParseError(f"PTX line {tokens.line}: unknown directive {token!r}")


def _source(words: list[str]) -> Source:
    """`.loc 2 440 9, function_name f, inlined_at 1 19 5` as words."""
    inlined_at = None
    if "inlined_at" in words:
        at = words.index("inlined_at")
        inlined_at = (int(words[at + 1]), int(words[at + 2]))
    return Source(int(words[1]), int(words[2]), inlined_at)


def _variable(tokens: Tokens) -> Variable:
    """`.shared .align 16 .b8 name[64];` or `.const .f32 table[2] = {0f.., 0f..};`"""
    line = tokens.line
    space = tokens.take()[1:]
    align, element = 1, ""
    while tokens.token.startswith("."):
        word = tokens.take()
        if word == ".align":
            align = int(tokens.take())
        elif word[1:] in SIZES:
            element = word[1:]
        else:
            raise Unsupported(f"PTX line {line}: variable attribute {word}")
    name = tokens.take()
    count: int | None = 1
    while tokens.accept("["):
        if tokens.accept("]"):
            count = None
        else:
            count *= _integer(tokens.take())
            tokens.take("]")
    content = _initial_bytes(tokens, element, line) if tokens.accept("=") else b""
    tokens.take(";")
    size = SIZES[element] * count if count is not None else len(content) or None
    return Variable(space, name, max(align, SIZES[element]), size, content)


def _initial_bytes(tokens: Tokens, element: str, line: int) -> bytes:
    plain = re.compile(r"\{([\d\s,]*)\}\s*;").match(tokens.text, tokens.offset)
    if plain and SIZES[element] == 1:
        tokens.skip_before(";")
        return bytes(int(number) for number in plain.group(1).split(",") if number.strip())
    values = bytearray()
    size = SIZES[element]
    depth = 0
    while tokens.token != ";":
        token = tokens.take()
        if token in "{}":
            depth += 1 if token == "{" else -1
        elif token == "-":
            values += (-_integer(tokens.take())).to_bytes(size, "little", signed=True)
        elif token[:2] in ("0f", "0F", "0d", "0D"):
            values += int(token[2:], 16).to_bytes(size, "little")
        elif token[0].isdigit():
            values += _integer(token).to_bytes(size, "little")
        elif token != ",":
            raise Unsupported(f"PTX line {line}: initial value {token!r}")
    return bytes(values)


class _Function:
    """Parses one `.entry`. Scopes (`{ .reg .pred p; ... }` of inline assembly) rename registers."""

    def __init__(self, tokens: Tokens, module: Module):
        self.tokens = tokens
        self.module = module
        self.entry = Entry()
        self.scopes: list[dict[str, tuple[str, Register | None]]] = []
        self.ranges: list[tuple[str, int, str]] = []  # `%r<20>`: prefix, count, type
        self.source: Source | None = None

    def parse(self) -> Entry:
        tokens = self.tokens
        tokens.take(".entry")
        self.entry.name = tokens.take()
        if tokens.accept("("):
            self._parameters()
        while tokens.token != "{":
            directive = tokens.take()
            if directive not in TUNING:
                raise Unsupported(f"PTX line {tokens.line}: kernel directive {directive}")
            values = []
            while tokens.token != "{" and not tokens.token.startswith("."):
                values.append(tokens.take())
            self.entry.tuning[directive] = " ".join(values)
        self._body()
        return self.entry

    def _parameters(self) -> None:
        tokens, offset = self.tokens, 0
        while not tokens.accept(")"):
            tokens.take(".param")
            align, element = 1, ""
            while tokens.token.startswith("."):
                word = tokens.take()
                if word == ".align":
                    align = max(align, int(tokens.take()) if element == "" else 1)
                    if element:
                        tokens.take()  # `.ptr .align 16` speaks of what the pointer points to
                elif word[1:] in SIZES:
                    element = word[1:]
            name, count = tokens.take(), 1
            if tokens.accept("["):
                count = _integer(tokens.take())
                tokens.take("]")
            align = max(align, SIZES[element])
            offset = -(-offset // align) * align
            size = SIZES[element] * count
            self.entry.parameters.append(Parameter(name, element, offset, size))
            offset += size
            tokens.accept(",")

    def _body(self) -> None:
        tokens = self.tokens
        depth = 0
        while True:
            token = tokens.token
            if token == "{":
                tokens.take()
                depth += 1
                self.scopes.append({})
            elif token == "}":
                tokens.take()
                depth -= 1
                self.scopes.pop()
                if depth == 0:
                    return
            elif token == ".reg":
                self._registers()
            elif token == ".loc":
                words = tokens.rest_of_line()
                if int(words[2]):  # line 0 means "no line of its own": the last one stands
                    self.source = _source(words)
            elif token in SPACES:
                variable = _variable(tokens)
                self.entry.variables[variable.name] = variable
            elif token == ".pragma":
                tokens.skip_to(";")
            elif tokens.ahead() == ":":
                self._label()
            elif token.startswith("."):
                raise Unsupported(f"PTX line {tokens.line}: directive {token}")
            elif token == "":
                raise ParseError(f"PTX line {tokens.line}: {self.entry.name} has no end")
            else:
                self._instruction()

    def _registers(self) -> None:
        """`.reg .b32 %r<20>;` or `.reg .pred p, q;`"""
        tokens = self.tokens
        tokens.take(".reg")
        type_name = tokens.take()[1:]
        if type_name not in SIZES:
            raise Unsupported(f"PTX line {tokens.line}: register type .{type_name}")
        while True:
            name = tokens.take()
            if tokens.accept("<"):
                self.ranges.append((name, _integer(tokens.take()), type_name))
                tokens.take(">")
            elif name in self.scopes[-1]:
                raise ParseError(f"PTX line {tokens.line}: register {name} is declared twice")
            else:
                self.scopes[-1][name] = (type_name, None)
            if not tokens.accept(","):
                break
        tokens.take(";")

    def _label(self) -> None:
        tokens = self.tokens
        name = tokens.take()
        tokens.take(":")
        if tokens.accept(".branchtargets"):
            targets = [tokens.take()]
            while tokens.accept(","):
                targets.append(tokens.take())
            tokens.take(";")
            self.entry.branch_targets[name] = targets
        else:
            self.entry.labels[name] = len(self.entry.instructions)

    def _instruction(self) -> None:
        tokens = self.tokens
        line, start = tokens.line, tokens.offset
        guard = None
        if tokens.accept("@"):
            negated = tokens.accept("!")
            guard = (self._register(tokens.take(), line), negated)
        opcode, *modifiers = tokens.take().split(".")
        operands: list[Operand] = []
        while tokens.token != ";":
            operands.append(self._operand())
            if not tokens.accept(","):
                break
        text = " ".join(tokens.text[start : tokens.offset].split())
        tokens.take(";")
        self.entry.instructions.append(
            Instruction(line, self.source, text, guard, opcode, tuple(modifiers), tuple(operands))
        )

    def _operand(self) -> Operand:
        tokens = self.tokens
        if tokens.accept("["):
            return self._address()
        if tokens.accept("{"):
            items = [self._operand()]
            while tokens.accept(","):
                items.append(self._operand())
            tokens.take("}")
            return Vector(tuple(items))
        first = self._atom()
        if tokens.accept("|"):
            return Pair(first, self._atom())
        return first

    def _atom(self) -> Operand:
        tokens = self.tokens
        line, token = tokens.line, tokens.take()
        if token == "!":
            return Negated(self._register(tokens.take(), line))
        if token == "-":
            return Immediate(-_integer(tokens.take()))
        if token[:2] in ("0f", "0F"):
            return Immediate(int(token[2:], 16), 32)
        if token[:2] in ("0d", "0D"):
            return Immediate(int(token[2:], 16), 64)
        if token[0].isdigit():
            if "." in token:
                raise Unsupported(f"PTX line {line}: decimal constant {token}")
            return Immediate(_integer(token))
        if SPECIALS.match(token):
            return Special(token[1:])
        register = self._find_register(token)
        if register is not None:
            return register
        if token == "_":
            return Symbol("_")
        if not re.match(r"[%$_a-zA-Z]", token):
            raise ParseError(f"PTX line {line}: operand {token!r}")
        if token == "WARP_SZ":
            return Immediate(32)
        return Symbol(token, self._offset())

    def _address(self) -> Address:
        """`[%rd1+16]`, `[name+4]`, `[%r1]`, `[16]`."""
        base = self._atom()
        if isinstance(base, Symbol):
            address = Address(Symbol(base.name), base.offset)
        elif isinstance(base, Immediate):
            address = Address(None, base.value)
        else:
            address = Address(base, self._offset())
        self.tokens.take("]")
        return address

    def _offset(self) -> int:
        tokens = self.tokens
        if tokens.token not in ("+", "-"):
            return 0
        sign = 1 if tokens.take() == "+" else -1
        if tokens.accept("-"):
            sign = -sign
        return sign * _integer(tokens.take())

    def _register(self, name: str, line: int) -> Register:
        register = self._find_register(name)
        if register is None:
            raise ParseError(f"PTX line {line}: register {name!r} is not declared")
        return register

    def _find_register(self, name: str) -> Register | None:
        for scope in reversed(self.scopes):
            if name in scope:
                type_name, register = scope[name]
                if register is None:
                    register = self._new_register(name, type_name)
                    scope[name] = (type_name, register)
                return register
        for prefix, count, type_name in self.ranges:
            digits = name[len(prefix) :]
            if name.startswith(prefix) and digits.isdigit() and int(digits) < count:
                register = self._new_register(name, type_name)
                self.scopes[0][name] = (type_name, register)
                return register
        return None

    def _new_register(self, name: str, type_name: str) -> Register:
        bits = bits_of(type_name)
        index = self.entry.register_counts.get(bits, 0)
        self.entry.register_counts[bits] = index + 1
        return Register(name, bits, index)
