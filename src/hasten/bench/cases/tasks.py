"""Suite `tasks`: generated puzzles of reasoning-gym, each with its own verifier."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hasten.bench.cases import Case, Suite, Verdict, chat_ids
from hasten.errors import MissingExtraError, out_of_range, unknown_name

if TYPE_CHECKING:
    from hasten.llm import LLM

GROUPS = "chain_sum,simple_equations,letter_counting,word_sorting,number_sorting,spell_backward"
_ASK = "\n\nThink if you need to, then write the answer alone between <answer> and </answer>."
_TAG = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL)

suite = Suite(
    name="tasks",
    summary="puzzles of reasoning-gym (sums, equations, counting, sorting, spelling), each with a verifier",
    quality_is="score of the puzzles' own verifiers, percent",
    options={"per_group": 2, "tokens": 96, "groups": GROUPS},
)


def answer_in(text: str) -> str:
    """What stands between the last answer tags, else the last line."""
    found = _TAG.findall(text)
    return (found[-1] if found else text.strip().rpartition("\n")[2]).strip()


def ready(options: Mapping[str, Any]) -> None:
    """Raise MissingExtraError where reasoning-gym is not installed, UnknownNameError for a puzzle that it does not have."""
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise MissingExtraError(
            f"suite 'tasks' takes its puzzles from reasoning-gym, which is not installed ({error})",
            hint="pip install 'hasten[bench]'",
        ) from None
    for name in options["groups"].split(","):
        if name not in DATASETS:
            raise unknown_name("group", name, DATASETS)


def cases(llm: LLM, options: Mapping[str, Any], seeds: Sequence[int]) -> list[Case]:
    """`per_group` puzzles of each kind for each seed; raises as `ready`."""
    ready(options)
    import reasoning_gym

    if not 1 <= options["per_group"] <= 1000:
        raise out_of_range("per_group", options["per_group"], "in [1, 1000]")
    out = []
    for name in dict.fromkeys(options["groups"].split(",")):
        for seed in seeds:
            made = reasoning_gym.create_dataset(name, size=options["per_group"], seed=seed)
            for entry in made:
                text = entry["question"] + _ASK
                out.append(Case(seed, name, chat_ids(llm, text), options["tokens"], text, _judge(made, entry)))
    return sorted(out, key=lambda case: seeds.index(case.seed))


def _judge(made: Any, entry: Mapping[str, Any]) -> Any:
    def verdict(text: str) -> Verdict:
        score = min(1.0, max(0.0, float(made.score_answer(answer_in(text), entry))))
        return Verdict(score, "" if score == 1 else f"right is {entry['answer']}")

    return verdict
