"""JSON schemas: checked keyword by keyword, and rewritten into the part of the language that llguidance enforces.

The walk is a loop over a list, never a recursion: what a user sends may nest as deep as it likes. The result holds enforced
keywords only; every schema that something refers to, and whatever lies deeper than llguidance's reader goes, moves to
`$defs`. Strings are spelled in one way (no \\u escapes), or a name could be written twice.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any
from urllib.parse import unquote

from hasten.engine.limits import LIMITS
from hasten.errors import ConfigError
from hasten.logits import _regex
from hasten.logits._keywords import ANNOTATIONS, DRAFTS, ENFORCED, FORMATS, REFUSED, TYPES

_IDENTIFIER = re.compile(r"[A-Za-z_$][\w$-]{0,80}\Z")
_CONTROL = re.compile("[\x00-\x07\x0b\x0e-\x1f\x7f\ud800-\udfff]")
_BRACKETS = re.compile(r'[\[\]{}"\\]')
_EXACT = 2**53
_NESTED = 24  # schemas inside one another before the next moves to $defs; llguidance's reader stops at some 120 brackets
_PATTERNS = 32  # pattern properties in a schema; llguidance compares each with each
OPTIONS = {
    # Between two parts of a JSON text: up to 8 blanks, or one line end and up to 64. So a model can pretty-print, and
    # cannot go on with spaces for ever.
    "whitespace_pattern": r"[\x20\x09]{1,8}|\r?\n[\x20\x09]{0,64}",
    "json_allowed_escapes": 'nrbtf\\"',
}
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_COUNTS = ("minProperties", "maxProperties", "minItems", "maxItems", "minLength", "maxLength")
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")


@dataclass(slots=True)
class _Place:
    """One schema of the source: where it stands, and the container and key its rewritten form goes to."""

    value: Any
    path: str
    pointer: str
    container: Any
    key: Any
    level: int
    depth: int
    parent: str = ""
    out: Any = None
    second: str = ""
    definition: bool = False


def prepare(source: str) -> str:
    """`source` (JSON text of a schema) as JSON text that llguidance enforces completely, its options included.

    Raises ConfigError naming the keyword and its place.
    """
    schema = _Walk(loads(source)).run()
    if isinstance(schema, bool):
        schema = {"anyOf": [schema]}
    return json.dumps({"x-guidance": OPTIONS, **schema}, ensure_ascii=False)


def loads(source: str, place: str = "schema") -> Any:
    """The value of a JSON text; raises ConfigError when it is none, or nested deeper than limits.grammar_depth."""
    if closing(source, 0, LIMITS.grammar_depth * 2) == -2:
        raise ConfigError(f"{place} is nested more than {LIMITS.grammar_depth} levels deep", field="grammar")

    def constant(name: str) -> None:
        raise ValueError(f"{name} is no JSON number")

    try:
        return json.loads(source, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place} is not JSON: {str(error)[:120]}", field="grammar") from None


def closing(source: str, start: int, most: int = LIMITS.grammar_depth * 2) -> int:
    """Where the bracket at or after `start` that opens first is closed; -1: never, -2: deeper than `most`."""
    depth, quoted, skip = 0, False, -1
    for match in _BRACKETS.finditer(source, start):
        c, at = match[0], match.start()
        if at == skip:
            continue
        if c == "\\":
            skip = at + 1
        elif c == '"':
            quoted = not quoted
        elif not quoted:
            depth += 1 if c in "[{" else -1
            if depth > most:
                return -2
            if depth <= 0:
                return at + 1
    return -1


def deepest(graph: Mapping[str, tuple[int, Sequence[str]]]) -> int:
    """The most weight that a chain of references can gather; definitions that refer to one another count together."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    depth: dict[str, int] = {}
    stack: list[str] = []
    for root in graph:
        if root in order:
            continue
        work: list[tuple[str, Iterator[str]]] = [(root, iter(graph[root][1]))]
        order[root] = low[root] = len(order)
        stack.append(root)
        while work:
            name, rest = work[-1]
            below = next((other for other in rest if other in graph and other not in depth), None)
            if below is not None:
                if below in order:
                    low[name] = min(low[name], order[below])
                else:
                    order[below] = low[below] = len(order)
                    stack.append(below)
                    work.append((below, iter(graph[below][1])))
                continue
            work.pop()
            if work:
                low[work[-1][0]] = min(low[work[-1][0]], low[name])
            if low[name] == order[name]:  # the last of its cycle: what it and its like gather
                members: list[str] = []
                while not members or members[-1] != name:
                    members.append(stack.pop())
                after = [depth[o] for m in members for o in graph[m][1] if o in depth]
                total = sum(graph[m][0] for m in members) + max(after, default=0)
                depth.update(dict.fromkeys(members, total))
    return max(depth.values(), default=0)


