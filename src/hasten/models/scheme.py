"""How the weights of a compressed checkpoint were rounded: the `quantization_config` of config.json, read and checked.

The fields are those of compressed-tensors (version 0.20.1). Read are matrices of 4- or 8-bit integers with a scale per
group of columns, per row or for all; activations and caches in full precision; columns in their own order.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hasten.engine.limits import LIMITS
from hasten.errors import FormatError, UnsupportedError

METHOD = "compressed-tensors"
FORMATS = ("pack-quantized", "int-quantized", "naive-quantized")
_STRATEGIES = ("group", "channel", "tensor")
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings")
_CHARS, _REPEATS = 200, 3  # of a pattern (and a name), and of `*+?{` in it: what matching a name costs stays small


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the matrices that `targets` name were rounded; `group` is the columns of a scale, None for the whole row.

    `whole`: one scale for the whole matrix. `packed`: codes lie in 32-bit words, else in bytes of their own.
    """

    bits: int
    symmetric: bool
    group: int | None
    whole: bool
    packed: bool
    targets: tuple[str, ...]


class Quantisation:
    """A checked `quantization_config`: its `schemes` and what they are for; `digest` tells one from another."""

    def __init__(self, schemes: Sequence[Scheme], ignore: Sequence[str]) -> None:
        self.schemes = tuple(schemes)
        self.digest = hashlib.sha256(repr((self.schemes, tuple(ignore))).encode()).hexdigest()
        self._exact: dict[str, Scheme] = {}
        self._patterns: list[tuple[re.Pattern[str], Scheme]] = []
        for scheme in self.schemes:
            for target in scheme.targets:
                if target.startswith("re:"):
                    self._patterns.append((re.compile(target[3:]), scheme))
                else:
                    self._exact.setdefault(target, scheme)
        self._ignored = {one for one in ignore if not one.startswith("re:")}
        self._unwanted = [re.compile(one[3:]) for one in ignore if one.startswith("re:")]
        count = len(self._patterns) + len(self._unwanted)
        if count > LIMITS.patterns:
            raise UnsupportedError(
                f"quantization_config holds {count} patterns, {LIMITS.patterns} are read",
                hint="write the names of the modules out",
                field="targets",
            )

    def scheme_of(self, module: str) -> Scheme:
        """The scheme of a module that is stored compressed; raises FormatError for one that none covers.

        A module's own name goes before a pattern, a pattern before its class (Linear, or Embedding).
        """
        kind = "Embedding" if module.rpartition(".")[2] in _EMBEDDINGS else "Linear"
        short = len(module) <= _CHARS
        if {module, kind} & self._ignored or (short and any(one.match(module) for one in self._unwanted)):
            raise FormatError(f"{module} is stored compressed, but quantization_config ignores it", field="ignore")
        found = self._exact.get(module)
        if found is None and short:
            found = next((scheme for pattern, scheme in self._patterns if pattern.match(module)), None)
        found = found or self._exact.get(kind)
        if found is None:
            raise FormatError(
                f"{module} is stored compressed, but no targets of quantization_config name it", field="targets"
            )
        return found


def quantisation(config: Mapping[str, Any]) -> Quantisation | None:
    """The compression a config.json declares, None for plain weights.

    Raises UnsupportedError for what is not read (other methods, formats, bits; rounded activations or caches), naming field
    and value, and FormatError for values that mean nothing.
    """
    section = config.get("quantization_config", config.get("compression_config"))
    if section is None:
        return None
    if not isinstance(section, Mapping):
        raise FormatError(f"quantization_config is {section!r:.60}, not an object", field="quantization_config")
    method = section.get("quant_method")
    if method != METHOD:
        raise UnsupportedError(
            f"quantization_config.quant_method = {method!r:.60} is not read, {METHOD!r} is",
            hint="take the model's plain weights, which `hasten compress` rounds, a GGUF file of it, or its "
            f"{METHOD} version",
            field="quant_method",
        )
    _only(section, "quantization_status", None, "compressed", hint="save it with save_compressed=True")
    _only(section, "kv_cache_scheme", None, hint="load it with an own cache type instead: cache='int8'")
    _only(section, "transform_config", None, {})
    sparsity = section.get("sparsity_config")
    if sparsity:
        if not isinstance(sparsity, Mapping):
            raise FormatError(f"sparsity_config is {sparsity!r:.60}, not an object", field="sparsity_config")
        _only(sparsity, "format", None, "dense", where="sparsity_config.")
    groups = section.get("config_groups")
    if not isinstance(groups, Mapping) or not groups or len(groups) > LIMITS.tensors:
        raise FormatError(f"config_groups is {groups!r:.60}, not an object with groups", field="config_groups")
    schemes = tuple(_scheme(str(name), group, section.get("format")) for name, group in groups.items())
    return Quantisation(schemes, _targets(section.get("ignore") or [], "ignore"))


