"""Regular expressions that grammars may hold: read once from left to right, and written out for a linear-time engine.

Matching is llguidance's, by derivatives: no backtracking, so no pattern is slow on any text. What such an engine cannot do
(lookaround, back-references, word boundaries) is refused here by name, as is what its syntax would read differently from
what a JSON schema or Python means: inline flags, set operations inside classes, unknown escapes.
"""

from __future__ import annotations

import re

from hasten.engine.limits import LIMITS
from hasten.errors import ConfigError

_COUNT = re.compile(r"\{(\d{1,9})(?:(,)(\d{1,9})?)?\}")
_NAME = re.compile(r"\(\?P?<[A-Za-z_]\w{0,63}>")
_HEX = re.compile(r"x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|[pP]\{[A-Za-z_]{1,40}\}|[pP][A-Z]")
_GROUPS = {
    "(?=": "lookahead", "(?!": "lookahead", "(?<=": "lookbehind", "(?<!": "lookbehind", "(?P=": "a back-reference",
    "(?>": "an atomic group", "(?#": "a comment", "(?(": "a condition",
}  # fmt: skip
_ESCAPES = {"b": "a word boundary", "B": "a word boundary", "k": "a back-reference", "c": "a control escape"}
_ENDS = {"A": "an anchor", "z": "an anchor", "Z": "an anchor", "G": "an anchor"}


def check(text: str, place: str, *, search: bool = False) -> str:
    """`text` in the form llguidance reads, with the same meaning; `place` names it in errors.

    `search`: a JSON schema's pattern, which may match anywhere and has ECMA-262's meaning (dots match no line end).
    Otherwise the whole answer is meant, so that ^ at the start and $ at the end are left out.
    Raises ConfigError for what is not supported, and for more than limits.regex_size places.
    """
    return _Reader(text, place, search).read()


