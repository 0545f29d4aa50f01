"""Structured output on real models: random schemas, every finished answer judged by jsonschema.

    python bench/structure.py smollm2-135m mini-ar --schemas 300 --json bench/results/structure.json

Per model: each schema is asked for without a grammar, and with it by every method. Counted: answers that ended by
themselves and are valid (all must be), tokens that a grammar changed although it allowed them (none may be), and answers
that differ between methods (none may). Timed, alone and in turn: tokens per second with and without a grammar, and the
share of masks.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import jsonschema

import hasten
from hasten.bench.report import machine
from hasten.errors import HastenError
from hasten.types import Grammar

WORDS = ("name", "age", "city", "price", "tags", "id", "kind", "active", "items", "note", "count", "color")
METHODS = ("plain", "auto")
FREE = 32  # tokens of an answer without a grammar: it leaves the form early


def random_schema(r: random.Random, depth: int = 3) -> dict[str, Any]:
    """A schema of the kinds that people write: objects of a few fields, lists, enums, bounds, alternatives."""
    kinds = ["string", "integer", "number", "boolean", "enum", "const", "pattern", "format"]
    kind = r.choice([*kinds, *["object", "object", "array", "anyOf", "null?"] * (depth > 0)]) if depth < 3 else "object"
    if kind == "string":
        return {"type": "string", "maxLength": r.choice([8, 16, 24]), "minLength": r.choice([0, 1, 2])}
    if kind == "integer":
        low = r.choice([0, -10, 1, 18])
        return {"type": "integer", "minimum": low, "maximum": low + r.choice([5, 99, 1000])}
    if kind == "number":
        bounds = {"minimum": 0, "maximum": r.choice([1, 100, 2.5])}
        others = [{**bounds, "multipleOf": 0.5}, {"exclusiveMinimum": 0, "maximum": 10}]
        return {"type": "number", **r.choice([bounds, *others])}
    if kind == "boolean":
        return {"type": "boolean"}
    if kind == "enum":
        return {"enum": r.sample(["red", "green", "blue", "none", 1, 2, 3, None, True], r.randint(1, 4))}
    if kind == "const":
        return {"const": r.choice(["v1", 7, False, None, ["a", 1], {"x": 1}])}
    if kind == "pattern":
        patterns = ["^[A-Z]{2,3}-[0-9]{3}$", "^(yes|no)$", "^#[0-9a-f]{6}$", "^[a-z]{3,9}$"]
        return {"type": "string", "pattern": r.choice(patterns)}
    if kind == "format":
        return {"type": "string", "format": r.choice(["date", "time", "date-time", "ipv4", "uuid", "hostname"])}
    if kind == "array":
        low = r.choice([0, 1, 2])
        most = low + r.choice([0, 1, 3])
        return {"type": "array", "items": random_schema(r, depth - 1), "minItems": low, "maxItems": most}
    if kind == "anyOf":
        return {"anyOf": [random_schema(r, depth - 1) for _ in range(r.randint(2, 3))]}
    if kind == "null?":
        return {"anyOf": [random_schema(r, depth - 1), {"type": "null"}]}
    names = r.sample(WORDS, r.randint(1, 4))
    out: dict[str, Any] = {"type": "object", "properties": {name: random_schema(r, depth - 1) for name in names}}
    required = [name for name in names if r.random() < 0.7]
    if required:
        out["required"] = required
    if r.random() < 0.8:
        out["additionalProperties"] = False
    elif r.random() < 0.5:
        out["additionalProperties"] = {"type": "integer", "minimum": 0, "maximum": 9}
        out["maxProperties"] = len(names) + 1
        out["required"] = names
    return out


def judge(schema: dict[str, Any], text: str) -> bool:
    """Whether a text is JSON and valid under the schema, formats included."""
    try:
        value = json.loads(text)
    except ValueError:
        return False
    kind = jsonschema.Draft202012Validator
    return kind(schema, format_checker=kind.FORMAT_CHECKER).is_valid(value)


def in_form(llm: hasten.LLM, grammar: Grammar, tokens: tuple[int, ...]) -> int:
    """How many leading tokens the grammar allows."""
    rule: Any = llm.compile(grammar)
    state = rule.open((), len(tokens))
    for i, token in enumerate(tokens):
        if not rule.allows(state, token):
            return i
        state = rule.advance(state, token)
    return len(tokens)


def model(name: str, schemas: list[dict[str, Any]], methods: list[str], max_tokens: int, rows: int, timed: int) -> Any:
    """All counts and times of one model."""
    llm = hasten.load(name)
    grammars = [Grammar.json_schema(schema) for schema in schemas]

    def prompt(schema: dict[str, Any]) -> list[int]:
        text = f"Write one JSON value that is valid under this JSON schema: {json.dumps(schema)}"
        if llm.tokenizer.chat_template is None:
            return list(llm.encode(text + "\n"))
        return list(llm.chat_ids([{"role": "user", "content": text + " Answer with the JSON only."}]))

    room = llm.model.capabilities.max_len - max_tokens  # a small window holds the end of a long schema
    prompts = [prompt(schema)[-room:] for schema in schemas]
    answers: dict[str, list[Any]] = {}
    out: dict[str, Any] = {"schemas": len(schemas), "max_tokens": max_tokens, "methods": {}}
    for method in ["without", *methods]:
        started, before = time.perf_counter(), llm.grammars.counts()
        answers[method] = []
        for at in range(0, len(schemas), rows):
            batch = []
            for ids, grammar in zip(prompts[at : at + rows], grammars[at : at + rows], strict=True):
                free = method == "without"
                most = {"max_tokens": min(FREE, max_tokens) if free else max_tokens}
                batch.append(llm._request(ids, "plain" if free else method, most, grammar=None if free else grammar))
            answers[method] += [outs[0] for outs in llm._run(batch)]
        after = llm.grammars.counts()
        finished = [(s, o) for s, o in zip(schemas, answers[method], strict=True) if o.finish_reason == "stop"]
        bad = [{"schema": s, "text": o.text} for s, o in finished if not judge(s, o.text)]
        row = {
            "finished": len(finished),
            "valid": len(finished) - len(bad),
            "seconds": round(time.perf_counter() - started, 1),
            "tokens": sum(o.usage.completion_tokens for o in answers[method]),
            "forwards": sum(o.usage.forwards for o in answers[method]),
        }
        if method != "without":
            row["mask_share"] = round((after.mask_s - before.mask_s) / row["seconds"], 4)
            row["same_as_plain"] = sum(a.tokens == b.tokens for a, b in zip(answers["plain"], answers[method], strict=True))
            row["invalid"] = bad
        out["methods"][method] = row
        print(name, method, {k: v for k, v in row.items() if k != "invalid"}, *bad[:3], flush=True)
    whole = begun = changed = 0
    for free, bound, grammar in zip(answers["without"], answers["plain"], grammars, strict=True):
        good = in_form(llm, grammar, free.tokens)
        whole += free.finish_reason == "stop" and good == len(free.tokens)
        begun += good
        changed += sum(a != b for a, b in zip(free.tokens[:good], bound.tokens[:good], strict=True))
    out["answers_already_in_form"], out["tokens_already_in_form"], out["tokens_changed_among_these"] = whole, begun, changed
    out["speed"] = speed(llm, prompts[:timed], grammars[:timed], methods, max_tokens)
    print(name, {k: v for k, v in out.items() if k != "methods"}, flush=True)
    return out


def speed(llm: hasten.LLM, prompts: list[list[int]], grammars: list[Grammar], methods: list[str], max_tokens: int) -> Any:
    """Tokens per second of single requests, in turn; without a grammar on the same prompts for as many tokens."""
    rates: dict[str, list[float]] = {"without": [], **{method: [] for method in methods}}
    masks = 0.0
    decode = 0.0
    for ids, grammar in zip(prompts, grammars, strict=True):
        length = 0
        for method in methods:
            before = llm.grammars.counts().mask_s
            out = llm.generate(ids, method=method, grammar=grammar, max_tokens=max_tokens)
            if method == "plain":
                masks += llm.grammars.counts().mask_s - before
                decode += out.usage.decode_s
            length = max(length, out.usage.completion_tokens)
            if out.usage.completion_tokens > 8:
                rates[method].append(out.usage.tokens_per_s)
        free = llm.generate(ids, method="plain", max_tokens=max(length, 8), ignore_eos=True)
        rates["without"].append(free.usage.tokens_per_s)
    table = {
        method: {
            "median": round(statistics.median(got), 1),
            "min": round(min(got), 1),
            "max": round(max(got), 1),
            "n": len(got),
        }
        for method, got in rates.items()
        if got
    }
    return {"tokens_per_s": table, "mask_share_of_plain": round(masks / decode, 4) if decode else None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--schemas", type=int, default=300)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--timed", type=int, default=12)
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)
    r = random.Random(args.seed)
    schemas = [random_schema(r) for _ in range(args.schemas)]
    results: dict[str, Any] = {"machine": machine(), "seed": args.seed, "models": {}}
    for name in args.models:
        try:
            results["models"][name] = model(name, schemas, args.methods, args.max_tokens, args.rows, args.timed)
        except HastenError as error:
            results["models"][name] = {"error": str(error)}
            print(name, error)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
