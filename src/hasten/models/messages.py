"""Chat messages as a template can take them: checked, contents joined, and what it does not know put into words.

Tools and their calls are put into words in the Hermes form, which small models were trained on: `<tools>` lists what may
be called, `<tool_call>` holds {"name", "arguments"}, `<tool_response>` a result. A template that speaks this form itself
gets the values as they are; any other form (Llama's, Mistral's) is replaced by these words: answers are read in one form.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hasten.engine.limits import LIMITS
from hasten.errors import ConfigError, out_of_range

CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"

_OFFER = """# Tools

You may call one or more functions to help with the user's request.

The functions, as JSON within <tools></tools>:
<tools>
{tools}
</tools>

To call a function, answer with a JSON object of its name and arguments within <tool_call></tool_call>:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Knowledge:
    """What a template knows: `tools` with calls and results, a `developer` role, a `system` role (needed for offers)."""

    tools: bool
    developer: bool
    system: bool


def prepared(
    messages: object, tools: Sequence[Mapping[str, Any]] | None, knows: Knowledge
) -> tuple[list[Message], list[Message] | None]:
    """(messages, tools) for a template with this knowledge; tools are None where they went into the messages.

    Raises ConfigError naming the first message, part or call that is malformed.
    """
    out = checked(messages)
    for message in out:
        if message["role"] == "developer" and not knows.developer:
            message["role"] = "system"
    offered = [dict(tool) for tool in tools] if tools else None
    if knows.tools:
        return out, offered
    out = _worded(out)
    if offered:
        _offer(out, _OFFER.format(tools="\n".join(dumped(tool) for tool in offered)), knows.system)
    return out, None


def dumped(value: object) -> str:
    """JSON text as templates write it; raises ConfigError for what JSON cannot express."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError):
        raise ConfigError("a tool or its arguments hold a value that JSON cannot express", field="tools") from None


def check_depth(value: object, path: str) -> None:
    """Raise ConfigError when `value` nests deeper than the limit; walks without recursion."""
    level = [value]
    for _ in range(LIMITS.grammar_depth):
        items: list[object] = []
        for item in level:
            items += item.values() if isinstance(item, Mapping) else item if isinstance(item, (list, tuple)) else ()
        level = [item for item in items if isinstance(item, (Mapping, list, tuple))]
        if not level:
            return
    raise out_of_range(path, "a value nested deeper", f"nested at most {LIMITS.grammar_depth} levels")


def checked(messages: object) -> list[Message]:
    """Messages as new mappings: `content` a string, arguments of `tool_calls` parsed.

    Raises ConfigError naming the first that is malformed.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise out_of_range("messages", messages, "a non-empty list of {role, content}")
    if len(messages) > LIMITS.messages:
        raise out_of_range("messages", f"{len(messages)} messages", f"at most {LIMITS.messages}")
    out: list[Message] = []
    made: set[str] = set()
    for i, message in enumerate(messages):
        path = f"messages[{i}]"
        if not isinstance(message, Mapping):
            raise out_of_range(path, message, "an object with role and content")
        new = dict(message)
        if not isinstance(new.get("role"), str):
            raise out_of_range(f"{path}.role", new.get("role"), "a string")
        calls = new.get("tool_calls")
        if calls is None:
            new.pop("tool_calls", None)
        else:
            new["tool_calls"] = _calls(calls, new["role"], path)
            made.update(call["id"] for call in new["tool_calls"])
        new["content"] = _content(new.get("content"), f"{path}.content", absent=bool(calls))
        if new["role"] == "tool" and new.get("tool_call_id") not in made:
            raise out_of_range(f"{path}.tool_call_id", new.get("tool_call_id"), "the id of a tool call made before")
        out.append(new)
    return out


def _content(value: object, path: str, absent: bool) -> str:
    if value is None and absent:
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, (list, tuple)) or not value:
        raise out_of_range(path, value, "a string or a list of text parts")
    for j, part in enumerate(value):
        kind = part.get("type") if isinstance(part, Mapping) else part
        if kind != "text":
            raise out_of_range(f"{path}[{j}].type", kind, "'text'", hint="this model reads text only")
        if not isinstance(part.get("text"), str) or len(part) != 2:
            raise out_of_range(f"{path}[{j}]", part, '{"type": "text", "text": a string}')
    return "".join(part["text"] for part in value)


def _calls(calls: object, role: str, path: str) -> list[Message]:
    path = f"{path}.tool_calls"
    if role != "assistant":
        raise out_of_range(path, calls, "absent unless the role is assistant")
    if not isinstance(calls, (list, tuple)) or not calls:
        raise out_of_range(path, calls, "a non-empty list of calls")
    out = []
    for j, call in enumerate(calls):
        here = f"{path}[{j}]"
        if not isinstance(call, Mapping) or call.get("type", "function") != "function":
            raise out_of_range(here, call, '{"id", "type": "function", "function": {"name", "arguments"}}')
        function = call.get("function")
        if not isinstance(call.get("id"), str) or not call["id"]:
            raise out_of_range(f"{here}.id", call.get("id"), "a non-empty string")
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise out_of_range(f"{here}.function", function, '{"name": a string, "arguments": JSON text}')
        arguments = _arguments(function.get("arguments"), f"{here}.function.arguments")
        out.append({"id": call["id"], "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return out


def _arguments(text: object, path: str) -> dict[str, Any]:
    value = text
    if isinstance(text, str):
        try:
            value = json.loads(text, parse_constant=_no_constant) if text else {}
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, dict):
        raise out_of_range(path, text, "the JSON text of an object")
    check_depth(value, path)
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _worded(messages: Sequence[Message]) -> list[Message]:
    """Calls and results as text; results that follow one another become one message of the user, as the models know it."""
    out: list[Message] = []
    for message, before in zip(messages, (None, *messages), strict=False):
        if "tool_calls" in message:
            calls = [f"{CALL_OPEN}\n{dumped(call['function'])}\n{CALL_CLOSE}" for call in message["tool_calls"]]
            text = "\n".join([message["content"], *calls] if message["content"] else calls)
            out.append({"role": message["role"], "content": text})
        elif message["role"] == "tool":
            text = f"<tool_response>\n{message['content']}\n</tool_response>"
            if before is not None and before["role"] == "tool":
                out[-1]["content"] += "\n" + text
            else:
                out.append({"role": "user", "content": text})
        else:
            out.append(message)
    return out


def _offer(messages: list[Message], text: str, system: bool) -> None:
    """Put the offer into the system message, new if need be, or the user's first where the template takes none."""
    if system and messages[0]["role"] not in ("system", "developer"):
        messages.insert(0, {"role": "system", "content": text})
        return
    place = 0 if system else next((i for i, message in enumerate(messages) if message["role"] == "user"), 0)
    content = messages[place]["content"]
    both = (content, text) if system else (text, content)
    messages[place] = {**messages[place], "content": "\n\n".join(part for part in both if part)}
