"""Chat templates: programs written by strangers, rendered in a sandbox with bounds on time, output and sizes.

Message contents are data. Wherever a content holds the text of a special token, that text is replaced by an escape
before rendering and encoded as ordinary text afterwards; every other content passes through unchanged, so ordinary
messages give exactly the ids of a plain rendering.
"""

from __future__ import annotations

import datetime
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FrameType
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from hasten.engine.limits import LIMITS
from hasten.errors import ConfigError, FormatError, out_of_range

_OPEN, _CLOSE, _BASE = "\ue0f0", "\ue0f1", 0xE100
_ESCAPE = re.compile(f"{_OPEN}(.){_CLOSE}", re.DOTALL)
_GROWING = ("center", "ljust", "rjust", "zfill", "expandtabs", "format", "format_map")


class _Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's immutable sandbox without the operators and methods that make huge values from small ones."""

    intercepted_binops = frozenset(["*", "**", "%", "<<"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sized = next((v for v in (left, right) if isinstance(v, (str, bytes, list, tuple))), None)
        times = next((v for v in (left, right) if isinstance(v, int)), 0)
        if operator == "*" and sized is not None and len(sized) * max(times, 0) > LIMITS.template_chars:
            raise SecurityError("the template repeats a value too often")
        numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
        if operator in ("**", "<<") and not (numbers and abs(left) < 2**32 and abs(right) < 64):
            raise SecurityError(f"the template uses {operator} on large values")
        if operator == "%" and isinstance(left, (str, bytes)):
            raise SecurityError("the template formats with %")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(obj, "__name__", "") in _GROWING and isinstance(getattr(obj, "__self__", None), (str, bytes)):
            raise SecurityError(f"the template calls {obj.__name__}")
        return super().call(context, obj, *args, **kwargs)


def _refuse(message: str) -> None:
    raise ConfigError(f"the chat template refuses these messages: {message}", field="messages")


def _environment() -> _Sandbox:
    env = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    for name in ("center", "indent", "format", "filesizeformat", "pprint", "urlize", "wordwrap", "xmlattr"):
        env.filters.pop(name, None)
    env.filters["tojson"] = lambda value, indent=None, **_: json.dumps(
        value, ensure_ascii=False, indent=min(int(indent), 8) if indent else None
    )
    env.globals["raise_exception"] = _refuse
    env.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(str(form)[:100])
    env.globals.pop("lipsum", None)
    return env


def _deadline(seconds: float) -> Callable[[FrameType, str, Any], Any]:
    """A trace function that ends a rendering after `seconds`: jinja2 itself cannot stop a loop that prints nothing."""
    end = time.monotonic() + seconds

    def check(frame: FrameType, event: str, arg: Any) -> Any:
        if time.monotonic() > end:
            raise SecurityError(f"the template runs longer than {seconds:g} s")
        return check

    return check


class ChatTemplate:
    """A compiled chat template; `special` are the token texts that contents must not be able to form."""

    def __init__(self, source: str, special: Iterable[str], constants: Mapping[str, str]) -> None:
        if len(source) > LIMITS.template_chars:
            raise FormatError(f"the chat template has {len(source)} characters; at most {LIMITS.template_chars}")
        self.source = source
        self._constants = dict(constants)
        texts = sorted((re.escape(text) for text in special if text), key=len, reverse=True)
        self._dangerous = re.compile("|".join([*texts, _OPEN, _CLOSE]))
        try:
            self._template = _environment().from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise FormatError(f"the chat template cannot be compiled: {error}", field="chat_template") from None

    def render(self, messages: Sequence[Mapping[str, object]], generation_prompt: bool) -> list[tuple[str, bool]]:
        """Pieces (text, trusted): trusted text may hold special tokens, the rest is ordinary text whatever it says.

        Raises ConfigError when messages are malformed, or the template refuses them or exceeds its bounds.
        """
        literals: list[str] = []
        safe = [self._escaped(message, literals) for message in _checked(messages)]
        previous = sys.gettrace()
        sys.settrace(_deadline(LIMITS.template_s))
        try:
            parts, size = [], 0
            for part in self._template.generate(
                messages=safe, add_generation_prompt=generation_prompt, tools=None, documents=None, **self._constants
            ):
                size += len(part)
                if size > LIMITS.template_chars:
                    raise SecurityError(f"the template writes more than {LIMITS.template_chars} characters")
                parts.append(part)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"the chat template failed: {str(error)[:300]}", field="messages") from None
        except (RecursionError, MemoryError):
            raise ConfigError("the chat template failed: it needs too much memory", field="messages") from None
        finally:
            sys.settrace(previous)
        pieces: list[tuple[str, bool]] = []
        for i, piece in enumerate(_ESCAPE.split("".join(parts))):
            if i % 2 == 0:
                pieces.append((piece, True))
            elif ord(piece) - _BASE < len(literals):
                pieces.append((literals[ord(piece) - _BASE], False))
        return [(text, trusted) for text, trusted in pieces if text]

    def _escaped(self, value: Any, literals: list[str]) -> Any:
        """`value` with every dangerous run of text inside its strings replaced by an escape."""
        if isinstance(value, str):
            return self._dangerous.sub(lambda match: self._escape(match.group(), literals), value)
        if isinstance(value, Mapping):
            return {key: self._escaped(item, literals) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._escaped(item, literals) for item in value]
        return value

    @staticmethod
    def _escape(text: str, literals: list[str]) -> str:
        if text not in literals:
            literals.append(text)
            if len(literals) > 0x100:
                raise ConfigError("messages hold more than 256 kinds of special-token text", field="messages")
        return f"{_OPEN}{chr(_BASE + literals.index(text))}{_CLOSE}"


def _checked(messages: object) -> Sequence[Mapping[str, object]]:
    """Messages as a list of {"role": str, "content": str, ...}; raises ConfigError naming the first that is not."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise out_of_range("messages", messages, "a non-empty list of {role, content}")
    if len(messages) > LIMITS.messages:
        raise out_of_range("messages", f"{len(messages)} messages", f"at most {LIMITS.messages}")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise out_of_range(f"messages[{i}]", message, "an object with role and content")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise out_of_range(f"messages[{i}].{key}", message.get(key), "a string")
    return messages
