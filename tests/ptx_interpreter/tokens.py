"""PTX text as a stream of tokens; a token's line is worked out when somebody asks."""

import bisect
import re

from .errors import ParseError

TOKEN = re.compile(
    r"""(?:\s+|//[^\n]*|/\*.*?\*/)*  # blanks and comments before the token
      ("[^"]*"
      |0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|0[xX][0-9a-fA-F]+U?
      |\d+\.\d*(?:[eE][+-]?\d+)?|\d+U?
      |[%$_.a-zA-Z][\w$.]*(?:::[\w.]+)*
      |[{}()\[\],;:@!|<>=+\-*]
      |$)""",
    re.VERBOSE | re.DOTALL,
)


class Tokens:
    """A position in the tokens of a text; the last token is "", the end."""

    def __init__(self, text: str, first_line: int = 1):
        self.text = text
        self.first_line = first_line
        self.position = 0
        self._newlines = [match.start() for match in re.finditer("\n", text)]
        self._tokens: list[str] = []
        self._offsets: list[int] = []
        end = 0
        for match in TOKEN.finditer(text):
            if match.start() != end:
                break
            self._tokens.append(match.group(1))
            self._offsets.append(match.start(1))
            end = match.end()
        if end != len(text):
            line = self._line_at(re.compile(r"\s*").match(text, end).end())
            raise ParseError(f"PTX line {line}: cannot read {text[end : end + 20].strip()!r}")
        self._tokens.append("")
        self._offsets.append(end)

    @property
    def token(self) -> str:
        return self._tokens[self.position]

    @property
    def offset(self) -> int:
        return self._offsets[self.position]

    @property
    def line(self) -> int:
        return self._line_at(self.offset)

    def _line_at(self, offset: int) -> int:
        return bisect.bisect_left(self._newlines, offset) + self.first_line

    def ahead(self) -> str:
        """The token after this one."""
        return self._tokens[min(self.position + 1, len(self._tokens) - 1)]

    def take(self, expected: str | None = None) -> str:
        token = self._tokens[self.position]
        if expected is not None and token != expected:
            raise ParseError(f"PTX line {self.line}: expected {expected!r}, got {token!r}")
        self.position += 1
        return token

    def accept(self, token: str) -> bool:
        if self._tokens[self.position] != token:
            return False
        self.position += 1
        return True

    def rest_of_line(self) -> list[str]:
        end = self.text.find("\n", self.offset) % (len(self.text) + 1)
        last = bisect.bisect_left(self._offsets, end, self.position)
        tokens = self._tokens[self.position : last]
        self.position = last
        return tokens

    def skip_before(self, token: str) -> None:
        """To the next such token, which must be there."""
        self.position = self._tokens.index(token, self.position)

    def skip_to(self, end: str) -> None:
        while self.take() != end:
            if not self.token:
                raise ParseError(f"PTX line {self.line}: no {end!r} before the end of the text")