@dataclass(slots=True)
class _Walk:
    """One schema on its way through: places still to visit, and what was found."""

    schema: Any
    places: dict[str, _Place] = field(default_factory=dict)
    refs: list[tuple[_Place, str]] = field(default_factory=list)
    unions: list[list[Any]] = field(default_factory=list)
    values: int = 0
    patterns: int = 0
    merges: str = ""

    def run(self) -> Any:
        root: list[Any] = [None]
        queue = [_Place(self.schema, "schema", "", root, 0, 0, 0)]
        while queue:
            place = queue.pop()
            self.places[place.pointer] = place
            if len(self.places) + self.values > LIMITS.grammar_symbols:
                raise _error(place.path, f"is one schema too many; at most {LIMITS.grammar_symbols}")
            if place.depth >= LIMITS.grammar_depth:
                raise _error(place.path, f"is nested too deeply; at most {LIMITS.grammar_depth} schemas")
            if isinstance(place.value, bool):
                place.out = place.value
            elif isinstance(place.value, dict):
                place.out = {}
                queue += self.keywords(place)
            else:
                raise _error(place.path, "is no schema; a schema is an object, true or false")
            place.container[place.key] = place.out
        if self.patterns > 1 and self.merges:
            raise _error(self.merges, "cannot be combined with several patternProperties", "use one pattern")
        return self.link(root)

    def keywords(self, place: _Place) -> list[_Place]:
        """The keywords of one schema, in their order; returns the schemas inside it, first ones last."""
        inside: list[_Place] = []
        for keyword, value in place.value.items():
            path = _join(place.path, keyword)
            if keyword in ANNOTATIONS:
                self.annotation(place, keyword, value, path)
            elif keyword not in ENFORCED:
                if keyword == "uniqueItems" and value is False:
                    continue
                hint = REFUSED.get(keyword, "it is no keyword that hasten knows; leave it out")
                raise _error(path, "is not supported", hint)
            elif keyword in _MAPS:
                inside += self.map(place, keyword, value, path)
            elif keyword in _LISTS:
                if not isinstance(value, list) or not value:
                    raise _error(path, "must be a list of schemas, not empty")
                place.out[keyword] = made = [None] * len(value)
                if keyword == "oneOf":
                    self.unions.append(made)
                inside += [self.inner(place, keyword, i, v, f"{path}[{i}]", made) for i, v in enumerate(value)]
            elif keyword in ("items", "additionalProperties"):
                if isinstance(value, list):
                    raise _error(path, "is a list, which is not supported", "use prefixItems for the first items")
                place.out[keyword] = None
                inside.append(self.inner(place, keyword, None, value, path, place.out))
            else:
                self.plain(place, keyword, value, path)
        if place.second:
            place.out.setdefault("allOf", []).append({"pattern": place.second})
        self.counted(place)
        joined = [k for k in ("allOf", "anyOf", "oneOf", "$ref", "enum", "const") if k in place.out]
        if joined and (len(place.out) > 1 or joined == ["allOf"]):
            self.merges = self.merges or _join(place.path, joined[0])
        return inside[::-1]

    def counted(self, place: _Place) -> None:
        """Refuse bounds on the number of properties that a grammar in a fixed order cannot keep."""
        out = place.out
        required = out.get("required", [])
        optional = set(place.value.get("properties", ())) - set(required)
        least, most = out.get("minProperties", 0) - len(required), out.get("maxProperties")
        if least > 1:
            raise _error(
                _join(place.path, "minProperties"), "asks for more than one property beyond `required`", "name them there"
            )
        closed = place.value.get("additionalProperties") is False and not out.get("patternProperties")
        single = closed and (most is None or most - len(required) == 1)
        if optional and (least > 0 or most is not None) and not single:
            keyword = "minProperties" if most is None else "maxProperties"
            raise _error(_join(place.path, keyword), "is not supported beside optional properties", "make them required")

    def inner(self, place: _Place, keyword: str, index: Any, value: Any, path: str, container: Any) -> _Place:
        pointer = f"{place.pointer}/{_escape(keyword)}" + ("" if index is None else f"/{_escape(str(index))}")
        key = keyword if index is None else index
        return _Place(value, path, pointer, container, key, place.level + 1, place.depth + 1, place.pointer)

    def map(self, place: _Place, keyword: str, value: Any, path: str) -> list[_Place]:
        """A mapping from names to schemas; definitions are written out only where something refers to them."""
        if not isinstance(value, dict):
            raise _error(path, "must be an object of schemas")
        if len(value) > LIMITS.schema_properties and keyword in ("properties", "patternProperties"):
            raise _error(path, f"names {len(value)} properties; at most {LIMITS.schema_properties}")
        made: dict[str, Any] = {}
        inside = [self.inner(place, keyword, name, v, _join(path, name), made) for name, v in value.items()]
        if keyword in ("$defs", "definitions"):
            for inner in inside:
                inner.level, inner.definition = 0, True
            return inside
        place.out[keyword] = made
        if keyword == "properties":
            for name in value:
                _spelled(name, _join(path, name))
            return inside
        self.patterns += len(value)
        if self.patterns > _PATTERNS:
            raise _error(path, f"makes more than {_PATTERNS} patterns in the schema")
        for inner in inside:
            inner.key = _regex.check(str(inner.key), inner.path, search=True)
            made[inner.key] = None
        return inside

    def annotation(self, place: _Place, keyword: str, value: Any, path: str) -> None:
        if keyword == "$schema" and not (isinstance(value, str) and value.rstrip("#").endswith(DRAFTS)):
            raise _error(path, "names a dialect that is not known", "drafts 4, 6, 7, 2019-09 and 2020-12 are")
        if keyword == "$id" and place.pointer:
            raise _error(path, "is not supported inside a schema", "refer to #/$defs/name")

    def plain(self, place: _Place, keyword: str, value: Any, path: str) -> None:
        """A keyword without schemas inside."""
        out = place.out
        if keyword == "type":
            kinds = value if isinstance(value, list) else [value]
            if not kinds or not all(isinstance(kind, str) and kind in TYPES for kind in kinds):
                raise _error(path, "must be one of " + ", ".join(TYPES) + ", or a list of them")
            out[keyword] = list(dict.fromkeys(kinds)) if isinstance(value, list) else value
        elif keyword in ("enum", "const"):
            if keyword == "enum" and (not isinstance(value, list) or not value):
                raise _error(path, "must be a list of values, not empty")
            self.values += _literal(value, path)
            if self.values > LIMITS.enum_values:
                raise _error(path, f"makes more than {LIMITS.enum_values} values in the schema")
            out[keyword] = value
        elif keyword == "$ref":
            if not isinstance(value, str) or not (value == "#" or value.startswith("#/")):
                raise _error(path, f"= {value!r:.60} is not supported", "only #/... of the same schema is read")
            out[keyword] = value
            self.refs.append((place, value))
        elif keyword == "required":
            if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
                raise _error(path, "must be a list of names")
            if len(value) > LIMITS.schema_properties:
                raise _error(path, f"names {len(value)} properties; at most {LIMITS.schema_properties}")
            out[keyword] = [_spelled(name, path) for name in dict.fromkeys(value)]
        elif keyword in _COUNTS:
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
                raise _error(path, "must be an integer in [0, 2147483647]")
            out[keyword] = value
        elif keyword in _NUMBERS:
            _number(value, path)
            if keyword == "multipleOf" and value <= 0:
                raise _error(path, "must be above 0")
            out[keyword] = value
        else:  # pattern, format
            self.text(place, keyword, value, path)

    def text(self, place: _Place, keyword: str, value: Any, path: str) -> None:
        """A pattern, or a format, which is one."""
        if not isinstance(value, str):
            raise _error(path, "must be a string")
        if keyword == "format" and value not in FORMATS:
            raise _error(path, f"= {value!r:.40} is not supported", "known: " + ", ".join(FORMATS))
        if keyword == "format" and FORMATS[value] is None:
            place.out[keyword] = value
            return
        pattern = str(FORMATS[value]) if keyword == "format" else _regex.check(value, path, search=True)
        if "pattern" in place.out:
            place.second = pattern
        else:
            place.out["pattern"] = pattern

    def link(self, root: list[Any]) -> Any:
        """The whole schema, with what is referred to, and what lies deep, in `$defs`."""
        names = {"": "#"}
        for place, ref in self.refs:
            pointer = unquote(ref[1:])
            if pointer not in self.places:
                raise _error(_join(place.path, "$ref"), f"= {ref!r:.80} leads to no schema")
            place.out["$ref"] = names.setdefault(pointer, f"#/$defs/s{len(names)}")
        for pointer, place in self.places.items():
            if place.level and place.level % _NESTED == 0:
                names.setdefault(pointer, f"#/$defs/s{len(names)}")
        owner: dict[str, str] = {}
        graph: dict[str, tuple[int, list[str]]] = {}
        for pointer, place in self.places.items():  # parents come before what is inside them
            above = owner.get(place.parent, "")
            own = owner[pointer] = pointer if pointer in names or place.definition else above
            graph.setdefault(own, (0, []))
            weight = max(graph[own][0], place.depth - self.places[own].depth + 1)
            graph[own] = (weight, graph[own][1])
            if own != above and not place.definition:
                graph[above][1].append(own)
        for place, ref in self.refs:
            graph[owner[place.pointer]][1].append(unquote(ref[1:]))
        if deepest(graph) > LIMITS.grammar_depth:
            raise ConfigError(
                f"schema is nested too deeply along its references; at most {LIMITS.grammar_depth} levels", field="grammar"
            )
        defs = {}
        for pointer, url in names.items():
            if pointer:
                place = self.places[pointer]
                defs[url] = place.out
                if not place.definition:
                    place.container[place.key] = {"$ref": url}
        self.inline(defs)
        if defs:
            root[0]["$defs"] = {url.rpartition("/")[2]: out for url, out in defs.items()}
        return root[0]

    def inline(self, defs: Mapping[str, Any]) -> None:
        """References that are alternatives of a oneOf become what they lead to: else llguidance sees no difference."""
        sizes: dict[str, int] = {}
        total = 0
        for options in self.unions:
            for i, option in enumerate(options):
                seen: set[str] = set()
                while isinstance(option, dict) and set(option) == {"$ref"} and option["$ref"] in defs:
                    url = option["$ref"]
                    if url in seen:
                        break
                    seen.add(url)
                    option = defs[url]
                    if url not in sizes:
                        sizes[url] = len(json.dumps(option))
                    total += sizes[url]
                if total > LIMITS.grammar_bytes:
                    raise ConfigError("schema is too large with the alternatives of its oneOf written out", field="grammar")
                options[i] = option


