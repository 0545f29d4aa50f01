"""Typed access to a released config.json, and the parts of it that several families spell alike."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hasten.errors import FormatError, UnsupportedError
from hasten.models.config import Activation, Rope

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


class Fields:
    """The fields of one config: every wrong or missing value is a FormatError naming its field."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number; `default` when the field is absent or null."""
        value = self.config.get(name)
        if value is None:
            if default is None:
                raise FormatError(f"config: {name} is missing", field=name)
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise FormatError(f"config: {name} is {value!r:.60}, not a finite number", field=name)
        return value

    def integer(self, name: str, default: int | None = None) -> int:
        """An integer; `default` when the field is absent or null."""
        value = self.number(name, default)
        if value != int(value):
            raise FormatError(f"config: {name} is {value!r}, not an integer", field=name)
        return int(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false; `default` when the field is absent or null."""
        value = self.config.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise FormatError(f"config: {name} is {value!r:.60}, not true or false", field=name)
        return value

    def ids(self, name: str) -> tuple[int, ...]:
        """A token id or a list of them; empty when the field is absent or null."""
        value = self.config.get(name)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values):
            raise FormatError(f"config: {name} is {value!r:.60}, not a token id or a list of them", field=name)
        return tuple(values)

    def one_id(self, name: str) -> int | None:
        """The first token id of a field, None when there is none."""
        return next(iter(self.ids(name)), None)

    def section(self, name: str) -> Mapping[str, Any]:
        """An object; empty when the field is absent or null."""
        value = self.config.get(name)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise FormatError(f"config: {name} is {value!r:.60}, not an object", field=name)
        return value

    def only(self, name: str, allowed: object) -> None:
        """Refuse every value but `allowed` (and an absent or null one) of a field that is not implemented."""
        value = self.config.get(name)
        if value is not None and value != allowed:
            raise UnsupportedError(f"config: {name} = {value!r:.40} is not supported, {allowed!r} is", field=name)

    def activation(self, name: str, value: object) -> Activation:
        """The activation of a released name; raises UnsupportedError naming the field."""
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise UnsupportedError(f"config: activation {value!r:.40} is not supported", field=name)
        return ACTIVATIONS[value]

    def rope(self, entry: Mapping[str, Any], default_theta: float | None, default_partial: float = 1.0) -> Rope:
        """One rotary embedding from a rope_parameters / rope_scaling entry; a None default must be in the config."""
        e = Fields(entry)
        kind = entry.get("rope_type", entry.get("type", "default")) or "default"
        theta = (e if entry.get("rope_theta") is not None else self).number("rope_theta", default_theta)
        partial = e.number("partial_rotary_factor", self.number("partial_rotary_factor", default_partial))
        if kind == "default":
            return Rope(theta=theta, partial=partial)
        if kind == "linear":
            return Rope(theta=theta, partial=partial, kind="linear", factor=e.number("factor"))
        if kind == "llama3":
            return Rope(
                theta=theta,
                partial=partial,
                kind="llama3",
                factor=e.number("factor"),
                low_freq_factor=e.number("low_freq_factor"),
                high_freq_factor=e.number("high_freq_factor"),
                original_len=e.integer("original_max_position_embeddings"),
            )
        raise UnsupportedError(
            f"config: rope type {kind!r:.40} is not supported; known: default, linear, llama3", field="rope_type"
        )
