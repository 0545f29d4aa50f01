"""Lark grammars: read into tokens before they are compiled, so that their size is known and nothing in them is ignored.

The language is llguidance's dialect of Lark without what reaches out of the grammar: token ids, other grammars, attributes
of rules. Regexes inside are those of `_regex.py`, schemas after %json those of `_schema.py`.
"""

from __future__ import annotations

import re

from hasten.engine.limits import LIMITS
from hasten.errors import ConfigError
from hasten.logits import _regex, _schema

_TOKEN = re.compile(
    r"(?P<space>\s+|//[^\n]*|\#[^\n]*)|(?P<string>\"(?:[^\"\\\n]|\\.)*\"i?)|(?P<regex>/(?!/)(?:[^/\\\n]|\\.)+/[a-z]*)"
    r"|(?P<name>[A-Za-z_]\w*)|(?P<directive>%[a-z]+)|(?P<number>-?\d+)|(?P<mark>->|\.\.|::|[^\"/\\])"
)


def check(source: str) -> str:
    """`source` with its regexes and schemas in the form llguidance reads.

    Raises ConfigError with the line for what is not supported or too large.
    """
    out: list[str] = []
    rules: dict[str, list[str]] = {}
    rule, at, depth, last, symbols, imports = "", 0, 0, "", 0, False
    heads = {match[1] for match in re.finditer(r"^[!?]?([A-Za-z_]\w*)(?:\.-?\d+)?[ \t]*:", source, re.MULTILINE)}
    while at < len(source):
        token = _TOKEN.match(source, at)
        if token is None:
            raise _refuse(source, at, f"{source[at]!r}, which is not closed")
        kind, text = str(token.lastgroup), token[0]
        start, at = at, token.end()
        if kind == "space":
            out.append(text)
            imports = imports and "\n" not in text
            continue
        symbols += 1
        if symbols > LIMITS.grammar_symbols:
            raise ConfigError(f"the grammar has more than {LIMITS.grammar_symbols} symbols", field="grammar")
        if kind == "regex":
            body, _, flags = text[1:].rpartition("/")
            if set(flags) - {"i", "s"}:
                raise _refuse(source, start, f"the regex flags {flags!r}; i and s are known")
            text = f"/{_regex.check(body, 'a regex of the grammar').replace('/', chr(92) + '/')}/{flags}"
        elif kind == "directive" and text == "%json":
            text, at = _json(source, at)
        elif kind == "directive" and text not in ("%import", "%ignore"):
            raise _refuse(source, start, f"{text}; %import, %ignore and %json are known")
        elif text in ("<", "@", "::"):
            raise _refuse(source, start, f"{text!r}: token names, other grammars and parameters are not part of a request")
        elif text == ":" and last == "]":
            raise _refuse(source, start, "attributes of a rule: they are not enforced here")
        elif text in "([":
            depth += 1
            if depth > LIMITS.grammar_depth // 2:
                raise ConfigError(f"the grammar is nested more than {LIMITS.grammar_depth // 2} deep", field="grammar")
        elif text in ")]":
            depth -= 1
        elif kind == "name" and not imports:
            head = text in heads and re.match(r"(?:\.-?\d+)?[ \t]*:", source[at : at + 64]) is not None
            rule = text if head else rule
            rules.setdefault(rule, [])
            if not head:
                rules[rule].append(text)
        imports = imports or text == "%import"
        last = text
        out.append(text)
    if "start" not in rules:
        raise ConfigError("the grammar has no rule 'start'", hint='write start: "a" | "b"', field="grammar")
    deep = _schema.deepest({name: (1, refs) for name, refs in rules.items()})
    if deep > LIMITS.grammar_depth:
        raise ConfigError(
            f"the grammar's rules refer to one another {deep} deep; at most {LIMITS.grammar_depth}", field="grammar"
        )
    return "".join(out)


def _line(source: str, at: int) -> int:
    return source.count("\n", 0, at) + 1


def _refuse(source: str, at: int, what: str) -> ConfigError:
    return ConfigError(
        f"the grammar has {what} (line {_line(source, at)})",
        hint="rules, strings, /regexes/, %import common.X, %ignore and %json {schema} are supported",
        field="grammar",
    )


def _json(source: str, at: int) -> tuple[str, int]:
    """The schema after %json, checked and written out, and where it ends."""
    start = next((i for i in range(at, len(source)) if not source[i].isspace()), len(source))
    end = _schema.closing(source, start)
    if end < 0:
        raise _refuse(source, start, "%json without a JSON object after it")
    return f"%json {_schema.prepare(source[start:end])}", end
