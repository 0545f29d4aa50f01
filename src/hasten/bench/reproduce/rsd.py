"""RSD against a chain and against i.i.d. trees of the same number of nodes, sampling at temperature 1."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from hasten.bench.compare import Answer, Comparison, Prompt, Runner, runner
from hasten.bench.drafters import conclude, open_target, trial
from hasten.bench.report import Progress, Reproduction, Spread
from hasten.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from hasten.engine.contracts import RowView
    from hasten.engine.engine import Parts
    from hasten.llm import LLM

claim_checked = (
    "Sampling from smollm2-135m at temperature 1 with trees of one size in nodes: RSD commits more tokens per pass than a "
    "tree of independent draws (in --quick, where few passes are made: not fewer by two standard errors), and two children "
    "drawn without replacement hold an accepted one more often than two independent ones, worked out exactly."
)

SHAPES = {6: ("2.2", 2, 3), 12: ("3.3", 3, 4)}  # nodes -> branching of RSD-C and of i.i.d. trees, width and length of RSD-S
_SUPPORT = 32  # followers of a pair that the counted draft knows at most


class Counted:
    """The draft model where no trained one is there: statistics of smollm2's own answers as a distribution.

    P(c | a, b) as counted for `aded`, else P(c | b) summed over all a, else P(c); in the place of `Assistant`.
    """

    def __init__(self, table: Any, vocab_size: int) -> None:
        import torch

        self.table, self.vocab_size = table, vocab_size
        state = table.state
        owner = torch.repeat_interleave(torch.arange(len(table)), state["offsets"].diff())
        last = (state["keys"] & ((1 << 21) - 1))[owner]
        self._order = last.argsort(stable=True)
        self._last = last[self._order]
        self._any = self._best(state["ids"], state["chances"])
        self._texts: dict[int, list[tuple[int, ...]]] = {}
        self._base: dict[int, tuple[int, ...]] = {}

    @staticmethod
    def _best(ids: Tensor, chances: Tensor) -> tuple[Tensor, Tensor]:
        import torch

        found, place = ids.long().unique(return_inverse=True)
        sums = torch.zeros(len(found)).index_add_(0, place, chances.float())
        top = sums.topk(min(_SUPPORT, len(found)))
        return found[top.indices], top.values

    def law(self, text: Sequence[int]) -> Tensor:
        """Log-probabilities float32 [vocab] after a text, -inf outside what was counted."""
        import torch

        a, b = (text[-2], text[-1]) if len(text) > 1 else (-1, text[-1])
        counted = self.table.followers(a, b) if a >= 0 else []
        if counted:
            ids, chances = torch.tensor([c for c, _ in counted]), torch.tensor([p for _, p in counted])
        else:
            low, high = torch.searchsorted(self._last, torch.tensor([b, b + 1])).tolist()
            rows = self._order[low:high]
            state = self.table.state
            ids, chances = self._best(state["ids"][rows], state["chances"][rows]) if high > low else self._any
        out = torch.full((self.vocab_size,), -torch.inf)
        out[ids] = (chances / chances.sum()).log()
        return out

    def open(self, row: int) -> None:
        """Nothing is kept of a row but its text."""

    def close(self, row: int) -> None:
        """The row's text is forgotten."""
        self._base.pop(row, None)
        self._texts.pop(row, None)

    def begin(self, rows: Sequence[RowView], depth: int, nodes: int) -> list[Tensor | None]:
        """Logits [vocab] after each row's last token."""
        for row in rows:
            self._base[row.id], self._texts[row.id] = tuple(row.tokens[-2:]), []
        return [self.law(row.tokens) for row in rows]

    def grow(self, asks: Sequence[tuple[int, Sequence[int], Sequence[int]]]) -> list[Tensor]:
        """Logits [n, vocab] after new nodes, numbered by row as `Assistant.grow` does."""
        import torch

        out = []
        for row, tokens, parents in asks:
            known = self._texts[row]
            new = [((known[p] if p >= 0 else self._base[row]) + (t,))[-2:] for t, p in zip(tokens, parents, strict=True)]
            known += new
            out.append(torch.stack([self.law(text) for text in new]))
        return out


