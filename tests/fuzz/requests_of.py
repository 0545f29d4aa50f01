"""Random requests made from the server's OpenAPI document: mostly well formed, often slightly wrong, sometimes absurd."""

from __future__ import annotations

import json
import random
from typing import Any

STRINGS = [
    "", "a", "hi", "tiny", "mini-dlm", "\x00", "\u202e", "\U0001f600" * 40, "x" * 3000, "<|im_end|>", "[MASK]", "{{ 7*7 }}", "../..", "null",
    "true", "-1", "%s%n", "' OR 1=1", "\ud7ff\ue000", "\r\nX: y", "auto", "none", "required", "length", "prompt-lookup", "plain", "threshold",
    "function", "text", "json_object", "json_schema", "user", "assistant", "tool", "a b", "\u0130\u0131", "(a+)+$", "start: /.*/",
]  # fmt: skip
NUMBERS = [
    0,
    1,
    2,
    3,
    7,
    -1,
    0.5,
    -0.5,
    1.5,
    20,
    21,
    100,
    2**31 - 1,
    2**31,
    2**53,
    2**63,
    -(2**63),
    10**40,
    1e308,
    5e-324,
    -0.0,
]
RAW = [b"", b"{", b"nul", b"\xff\xfe{}", b"[" * 3000, b'{"a":' * 2000, b'{"model":"tiny","messages":[{"role":"user","content":"\\ud800"}]}',
       b'{"model":"tiny","prompt":"a","temperature":NaN}', b'{"model":"tiny","prompt":"a","seed":1e999}', b'"tiny"', b"[]", b"0"]  # fmt: skip