def _join(path: str, name: str) -> str:
    """`path` and one step further, as people write it."""
    if _IDENTIFIER.match(name):
        return f"{path}.{name}"
    return f"{path}[{json.dumps(name if len(name) <= 40 else name[:37] + '...')}]"


def _escape(part: str) -> str:
    return part.replace("~", "~0").replace("/", "~1")


def _error(path: str, what: str, hint: str = "") -> ConfigError:
    """A refusal that names the place: `schema.properties.a.contentEncoding` is not supported."""
    shown = path if len(path) <= 300 else f"{path[:140]}...{path[-140:]}"
    return ConfigError(f"{shown} {what}", hint=hint, field="grammar")


def _spelled(text: str, path: str) -> str:
    """A name or a value's text, which must have exactly one spelling in JSON."""
    found = _CONTROL.search(text)
    if found:
        raise _error(
            path, f"holds the character U+{ord(found[0]):04X}, which is not supported", "leave control characters out"
        )
    return text


def _number(value: Any, path: str) -> None:
    """Refuse numbers that a grammar over decimal digits cannot express exactly."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _error(path, "must be a number")
    exact = abs(value) <= _EXACT if isinstance(value, int) else math.isfinite(value) and abs(value) <= _EXACT
    if not exact or (isinstance(value, float) and int(Decimal(repr(value)).as_tuple().exponent) < -15):
        raise _error(path, f"= {str(value)[:40]} is not supported", "numbers up to 2^53 with at most 15 decimals are")


def _literal(value: Any, path: str) -> int:
    """Check a JSON value of const or enum; returns how many values it holds."""
    count, left = 0, [(value, 0)]
    while left:
        item, depth = left.pop()
        count += 1
        if depth > _NESTED:
            raise _error(path, f"holds a value nested more than {_NESTED} deep")
        if isinstance(item, str):
            _spelled(item, path)
        elif isinstance(item, dict):
            for name in item:
                _spelled(name, path)
            left += [(inner, depth + 1) for inner in item.values()]
        elif isinstance(item, list):
            left += [(inner, depth + 1) for inner in item]
        elif item is not None and not isinstance(item, bool):
            _number(item, path)
    return count
