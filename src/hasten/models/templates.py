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
from functools import cached_property
from types import FrameType
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from hasten.engine.limits import LIMITS
from hasten.errors import ConfigError, FormatError, out_of_range
from hasten.models.messages import CALL_OPEN, Knowledge, prepared

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
    """A trace function that ends a rendering after `seconds`: jinja2 itself cannot stop a loop that prints nothing.

    The thread's own time counts, so that an honest template is not refused because the machine is busy.
    """
    end = time.thread_time() + seconds

    def check(frame: FrameType, event: str, arg: Any) -> Any:
        if time.thread_time() > end:
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
        environment = _environment()
        try:
            tree = environment.parse(source)
            self._reads = meta.find_undeclared_variables(tree)
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise FormatError(f"the chat template cannot be compiled: {error}", field="chat_template") from None
        strings = [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
        written = "\n".join([*strings, *(node.data for node in tree.find_all(nodes.TemplateData))])
        # Its own words for tools are used only where they are those that answers are read in; `<function=` is another form.
        hermes = CALL_OPEN in written and "arguments" in written and "<function=" not in written
        self._tools = "tools" in self._reads and "tool" in strings and hermes
        self._developer = "developer" in strings

    @cached_property
    def _takes_system(self) -> bool:
        """Whether a system message reaches the text; tried, because templates say no in many ways."""
        probe = [{"role": "system", "content": "probe"}, {"role": "user", "content": "x"}]
        try:
            return "probe" in self._written({"messages": probe, "add_generation_prompt": True, "tools": None})
        except ConfigError:
            return False

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        generation_prompt: bool,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, object] | None = None,
    ) -> list[tuple[str, bool]]:
        """Pieces (text, trusted): trusted text may hold special tokens, the rest is ordinary text whatever it says.

        `tools` are OpenAI's {"type": "function", "function": {...}}; `options` may hold `enable_thinking` and
        `add_generation_prompt`. Raises ConfigError when messages or options are malformed, or the template refuses them or
        exceeds its bounds.
        """
        variables: dict[str, object] = {"add_generation_prompt": generation_prompt, **self._options(options or {})}
        system = self._tools or not tools or self._takes_system
        said, offered = prepared(messages, tools, Knowledge(self._tools, self._developer, system))
        literals: list[str] = []
        try:
            variables = {name: self._escaped(value, literals) for name, value in variables.items()}
            variables |= {"messages": self._escaped(said, literals), "tools": self._escaped(offered, literals)}
        except RecursionError:
            raise ConfigError("messages or tools are nested too deeply", field="messages") from None
        pieces: list[tuple[str, bool]] = []
        for i, piece in enumerate(_ESCAPE.split(self._written(variables))):
            if i % 2 == 0:
                pieces.append((piece, True))
            elif ord(piece) - _BASE < len(literals):
                pieces.append((literals[ord(piece) - _BASE], False))
        return [(text, trusted) for text, trusted in pieces if text]

    def _options(self, options: Mapping[str, object]) -> dict[str, object]:
        """The allowed options, checked: nothing else that a request says becomes a variable of the template."""
        for name, value in options.items():
            if name == "add_generation_prompt":
                if not isinstance(value, bool):
                    raise out_of_range("chat_template_kwargs.add_generation_prompt", value, "true or false")
            elif name != "enable_thinking":
                allowed = "add_generation_prompt, enable_thinking"
                message = f"chat_template_kwargs has {str(name)[:40]!r}; allowed are {allowed}"
                raise ConfigError(message, field="chat_template_kwargs")
            elif not (value is None or isinstance(value, (str, bool, int, float))):
                raise out_of_range("chat_template_kwargs.enable_thinking", value, "true, false, null, a number or a string")
            elif value and name not in self._reads:
                message = "chat_template_kwargs.enable_thinking: the model's chat template has no such switch"
                raise ConfigError(message, hint="leave it out, or false", field="chat_template_kwargs.enable_thinking")
        return dict(options)

    def _written(self, variables: Mapping[str, Any]) -> str:
        """The template's text for these variables, within the bounds on time and size."""
        previous = sys.gettrace()
        sys.settrace(_deadline(LIMITS.template_s))
        try:
            parts, size = [], 0
            for part in self._template.generate({**self._constants, "documents": None, **variables}):
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
        return "".join(parts)

    def _escaped(self, value: Any, literals: list[str]) -> Any:
        """`value` with every dangerous run of text inside its strings replaced by an escape."""
        if isinstance(value, str):
            return self._dangerous.sub(lambda match: self._escape(match.group(), literals), value)
        if isinstance(value, Mapping):
            return {self._escaped(key, literals): self._escaped(item, literals) for key, item in value.items()}
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