SCHEMAS = [
    {"type": "object"}, {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}, {"$ref": "#"}, {}, {"type": "nope"},
    {"type": "string", "pattern": "(a+)+$"}, {"enum": []}, {"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}}, {"not": {}},
    {"type": "array", "items": {"type": "array"}, "minItems": 2**40}, {"type": "number", "multipleOf": 0}, {"if": {}, "then": {}},
    {"type": "object", "additionalProperties": {"type": "object", "properties": {"\ud7ff": {"const": None}}}}, {"type": "integer", "minimum": 5, "maximum": 1},
]  # fmt: skip


class Maker:
    """Bodies, paths and headers, one stream of them per seed."""

    def __init__(self, document: dict[str, Any], seed: int) -> None:
        self.document, self.random = document, random.Random(seed)
        self.operations = sorted(
            (path, method, operation)
            for path, methods in document["paths"].items()
            for method, operation in methods.items()
        )

    def anything(self, depth: int = 0) -> Any:
        """Any JSON value."""
        r = self.random
        kind = r.randrange(8 if depth < 3 else 5)
        if kind == 0:
            return r.choice([None, True, False])
        if kind in (1, 2):
            return r.choice(NUMBERS)
        if kind in (3, 4):
            return r.choice(STRINGS)
        if kind == 5:
            return r.choice(SCHEMAS)
        if kind == 6:
            return [self.anything(depth + 1) for _ in range(r.randrange(4))]
        return {r.choice(STRINGS): self.anything(depth + 1) for _ in range(r.randrange(4))}

    def value(self, schema: dict[str, Any], wrong: float, depth: int = 0) -> Any:
        """A value of this schema; every part of it is something else with probability `wrong`."""
        r = self.random
        if r.random() < wrong:
            return self.anything()
        if "$ref" in schema:
            return self.value(self.document["components"]["schemas"][schema["$ref"].rpartition("/")[2]], wrong, depth)
        for choice in ("anyOf", "oneOf"):
            if choice in schema:
                return self.value(r.choice(schema[choice]), wrong, depth)
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return r.choice(schema["enum"])
        kind = schema.get("type")
        if kind == "object":
            return self.object(schema, wrong, depth)
        if kind == "array":
            count = r.randint(schema.get("minItems", 0), min(schema.get("maxItems", 4), 4))
            return [self.value(schema.get("items", {}), wrong, depth + 1) for _ in range(count)]
        if kind in ("integer", "number"):
            low, high = schema.get("minimum", schema.get("exclusiveMinimum", -100)), schema.get("maximum", 100)
            number = r.choice([low, high, r.uniform(low, high)])
            return int(number) if kind == "integer" else number
        if kind == "string":
            return r.choice(STRINGS)
        return r.random() < 0.5 if kind == "boolean" else None if kind == "null" else self.anything()

    def object(self, schema: dict[str, Any], wrong: float, depth: int) -> dict[str, Any]:
        """An object: what is required, some of the rest, and what makes the fields agree often enough."""
        r, fields = self.random, schema.get("properties", {})
        if not fields:
            return (
                r.choice(SCHEMAS)
                if r.random() < 0.5
                else {str(r.randrange(400)): r.uniform(-5, 5) for _ in range(r.randrange(3))}
            )
        rest = [name for name in fields if name not in schema.get("required", ())]
        chosen = [*schema.get("required", ()), *r.sample(rest, min(len(rest), r.choice([0, 0, 1, 2, 4])))]
        out = {name: self.value(fields[name], wrong, depth + 1) for name in chosen}
        if "messages" in fields and r.random() < 0.8:
            roles = r.choice([["user"], ["system", "user"], ["user", "assistant", "user"], ["developer", "user"]])
            out["messages"] = [{"role": role, "content": r.choice(STRINGS)} for role in roles]
        if "tools" in out and r.random() < 0.7:
            out["tools"] = [
                {"type": "function", "function": {"name": f"f{i}", "parameters": r.choice(SCHEMAS)}}
                for i in range(r.randint(1, 3))
            ]
        if "response_format" in out and r.random() < 0.7:
            out["response_format"] = {"type": "json_schema", "json_schema": {"name": "x", "schema": r.choice(SCHEMAS)}}
        if "model" in fields and r.random() < 0.95:
            out["model"] = r.choice(["tiny", "ended", "ended", "mini-dlm"])
        if "max_tokens" in fields and r.random() < 0.9:
            out["max_tokens"] = r.choice([1, 2, 5, 9])
        if r.random() < wrong:
            out[r.choice(STRINGS)] = self.anything()
        return out

    def request(self) -> dict[str, Any]:
        """Keyword arguments of `httpx.Client.request`."""
        r = self.random
        path, method, operation = r.choice(self.operations)
        if method == "get" and r.random() < 0.7:
            path, method, operation = r.choice([one for one in self.operations if one[1] == "post"])
        made: dict[str, Any] = {
            "method": method.upper(),
            "url": path.replace("{model}", r.choice(["tiny", "nope", "%00", "a%2fb", "%ff"])),
        }
        if r.random() < 0.03:
            made["method"] = r.choice(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "BREW"])
        if "requestBody" in operation:
            schema = operation["requestBody"]["content"]["application/json"]["schema"]
            body = self.value(schema, 0.0) if r.random() < 0.4 else self.value(schema, r.choice([0.02, 0.1, 0.3]))
            made["content"] = r.choice(RAW) if r.random() < 0.05 else json.dumps(body).encode()
            made["headers"] = {
                "Content-Type": r.choice(
                    ["application/json"] * 12 + ["text/plain", "application/x-www-form-urlencoded", ""]
                )
            }
        if r.random() < 0.05:
            made.setdefault("headers", {})[
                r.choice(["Accept", "Range", "X-Request-Id", "Expect", "Accept-Encoding", "Authorization"])
            ] = r.choice(["x", "bytes=0-1,2-", "*/*;q=nan", "100-continue", "Bearer \u00ff".encode("latin-1"), "gzip;q=0"])
        if r.random() < 0.05:
            made["params"] = {r.choice(["stream", "model", "x"]): r.choice(["1", "\u0000", "%"])}
        return made
