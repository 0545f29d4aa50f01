"""OpenAI's `tools`, `tool_choice` and `parallel_tool_calls`: checked, offered to the model, enforced, and read back.

    offer = read_tools(body.tools, body.tool_choice, body.parallel_tool_calls)  # None: nothing is offered
    for path, schema in offer.schemas(): ...      # for the check of schema keywords, which names the path it refuses
    ids = tokenizer.chat(messages, tools=offer.for_template())
    request = Request(..., grammar=tool_grammar(offer, content))  # content: what response_format asks of text, or None
    parser = ToolCallParser(offer, key=f"{seed}:{prompt digest}", choice=i)
    for text in pieces: deltas = parser.push(text)         # each an OpenAI `delta` without its role
    deltas, finish_reason = parser.finish(engine_reason)
    message = assembled(all deltas)                        # {"content", "tool_calls"} of a whole answer

Calls have the Hermes form, `<tool_call>\\n{"name": "f", "arguments": {...}}\\n</tool_call>`. The grammar allows text, or
text and then calls with nothing after them; once `<tool_call>` is written only a call to an offered tool can follow, its
arguments valid under the tool's schema. Where response_format gives text a form, an answer is such text or calls alone.
So the parser reads what the grammar wrote; other text is content, as it stands.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hasten.engine.limits import LIMITS
from hasten.errors import ConfigError, out_of_range
from hasten.models.messages import CALL_CLOSE, CALL_OPEN, check_depth
from hasten.types import Grammar

Delta = dict[str, Any]

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_OPEN = frozenset(
    (
        *("$ref", "allOf", "anyOf", "oneOf", "additionalProperties", "patternProperties", "propertyNames"),
        "unevaluatedProperties",
    )
)
_OBJECT = '{"type": "object"}'
_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class Tool:
    """One function on offer. `parameters` is the JSON schema of its arguments; {} is a function without arguments.

    Arguments always satisfy the schema, so `strict` asks for nothing more.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    strict: bool

    def for_template(self) -> dict[str, Any]:
        """OpenAI's object, as chat templates expect it."""
        function: dict[str, Any] = {"name": self.name}
        if self.description:
            function["description"] = self.description
        function["parameters"] = dict(self.parameters) or _NO_ARGUMENTS
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class Offer:
    """Tools a model may call: `choice` auto (text or calls), required (calls), or function (one call to tools[`only`])."""

    tools: tuple[Tool, ...]
    choice: Literal["auto", "required", "function"]
    only: int
    parallel: bool

    def schemas(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """(path in the request, schema) of every tool's arguments."""
        for i, tool in enumerate(self.tools):
            yield f"tools[{i}].function.parameters", tool.parameters

    def for_template(self) -> list[dict[str, Any]]:
        """The tools as `Tokenizer.chat` takes them."""
        return [tool.for_template() for tool in self.tools]


def read_tools(tools: object, tool_choice: object = None, parallel_tool_calls: object = None) -> Offer | None:
    """The three fields of a chat request, checked; None when nothing is offered (no tools, or tool_choice "none").

    Raises ConfigError with the path of the first field that is wrong, such as `tools[2].function.name`.
    """
    if parallel_tool_calls is not None and not isinstance(parallel_tool_calls, bool):
        raise out_of_range("parallel_tool_calls", parallel_tool_calls, "true or false")
    if tools is None:
        for field, value in (("tool_choice", tool_choice), ("parallel_tool_calls", parallel_tool_calls)):
            if value is not None:
                raise out_of_range(field, value, "absent unless tools are given")
        return None
    if not isinstance(tools, (list, tuple)) or not tools:
        raise out_of_range("tools", tools, "a non-empty list of tools", hint="leave it out to offer none")
    if len(tools) > LIMITS.tools:
        raise out_of_range("tools", f"{len(tools)} tools", f"at most {LIMITS.tools}")
    checked: list[Tool] = []
    for i, tool in enumerate(tools):
        checked.append(_tool(tool, f"tools[{i}]"))
        if any(checked[i].name == before.name for before in checked[:i]):
            raise out_of_range(f"tools[{i}].function.name", checked[i].name, "a name no other tool has")
    choice, only = _choice(tool_choice, checked)
    if choice == "none":
        return None
    return Offer(tuple(checked), choice, only, parallel_tool_calls is not False)


def _keys(value: object, path: str, allowed: Sequence[str]) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise out_of_range(path, value, f"an object of {', '.join(allowed)}")
    for key in value:
        if key not in allowed:
            raise ConfigError(f"{path} has {str(key)[:40]!r}; allowed are {', '.join(allowed)}", field=path)
    return value


def _tool(value: object, path: str) -> Tool:
    if isinstance(value, Mapping) and value.get("type") != "function":
        raise out_of_range(f"{path}.type", value.get("type"), "'function'")
    tool = _keys(value, path, ("type", "function"))
    path = f"{path}.function"
    function = _keys(tool.get("function"), path, ("name", "description", "parameters", "strict"))
    name, description = function.get("name"), function.get("description")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise out_of_range(f"{path}.name", name, "1 to 64 of the characters A-Z a-z 0-9 _ -")
    if description is not None and not isinstance(description, str):
        raise out_of_range(f"{path}.description", description, "a string")
    strict = function.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise out_of_range(f"{path}.strict", strict, "true or false")
    parameters = function.get("parameters")
    if parameters is None:
        parameters = {}
    if not isinstance(parameters, Mapping):
        raise out_of_range(f"{path}.parameters", parameters, "a JSON schema (an object)")
    if parameters and parameters.get("type") != "object":
        raise out_of_range(f"{path}.parameters.type", parameters.get("type"), "'object'", hint="arguments are an object")
    if "x-guidance" in parameters:
        raise ConfigError(
            f"{path}.parameters has 'x-guidance', which is no JSON schema keyword", field=f"{path}.parameters"
        )
    check_depth(parameters, f"{path}.parameters")
    return Tool(name, description or "", parameters, strict is True)


def _choice(value: object, tools: Sequence[Tool]) -> tuple[Any, int]:
    if value is None or value in ("auto", "none", "required"):
        return value or "auto", -1
    forms = "'none', 'auto', 'required' or {'type': 'function', 'function': {'name': ...}}"
    if not isinstance(value, Mapping):
        raise out_of_range("tool_choice", value, forms)
    if value.get("type") != "function":
        raise out_of_range("tool_choice.type", value.get("type"), f"'function'; tool_choice is {forms}")
    function = _keys(_keys(value, "tool_choice", ("type", "function")).get("function"), "tool_choice.function", ("name",))
    names = [tool.name for tool in tools]
    if function.get("name") not in names:
        shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        raise out_of_range("tool_choice.function.name", function.get("name"), f"the name of one of the tools ({shown})")
    return "function", names.index(function["name"])


def tool_grammar(offer: Offer | None, content: Grammar | None = None) -> Grammar | None:
    """The form of an answer under this offer, for llguidance; None where any text will do.

    `content` (json_object or json_schema) is the form of an answer that calls nothing. Raises ConfigError when a schema
    cannot be written as JSON, or all together exceed the limit of a grammar.
    """
    if offer is None:
        return content
    places = range(len(offer.tools)) if offer.only < 0 else (offer.only,)
    one_call = not offer.parallel or offer.choice == "function"
    more = "" if one_call else f" ({_quoted(chr(10) + CALL_OPEN)} body)*"
    if offer.choice == "auto" and content is not None:
        lines = [f"start: content | {_quoted(CALL_OPEN)} body{more}", f"content: %json {content.source or _OBJECT}"]
    elif offer.choice == "auto":
        # No TEXT holds `<tool_call>`, and HEAD ends with its first: once it is written, nothing but a call can follow.
        text = _without(CALL_OPEN)
        lines = [f"start: TEXT | HEAD body{more}", f"TEXT: /{text}/", f"HEAD: /{text}{CALL_OPEN}/"]
    else:
        lines = [f"start: {_quoted(CALL_OPEN)} body{more}"]
    calls = " | ".join(f"call_{i}" for i in places)
    lines.append(f"body: {_quoted(chr(10))} ({calls}) {_quoted(chr(10) + CALL_CLOSE)}")
    for i in places:
        tool = offer.tools[i]
        head = f'{{"name": {json.dumps(tool.name)}, "arguments": '
        schema = _closed(tool.parameters) if tool.parameters else _NO_ARGUMENTS
        lines.append(f'call_{i}: {_quoted(head)} %json {_json(schema, i)} "}}"')
    text = "\n".join(lines) + "\n"
    if len(text) > LIMITS.grammar_bytes:
        raise out_of_range("tools", f"schemas of {len(text)} bytes", f"at most {LIMITS.grammar_bytes} bytes of schemas")
    return Grammar("lark", text)


def _without(word: str) -> str:
    """A regex of the texts that do not hold `word`, whose first character stands nowhere else in it."""
    first, rest = word[0], ""
    for after in reversed(word[1:]):  # what may come when the word has been written as far as `after`
        rest = f"([^{first}{after}][^{first}]*|{after}{rest})?" if rest else f"([^{first}{after}][^{first}]*)?"
    return f"[^{first}]*({first}{rest})*"


def _closed(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema without properties it does not name, where it does not say: arguments nobody reads are not written."""
    return schema if _OPEN.intersection(schema) else {**schema, "additionalProperties": False}


def _json(schema: Mapping[str, Any], i: int) -> str:
    try:
        return json.dumps(schema, allow_nan=False)
    except ValueError:
        raise out_of_range(f"tools[{i}].function.parameters", "NaN or Infinity", "JSON") from None


def _quoted(text: str) -> str:
    """`text` as a string of the Lark language, whose escapes are JSON's."""
    return json.dumps(text)


# --- reading an answer ---

_SPACE = " \t\r\n"
_HEAD = re.compile(
    r'[ \t\r\n]*\{[ \t\r\n]*"name"[ \t\r\n]*:[ \t\r\n]*"([A-Za-z0-9_-]{1,64})"[ \t\r\n]*,'
    r'[ \t\r\n]*"arguments"[ \t\r\n]*:[ \t\r\n]*(?=\{)'
)
_HEAD_CHARS = 256  # where a head must have ended; with the longest name and single spaces it has 96
_TAIL = re.compile(r"[ \t\r\n]*\}[ \t\r\n]*" + CALL_CLOSE)


class ToolCallParser:
    """Turns the text of one choice into OpenAI deltas while it grows; any cutting of the text gives the same whole.

    `key` makes the ids of calls: the same key, choice and place give the same id, so pass what identifies the answer (seed
    and prompt). Content never holds a piece of `<tool_call>` that may still become one, nor the white space before it.
    `formed`: response_format gives content a form, so that a tag behind its beginning is a part of its strings.
    """

    def __init__(self, offer: Offer, key: str, choice: int = 0, *, formed: bool = False) -> None:
        self._names = frozenset(tool.name for tool in offer.tools)
        self._key, self._choice, self._formed = key, choice, formed
        self._state: Literal["text", "content", "head", "arguments", "tail"] = "text"
        self._rest, self._space = "", ""  # text not decided on; white space before a tag not decided on
        self._calls = 0
        self._depth, self._string, self._escape = 0, False, False

    def push(self, text: str) -> list[Delta]:
        """The deltas that `text` completes; neighbours of one kind are one delta."""
        self._rest += text
        return _merged(self._advance())

    def finish(self, reason: str) -> tuple[list[Delta], str]:
        """(last deltas, finish reason) at the end of the text; `reason` is the engine's: stop, length, abort or error.

        The result is "tool_calls" when the text ends with a whole call; a call cut short keeps what was sent of it, and the
        engine's reason. The beginning of a tag that a length limit cut is dropped; one that the model ended with is text.
        """
        deltas = list(self._advance())
        whole = self._calls > 0 and self._state in ("text", "tail")
        content = ""
        if self._state == "text":
            held = 0 if reason == "stop" else _held(self._rest)
            content = self._rest[:-held].rstrip(_SPACE) if held else self._rest
            if self._calls and not content.strip(_SPACE):
                content = ""
        elif self._state == "head" and reason == "stop":
            content = self._space + CALL_OPEN + self._rest
        self._rest = ""
        if content:
            deltas.append({"content": content})
        return _merged(deltas), "tool_calls" if whole and reason == "stop" else reason

    def _advance(self) -> Iterator[Delta]:
        read = {
            "text": self._read_text,
            "content": self._read_content,
            "head": self._read_head,
            "arguments": self._read_arguments,
            "tail": self._read_tail,
        }
        before = None
        while before != (self._state, len(self._rest)):
            before = self._state, len(self._rest)
            yield from read[self._state]()

    def _read_content(self) -> Iterator[Delta]:
        content, self._rest = self._rest, ""
        if content:
            yield {"content": content}

    def _read_text(self) -> Iterator[Delta]:
        if self._formed and not self._calls and not CALL_OPEN.startswith(self._rest[: len(CALL_OPEN)]):
            self._state = "content"
            return
        at = self._rest.find(CALL_OPEN)
        if at >= 0:
            content = self._rest[:at].rstrip(_SPACE)
            self._space, self._rest = self._rest[len(content) : at], self._rest[at + len(CALL_OPEN) :]
            self._state = "head"
        else:
            cut = len(self._rest) - _held(self._rest)
            cut = len(self._rest[:cut].rstrip(_SPACE))
            content, self._rest = self._rest[:cut], self._rest[cut:]
        if content:
            yield {"content": content}

    def _read_head(self) -> Iterator[Delta]:
        match = _HEAD.match(self._rest, 0, _HEAD_CHARS)
        if match and match[1] in self._names:
            self._rest = self._rest[match.end() :]
            self._state, self._depth, self._string, self._escape = "arguments", 0, False, False
            yield {
                "tool_calls": [
                    {
                        "index": self._calls,
                        "id": call_id(self._key, self._choice, self._calls),
                        "type": "function",
                        "function": {"name": match[1], "arguments": ""},
                    }
                ]
            }
            self._calls += 1
        elif match or len(self._rest) >= _HEAD_CHARS or CALL_CLOSE in self._rest:  # no call of ours: the model's own words
            self._state = "text"
            yield {"content": self._space + CALL_OPEN}

    def _read_arguments(self) -> Iterator[Delta]:
        end = 0
        for character in self._rest:
            end += 1
            if self._escape:
                self._escape = False
            elif self._string:
                self._escape = character == "\\"
                self._string = character != '"'
            elif character == '"':
                self._string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self._state = "tail"
                    break
        piece, self._rest = self._rest[:end], self._rest[end:]
        if piece:
            yield {"tool_calls": [{"index": self._calls - 1, "function": {"arguments": piece}}]}

    def _read_tail(self) -> Iterator[Delta]:
        """After the arguments: `}` and the closing tag; whatever else is there counts as text."""
        match = _TAIL.match(self._rest)
        packed = "".join(self._rest.split())
        if match:
            self._rest = self._rest[match.end() :]
            self._state = "text"
        elif len(packed) > len(CALL_CLOSE) or not ("}" + CALL_CLOSE).startswith(packed):
            self._state = "text"
        yield from ()


def _held(text: str) -> int:
    """Length of the longest end of `text` that begins `<tool_call>`."""
    return next((n for n in range(min(len(CALL_OPEN) - 1, len(text)), 0, -1) if CALL_OPEN.startswith(text[-n:])), 0)


def _merged(deltas: Iterable[Delta]) -> list[Delta]:
    out: list[Delta] = []
    for delta in deltas:
        if out and "content" in delta and "content" in out[-1]:
            out[-1]["content"] += delta["content"]
        else:
            out.append(delta)
    return out


def call_id(key: str, choice: int, index: int) -> str:
    """The id of a call: `call_` and 24 hexadecimal digits that depend on nothing but these three."""
    return "call_" + hashlib.sha256(json.dumps([key, choice, index]).encode()).hexdigest()[:24]


def assembled(deltas: Iterable[Delta]) -> dict[str, Any]:
    """The message that a stream of deltas adds up to: `content` (None where there is none) and `tool_calls` if any."""
    content, calls = "", list[dict[str, Any]]()
    for delta in deltas:
        content += delta.get("content", "")
        for part in delta.get("tool_calls", ()):
            if "id" in part:
                function = dict(part["function"])
                calls.append({"id": part["id"], "type": part["type"], "function": function})
            else:
                calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
    message: dict[str, Any] = {"content": content or (None if calls else "")}
    return {**message, "tool_calls": calls} if calls else message