class _Reader:
    """One pass over a pattern: `out` is what was written so far, `sizes` the places of each open group."""

    def __init__(self, text: str, place: str, search: bool) -> None:
        self.text, self.place, self.search = text, place, search
        self.out: list[str] = []
        self.sizes: list[int] = [0]
        self.last = 0  # places of the piece that a repetition would repeat; 0: there is none
        self.written = 0

    def refuse(self, what: str, at: int, hint: str = "") -> ConfigError:
        return ConfigError(
            f"{self.place} has {what} at character {at + 1}, which is not supported in grammars",
            hint=hint or "patterns are matched in linear time: literals, classes, groups, alternatives and repetition",
            field="grammar",
        )

    def piece(self, written: str) -> None:
        """One place that matches one character."""
        self.sizes[-1] += self.last
        self.last, self.written = 1, self.written + 1
        self.out.append(written)

    def read(self) -> str:
        at, text = 0, self.text
        if re.search("[\ud800-\udfff]", text):
            raise ConfigError(f"{self.place} holds half of a surrogate pair", field="grammar")
        while at < len(text):
            c = text[at]
            if c == "\\":
                at = self.escape(at)
            elif c == "[":
                at = self.charset(at)
            elif c == "(":
                at = self.group(at)
            elif c in ")|":
                self.sizes[-1] += self.last
                self.last = 0
                if c == ")":
                    if len(self.sizes) == 1:
                        raise self.refuse("a ) that closes nothing", at, "write \\) for the character")
                    self.last = max(1, self.sizes.pop())
                self.out.append(c)
                at += 1
            elif c in "*+?" or (c == "{" and _COUNT.match(text, at)):
                at = self.repeat(at)
            elif c in "^$":
                if self.search:
                    self.out.append(c)
                elif (at, c) not in ((0, "^"), (len(text) - 1, "$")) or len(self.sizes) > 1:
                    raise self.refuse(f"the anchor {c} inside", at, "the whole answer has to match anyway")
                self.sizes[-1] += self.last
                self.last = 0
                at += 1
            else:
                self.piece(r"[^\n\r\x{2028}\x{2029}]" if c == "." and self.search else "\\" + c if c in "{}]" else c)
                at += 1
            self.bound()
        if len(self.sizes) > 1:
            raise self.refuse("a ( that is not closed", len(text) - 1, "write \\( for the character")
        return "".join(self.out)

    def bound(self) -> None:
        """Refuse what is too large, before it is built."""
        size = sum(self.sizes) + self.last
        if self.written > LIMITS.regex_size or size > LIMITS.grammar_symbols:
            raise ConfigError(
                f"{self.place} is too large: at most {LIMITS.regex_size} places, and {LIMITS.grammar_symbols} with its "
                "repetitions written out",
                field="grammar",
            )

    def escape(self, at: int) -> int:
        """A backslash and what follows, outside a class."""
        written, end = self.escaped(at, within=False)
        self.piece(written)
        return end

    def escaped(self, at: int, within: bool) -> tuple[str, int]:
        c = self.text[at + 1 : at + 2]
        known = {**_ESCAPES, **_ENDS}.get(c)
        if not c or known or c.isdigit():
            if c == "0" and not self.text[at + 2 : at + 3].isdigit():
                return r"\x00", at + 2
            raise self.refuse(known or ("a back-reference" if c else "a lone backslash"), at)
        if c in "dDwWsSnrtfv":
            return "\\" + c, at + 2
        found = _HEX.match(self.text, at + 1)
        if found:
            if c == "u" and 0xD800 <= int(found[0][1:], 16) < 0xE000:
                raise self.refuse("half of a surrogate pair", at, "write the character itself")
            return "\\" + found[0], found.end()
        if c.isascii() and c.isalnum():
            raise self.refuse(f"the escape \\{c}", at)
        if c in "<>/" or not c.isascii() or c.isspace():
            return c, at + 2  # \< would begin a word in the engine's syntax
        return "\\" + c, at + 2

    def charset(self, at: int) -> int:
        """A class [...]: no set operations, no POSIX names, a literal [ is escaped."""
        start, text, out = at, self.text, ["["]
        at += 1
        if text[at : at + 1] == "^":
            out.append("^")
            at += 1
        if text[at : at + 1] == "]":
            raise self.refuse("an empty class", start, "write \\] for the character")
        while at < len(text) and text[at] != "]":
            c = text[at]
            if c == "\\":
                written, at = self.escaped(at, within=True)
                out.append(written)
                continue
            if text.startswith("[:", at) or text.startswith("--", at):
                raise self.refuse(f"{text[at : at + 2]} in a class", at, "escape the second character with \\")
            out.append("\\" + c if c in "[&~^" else c)
            at += 1
        if at >= len(text):
            raise self.refuse("a [ that is not closed", start, "write \\[ for the character")
        self.piece("".join(out) + "]")
        return at + 1

    def group(self, at: int) -> int:
        """An opening parenthesis; groups capture nothing here."""
        if len(self.sizes) > LIMITS.grammar_depth // 2:
            raise ConfigError(f"{self.place} is nested too deeply; at most {LIMITS.grammar_depth // 2}", field="grammar")
        end, name = at + 1, _NAME.match(self.text, at)
        if name:
            end = name.end()
        elif self.text.startswith("(?:", at):
            end = at + 3
        elif self.text.startswith("(?", at):
            what = next((what for head, what in _GROUPS.items() if self.text.startswith(head, at)), "inline flags")
            raise self.refuse(what, at)
        self.sizes[-1] += self.last
        self.sizes.append(0)
        self.last = 0
        self.out.append("(?:")
        return end

    def repeat(self, at: int) -> int:
        """A repetition of the last piece; lazy means the same here."""
        if not self.last:
            raise self.refuse(
                f"the repetition {self.text[at]} of nothing", at, f"write \\{self.text[at]} for the character"
            )
        count = _COUNT.match(self.text, at)
        if count:
            low, high = int(count[1]), int(count[3] or 0) if count[2] else int(count[1])
            if count[3] and high < low:
                raise self.refuse(f"the repetition {count[0]}", at, "the first number must not exceed the second")
            written, end, times = count[0], count.end(), max(low, high, 1)
        else:
            written, end, times = self.text[at], at + 1, 1
        if end < len(self.text) and self.text[end] == "?":
            end += 1
        if end < len(self.text) and (self.text[end] in "*+?" or _COUNT.match(self.text, end)):
            raise self.refuse("a repetition of a repetition", end, "put the first into a group")
        self.sizes[-1] += self.last * times
        self.last = 0
        self.out.append(written)
        return end