def _only(section: Mapping[str, Any], name: str, *allowed: object, where: str = "", hint: str = "") -> None:
    value = section.get(name)
    if value not in allowed:
        known = " or ".join("absent" if one is None else repr(one) for one in allowed)
        raise UnsupportedError(f"{where}{name} = {value!r:.80} is not read, {known} is", hint=hint, field=name)


def _scheme(name: str, group: Any, default: Any) -> Scheme:
    where = f"config_groups.{name:.40}."
    if not isinstance(group, Mapping):
        raise UnsupportedError(
            f"{where[:-1]} is {group!r:.60}; groups are read when they are written out, not by a preset's name",
            field="config_groups",
        )
    form = group.get("format") or default
    if not isinstance(form, str) or form not in FORMATS:
        raise UnsupportedError(
            f"{where}format = {form!r:.60} is not read; {', '.join(FORMATS)} are",
            hint="take a version of the model with weights of 4 or 8 bits (W4A16, W8A16), or its plain weights",
            field="format",
        )
    for part in ("input_activations", "output_activations"):
        _only(
            group, part, None, where=where,
            hint="take the model's version for 16-bit activations (W4A16, W8A16), or its plain weights",
        )  # fmt: skip
    weights = group.get("weights")
    if not isinstance(weights, Mapping):
        raise FormatError(f"{where}weights is {weights!r:.60}, not an object", field="weights")
    at = where + "weights."
    _only(weights, "type", None, "int", where=at, hint="take a version of the model with int weights, or its plain weights")
    _only(weights, "dynamic", None, False, where=at)
    _only(
        weights, "actorder", None, False, "weight", "static", where=at,
        hint="columns in an order of their own are not read; round the model again with actorder='weight'",
    )  # fmt: skip
    bits = weights.get("num_bits", 8)
    if isinstance(bits, bool) or bits not in (4, 8):
        raise UnsupportedError(f"{at}num_bits = {bits!r:.40} is not read, 4 and 8 are", field="num_bits")
    if form != "pack-quantized" and bits != 8:
        raise UnsupportedError(f"{at}num_bits = {bits} of format {form!r} is not read, 8 is", field="num_bits")
    symmetric = weights.get("symmetric", True)
    if not isinstance(symmetric, bool):
        raise FormatError(f"{at}symmetric is {symmetric!r:.40}, not true or false", field="symmetric")
    size = weights.get("group_size")
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or not (size == -1 or 1 <= size < 2**31)):
        raise FormatError(f"{at}group_size is {size!r:.40}, not a number of columns", field="group_size")
    strategy = weights.get("strategy")
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    if not isinstance(strategy, str) or strategy not in _STRATEGIES:
        raise UnsupportedError(
            f"{at}strategy = {strategy!r:.40} is not read; {', '.join(_STRATEGIES)} are", field="strategy"
        )
    if (strategy == "group") != (size is not None and size > 0):
        raise FormatError(f"{at}group_size = {size!r} does not go with strategy {strategy!r}", field="group_size")
    return Scheme(
        bits=int(bits), symmetric=symmetric, group=size if strategy == "group" else None, whole=strategy == "tensor",
        packed=form == "pack-quantized", targets=_targets(group.get("targets"), f"{where}targets"),
    )  # fmt: skip


def _targets(value: Any, name: str) -> tuple[str, ...]:
    """Names and patterns; patterns are limited to what no name can make slow."""
    if not isinstance(value, list) or len(value) > LIMITS.tensors or not all(isinstance(one, str) for one in value):
        raise FormatError(f"{name} is {value!r:.60}, not a list of names", field="targets")
    for one in value:
        if one.startswith("re:"):
            plain = re.sub(r"\\.|\[[^]]*\]", "", one[3:])
            repeats = sum(plain.count(sign) for sign in "*+?{")
            if len(one) > _CHARS or repeats > _REPEATS or re.search(r"\)[*+?{]", plain) or re.search(r"\\[1-9]", one):
                raise UnsupportedError(
                    f"{name} holds the pattern {one!r:.80}; patterns have up to {_CHARS} characters and "
                    f"{_REPEATS} repeats, none of a group",
                    hint="write the names of the modules out",
                    field="targets",
                )
            try:
                re.compile(one[3:])
            except (re.error, OverflowError, RecursionError) as error:
                raise FormatError(f"{name} holds {one!r:.80}, which is no pattern: {error}", field="targets") from None
    return tuple(value)