def assistant(llm: LLM) -> tuple[Any, str]:
    """The draft model and what it is: the one trained for the target, if it is there, else counted statistics."""
    from hasten import registry
    from hasten.engine.contracts import MethodContext

    context = MethodContext(llm.name, llm.model, llm.tokenizer)
    if "tvdpp" in registry.modules():
        try:
            return registry.build("tvdpp", context).assistant, "the draft model of `tvdpp`"
        except ConfigError:
            pass  # none was trained for this model
    table = registry.build("aded", context).table
    if table is None:
        raise ConfigError(
            "no draft model and no counted statistics of the target are there", hint="hasten train aded MODEL"
        )
    vocab = llm.model.capabilities.vocab_size
    return Counted(table, vocab), "statistics of three tokens of the target's own answers (those of `aded`)"


def makers(llm: LLM, draft: Any, nodes: int) -> dict[str, Callable[[], Parts]]:
    """Name -> parts of a chain, an i.i.d. tree, RSD-C and RSD-S of `nodes` nodes, all of which are verified."""
    from hasten.draft.rsd import Config, Rsd
    from hasten.engine.contracts import Draws, MethodContext
    from hasten.engine.engine import Parts

    class Independent(Rsd):
        """RSD-C's tree with siblings drawn independently of one another: SpecInfer's."""

        draws: Draws = "iid"

        def _draw(self, tree: Any, logits: Tensor, row: RowView, count: int, level: int) -> None:
            import torch

            from hasten.engine.sampling import choice_seed

            first = len(tree.tokens)
            for parent, q in zip(tree.beam, (logits.float() / row.temperature).softmax(-1), strict=True):
                seed = choice_seed(row.seed, (1 << 29) + (len(row.tokens) + level) * 4096 + parent + 1)
                drawn = torch.multinomial(q, count, replacement=True, generator=torch.Generator().manual_seed(seed))
                tree.q[parent] = q
                tree.tokens += drawn.tolist()
                tree.parents += [parent] * count
            tree.beam = list(range(first, len(tree.tokens)))

    context = MethodContext(llm.name, llm.model, llm.tokenizer)
    branching, width, length = SHAPES[nodes]
    chain = ".".join("1" * nodes)
    built = {
        "chain": Rsd(Config(tree="c", branching=chain), context, draft),
        "i.i.d. tree": Independent(Config(tree="c", branching=branching), context, draft),
        "rsd-c": Rsd(Config(tree="c", branching=branching), context, draft),
        "rsd-s": Rsd(Config(tree="s", width=width, length=length), context, draft),
    }
    return {name: lambda one=one: Parts(one, budget=nodes) for name, one in built.items()}  # type: ignore[misc]


def two_children(p: Tensor, q: Tensor) -> tuple[float, float, float]:
    """The chance that one child, one of two i.i.d. children, and one of two children without replacement is accepted.

    p float64 [V] is the target's law and q the draft's; worked out exactly (2402.14160, recursive rejection sampling).
    """
    import torch
    import torch.nn.functional as F

    first = float(torch.minimum(p, q).sum())
    if first >= 1 - 1e-9:
        return 1.0, 1.0, 1.0
    rest = (p - q).clamp(min=0)
    rest = rest / rest.sum()
    again = float(torch.minimum(rest, q).sum())
    refused = (q - p).clamp(min=0)  # chance that this token is drawn and refused
    # without a refused token t the second child is drawn from q / (1 - q_t): sum_x min(rest_x, s q_x) for that factor s, in
    # which x is capped by rest_x where rest_x / q_x <= s (t itself among them: what was refused has no rest)
    known = q > 0
    turns, order = (rest[known] / q[known]).sort()
    capped, free = (F.pad(one[known][order].cumsum(0), (1, 0)) for one in (rest, q))
    drawn = (refused > 0) & (q < 1)
    s = 1 / (1 - q[drawn])
    at = torch.searchsorted(turns, s, right=True)
    without = float((refused[drawn] * (capped[at] + s * (free[-1] - free[at]))).sum())
    return first, first + (1 - first) * again, first + without


