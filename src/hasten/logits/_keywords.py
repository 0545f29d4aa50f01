"""What becomes of every keyword of JSON Schema: enforced, an annotation, or refused. Nothing is ignored.

The documentation's table is made from these (docs/methods/grammar.md), and tests/logits/test_keywords.py tries every row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Fate = Literal["enforced", "annotation", "refused"]

# keyword -> what is enforced, under which conditions
ENFORCED: Mapping[str, str] = {
    "type": "one type or a list of types",
    "enum": "up to limits.enum_values values in a schema",
    "const": "any JSON value",
    "anyOf": "the alternatives' union",
    "oneOf": "alternatives that provably exclude one another: other types, or a required property with another const",
    "allOf": "the intersection",
    "$ref": "# and #/... of the same schema, recursion included",
    "$defs": "schemas to refer to",
    "definitions": "schemas to refer to",
    "properties": "in the order written, each at most once",
    "required": "also for properties not named by `properties`",
    "additionalProperties": "a schema, true or false; such properties follow the named ones",
    "patternProperties": "patterns that exclude one another",
    "minProperties": "up to one more than `required` names",
    "maxProperties": "where all named properties are required, or 1",
    "items": "a schema, true or false",
    "prefixItems": "schemas of the first items",
    "minItems": "any number",
    "maxItems": "any number",
    "minLength": "in characters",
    "maxLength": "in characters",
    "pattern": "found anywhere, as in ECMA-262; without lookaround and back-references",
    "format": "date, time, date-time, duration, email, hostname, ipv4, ipv6, uuid and uri",
    "minimum": "numbers of at most 2^53 and 15 decimals",
    "maximum": "as `minimum`",
    "exclusiveMinimum": "as `minimum`",
    "exclusiveMaximum": "as `minimum`",
    "multipleOf": "of the decimal number that is written",
}

ANNOTATIONS: Mapping[str, str] = {
    "$schema": "a published draft, 4 to 2020-12",
    "$id": "of the whole schema",
    "$comment": "",
    "title": "",
    "description": "",
    "default": "",
    "examples": "",
    "deprecated": "",
    "readOnly": "",
    "writeOnly": "",
    "discriminator": "OpenAPI's hint beside `oneOf`",
}

# keyword -> the way out
REFUSED: Mapping[str, str] = {
    "not": "say what is allowed",
    "if": "use anyOf with one alternative per case",
    "then": "use anyOf with one alternative per case",
    "else": "use anyOf with one alternative per case",
    "dependentRequired": "use anyOf with one alternative per case",
    "dependentSchemas": "use anyOf with one alternative per case",
    "dependencies": "use anyOf with one alternative per case",
    "uniqueItems": "leave it out, or false; a grammar cannot remember items",
    "contains": "use prefixItems, or items",
    "minContains": "use prefixItems, or items",
    "maxContains": "use prefixItems, or items",
    "propertyNames": "use patternProperties with additionalProperties: false",
    "unevaluatedProperties": "use additionalProperties: false in each alternative",
    "unevaluatedItems": "use items: false",
    "additionalItems": "use prefixItems with items",
    "contentEncoding": "use pattern",
    "contentMediaType": "use pattern",
    "contentSchema": "use pattern",
    "nullable": 'use type: ["string", "null"]',
    "$anchor": "refer to #/$defs/name",
    "$dynamicRef": "use $ref",
    "$dynamicAnchor": "refer to #/$defs/name",
    "$recursiveRef": "use $ref: #",
    "$recursiveAnchor": "use $ref: #",
    "$vocabulary": "leave it out",
    "id": "leave it out",
}

DRAFTS = ("draft-04/schema", "draft-06/schema", "draft-07/schema", "draft/2019-09/schema", "draft/2020-12/schema")
TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")

_TWO, _YEAR = "(?:0[1-9]|1[0-9]|2[0-8])", "(?:[0-9]{3}[1-9]|[0-9]{2}[1-9][0-9]|[0-9][1-9][0-9]{2}|[1-9][0-9]{3})"
_LEAP = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DATE = f"(?:{_YEAR}-(?:(?:0[1-9]|1[0-2])-{_TWO}|(?:0[13-9]|1[0-2])-(?:29|30)|(?:0[13578]|1[02])-31)|{_LEAP}-02-29)"
_CLOCK = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_WORD = "[A-Za-z0-9_+-]{1,32}"
# Formats that are written out here, stricter than llguidance's: days that exist, no leap seconds, names of at most 253
# characters. None: llguidance's own expression.
FORMATS: Mapping[str, str | None] = {
    "date": f"^{_DATE}$",
    "time": f"^{_CLOCK}$",
    "date-time": f"^{_DATE}T{_CLOCK}$",
    "hostname": rf"^{_LABEL}(?:\.{_LABEL}){{0,2}}$",
    "email": rf"^{_WORD}(?:\.{_WORD})?@{_LABEL}(?:\.{_LABEL}){{1,2}}$",
    "duration": None,
    "ipv4": None,
    "ipv6": None,
    "uuid": None,
    "uri": None,
}


def fate(keyword: str) -> Fate:
    """What becomes of a keyword; unknown ones are refused too."""
    return "enforced" if keyword in ENFORCED else "annotation" if keyword in ANNOTATIONS else "refused"