def acceptance(llm: LLM, draft: Any, prompt: Prompt, answer: Answer) -> list[tuple[float, float, float]]:
    """`two_children` at each place of an answer that plain sampling gave."""
    import torch

    from hasten.engine.contracts import RowInput, RowView

    ids = [*prompt.ids, *answer.tokens[:-1]]
    first = len(prompt.ids) - 1
    row = RowInput(torch.tensor(ids), torch.arange(len(ids)), logits=tuple(range(first, len(ids))))
    with torch.inference_mode():
        target = llm.model.run([row]).logits.double().softmax(-1)
    out = []
    draft.open(0)
    for i, p in enumerate(target):
        [logits] = draft.begin([RowView(0, ids[: first + 1 + i], 1, 1.0, 0)], 1, 1)
        if logits is not None:
            out.append(two_children(p, logits.double().softmax(-1)))
    draft.close(0)
    return out


def gain(done: Comparison, method: str, over: str) -> tuple[float, float]:
    """By how many tokens per pass `method` exceeds `over`, and its standard error over prompts."""

    def per_pass(answer: Answer) -> float:
        return (len(answer.tokens) - 1) / answer.passes

    differences = [per_pass(row.answers[method]) - per_pass(row.answers[over]) for row in done.rows]
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
    return statistics.mean(differences), error


def reproduce(quick: bool, progress: Progress) -> Reproduction:
    """Try the claim of RSD (2402.14160) on this machine."""
    started = time.perf_counter()
    llm = open_target(progress)
    draft, what = assistant(llm)
    methods: dict[str, str | Runner] = {}
    for nodes in (6,) if quick else SHAPES:
        for name, make in makers(llm, draft, nodes).items():
            if not (quick and name == "rsd-c"):
                methods[f"{name}, {nodes} nodes"] = runner(llm, make, temperature=1.0)
    done = trial(llm, methods, quick, progress, temperature=1.0)
    chances: dict[int, list[tuple[float, float, float]]] = {}
    main = "rsd-s, 6 nodes"
    likelihood: dict[str, list[float]] = {"plain": [], main: []}
    for i, row in enumerate(done.rows):
        progress("judging answers", i, len(done.rows))
        for name, values in likelihood.items():
            values.append(llm.score(row.prompt.ids, row.answers[name].tokens).total / len(row.answers[name].tokens))
        chances.setdefault(row.prompt.seed, []).extend(acceptance(llm, draft, row.prompt, row.answers["plain"]))
    progress("judging answers", len(done.rows), len(done.rows))
    one_level = [[statistics.mean(place[k] for place in many) for k in range(3)] for many in chances.values()]
    gains = {
        nodes: gain(done, f"rsd-s, {nodes} nodes", f"i.i.d. tree, {nodes} nodes") for nodes in ((6,) if quick else SHAPES)
    }
    trees = all(mean > (-2 * error if quick else 0.0) for mean, error in gains.values())
    plain, sampled = (round(statistics.mean(values), 4) for values in likelihood.values())
    return conclude(
        "rsd",
        done,
        main,
        trees and all(without > iid for _, iid, without in one_level),
        started,
        bars_of="tokens_per_pass",
        quick=quick,
        no_help="A greedy request, where a tree of the likeliest tokens does as well; every node is verified here, whether "
        "it pays or not, because the comparison is at equal nodes.",
        quality=(plain, sampled, "mean log-probability of a sampled token under the target; equal up to chance"),
        draft=what,
        rsd_s_over_iid={
            str(nodes): {"tokens_per_pass": round(mean, 4), "standard_error": round(error, 4)}
            for nodes, (mean, error) in gains.items()
        },
        chance_of_an_accepted_child={
            name: Spread.of([seed[k] for seed in one_level], 4).to_dict()
            for k, name in enumerate(("one child", "two i.i.d. children", "two without replacement"))
        },
    )
