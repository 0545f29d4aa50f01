"""Several drafters as one: their drafts are merged into one tree, and share one node budget."""

from __future__ import annotations

import heapq
import time
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Literal

from torch import Tensor

from hasten.budget import CHEAP, GRID, Acceptance, paths
from hasten.engine.contracts import EMPTY_DRAFT, NO_NEEDS, Draft, Drafter, Draws, Feedback, Needs, RowView
from hasten.errors import ConfigError, IncompatibleError
from hasten.pass_cost import PassCost

_TYPICAL = 8  # nodes of one row by which members are compared
_MOST = 31  # nodes of one row that are looked at beforehand
_SURE = 0.01  # a drafter leaves at least this chance that none of a node's children is right


class _Record:
    """What a member costs and gives: times by rows, tokens it promises per row, and how long it was not asked."""

    def __init__(self) -> None:
        self.times = PassCost()
        self.gain = 2.0  # before anything was seen: worth a try
        self.skipped, self.patience = 0, 8

    def seconds(self, rows: int) -> float:
        """The time of one round of drafting, 0 when unknown."""
        return self.times(rows, rows)


class Union:
    """Merges the drafts of `members` by equal token under equal parent (SpecInfer) and keeps the likeliest nodes.

    Nodes of different drafters are compared by each one's measured acceptance: of a node that several propose the surest is
    believed, and of siblings that different ones propose only one can be right (`merge`). Members that sample are judged
    like the others (law match), so that merging changes no result. With `cost`, the measured times of passes, a member that
    takes time itself is asked only when its tokens are worth more than that beside what the others have drafted.
    Raises ConfigError for fewer than two members.
    """

    draws: Draws = "point"
    weighed = True  # by itself, member by member

    def __init__(self, members: Sequence[Drafter], cost: PassCost | None = None) -> None:
        if len(members) < 2:
            raise ConfigError(f"a union of {len(members)} drafters; name at least two", field="method")
        lossy = [member.name for member in members if getattr(member, "law", None) is not None]
        behind = [member.name for member in members if member.needs.pseudo is not None]
        if lossy or len(behind) > 1:
            why = f"nobody verifies drafts of {lossy[0]!r}" if lossy else f"{' and '.join(behind)} both add placeholders"
            raise IncompatibleError(f"{why}, so it drafts alone", hint="choose one, in an exact mode", field="method")
        self.members = tuple(members)
        self.needs = reduce(Needs.union, (member.needs for member in members), NO_NEEDS)  # the least that satisfies all
        self._cost = cost
        self._records = [_Record() for _ in members]
        self.name = "+".join(member.name for member in members)
        self.scope: Literal["row", "shared"] = "shared" if any(m.scope == "shared" for m in members) else "row"
        self._acceptance = [Acceptance() for _ in members]

    def max_nodes(self, budget: int) -> int:
        """What the members propose together, or the budget if that is less."""
        return min(budget, sum(member.max_nodes(budget) for member in self.members))

    def open(self, row: int, prompt: Sequence[int]) -> None:
        """The row joins every member."""
        for member in self.members:
            member.open(row, prompt)

    def close(self, row: int) -> None:
        """The row leaves every member."""
        for member, acceptance in zip(self.members, self._acceptance, strict=True):
            member.close(row)
            acceptance.forget(row)

    def propose(self, rows: Sequence[RowView], budgets: Sequence[int]) -> Sequence[Draft]:
        """One merged tree per row, likeliest nodes first, each with its measured chance as score."""
        parts: list[list[tuple[Draft, list[float]]]] = [[] for _ in rows]
        count = len(rows)
        plain = 0.0 if self._cost is None else self._cost(count, count)
        for acceptance in self._acceptance:
            for row in rows:
                acceptance.judge(row.id, row.tokens)
        order = sorted(range(len(self.members)), key=lambda i: self._records[i].seconds(count))
        for i in order:
            member, acceptance, record = self.members[i], self._acceptance[i], self._records[i]
            costs = record.seconds(count)
            if plain and costs > CHEAP * plain and not self._pays(record, parts, costs, count):
                continue
            started = time.perf_counter()
            asked = [min(budget, member.max_nodes(budget)) for budget in budgets]
            gained = 0.0
            for part, row, draft in zip(parts, rows, member.propose(rows, asked), strict=True):
                if len(draft):
                    chances = acceptance.chances(row.id, draft)
                    gained += sum(sorted(paths(draft, chances), reverse=True)[:_TYPICAL])
                    part.append((draft, chances))
                    acceptance.watch(row.id, len(row.tokens), draft)
            if gained:  # a round without any draft, as before the prompt is read, says nothing of the others
                record.times.record(count, count, time.perf_counter() - started)
                record.gain += 0.1 * (gained / count - record.gain)
        return [merge(part, budget) for part, budget in zip(parts, budgets, strict=True)]

    def _pays(self, record: _Record, parts: Sequence[list[tuple[Draft, list[float]]]], seconds: float, rows: int) -> bool:
        """Whether a member that takes `seconds` promises more tokens per second than what is drafted already."""
        assert self._cost is not None  # noqa: S101 - asked for only with measured passes
        whole = self._cost(rows, rows * (1 + _TYPICAL)) + seconds
        # first against a plain pass: that is known without looking at the drafts
        if (1 + record.gain) * self._cost(rows, rows) > whole and self._beats(parts, record.gain, whole, rows):
            record.skipped, record.patience = 0, 8
            return True
        record.skipped += 1
        if record.skipped < record.patience:
            return False
        record.skipped, record.patience = 0, min(2 * record.patience, 64)  # look again, ever more rarely
        return True

    def _beats(self, parts: Sequence[list[tuple[Draft, list[float]]]], gain: float, seconds: float, rows: int) -> bool:
        """Whether `gain` tokens more per row in a pass of so many `seconds` are more per second than what is drafted."""
        assert self._cost is not None  # noqa: S101 - asked for only with measured passes
        merged = [merge(part, _MOST) for part in parts]
        reach = sorted((chance for draft in merged for chance in paths(draft, draft.scores or ())), reverse=True)
        without, total = rows / self._cost(rows, rows), 0.0
        for nodes, chance in enumerate(reach, 1):
            total += chance
            if nodes in GRID:
                without = max(without, (rows + total) / self._cost(rows, rows + nodes))
        promised = rows + max(rows * gain, sum(reach[: rows * _TYPICAL]))
        return promised / seconds > without

    def observe(self, feedback: Sequence[Feedback]) -> None:
        """Every member hears what it asked for, and no more."""
        for member in self.members:
            if member.needs.feedback == "none" and not member.needs.prompt:
                continue
            reports = [_part(report, member.needs) for report in feedback if report.nodes or member.needs.prompt]
            if reports:
                member.observe(reports)

    def state_dict(self) -> dict[str, Tensor]:
        """The members' states, each name preceded by its member's."""
        return {f"{m.name}.{name}": value for m in self.members for name, value in m.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore every member's part; raises ConfigError as the members do."""
        for member in self.members:
            start = f"{member.name}."
            part = {name[len(start) :]: value for name, value in state.items() if name.startswith(start)}
            if part:
                member.load_state_dict(part)


def merge(drafts: Sequence[tuple[Draft, Sequence[float]]], budget: int) -> Draft:
    """The `budget` likeliest nodes of all (draft, chances given the parent), merged by token, likeliest first.

    At most one of a node's children is right, and drafters that name different ones contradict each other: each child's
    odds against "none of them" are what the surest of its drafters gives, and chances follow from the odds of all. The
    chances of a draft that is alone at a node stay as they are.
    """
    children: list[dict[int, int]] = [{}]  # node 0 is the root; token -> child
    odds: list[float] = [1.0]
    for draft, chances in drafts:
        none = dict.fromkeys(draft.parents, 1.0)  # parent -> the chance that it has no child that is right
        for parent, one in zip(draft.parents, chances, strict=True):
            none[parent] -= one
        place = {-1: 0}
        for i, (token, parent) in enumerate(zip(draft.tokens, draft.parents, strict=True)):
            at = place[parent]
            node = children[at].get(token)
            if node is None:
                node = children[at][token] = len(children)
                children.append({})
                odds.append(0.0)
            odds[node] = max(odds[node], chances[i] / max(none[parent], _SURE))
            place[i] = node
    chance = [1.0] * len(odds)
    for below in children:
        total = 1.0 + sum(odds[node] for node in below.values())
        for node in below.values():
            chance[node] = odds[node] / total
    if len(children) == 1 or budget < 1:
        return EMPTY_DRAFT
    heap = [(-chance[node], node, token, -1) for token, node in children[0].items()]
    heapq.heapify(heap)
    tokens: list[int] = []
    parents: list[int] = []
    scores: list[float] = []
    while heap and len(tokens) < budget:
        reach, node, token, parent = heapq.heappop(heap)
        here = len(tokens)
        tokens.append(token)
        parents.append(parent)
        scores.append(chance[node])
        for following, child in children[node].items():
            heapq.heappush(heap, (reach * chance[child], child, following, here))
    return Draft(tuple(tokens), tuple(parents), scores=tuple(scores))


def _part(report: Feedback, needs: Needs) -> Feedback:
    """What a drafter with these needs hears of a report made for several."""
    pick = list(range(len(report.tokens)))
    if report.nodes and needs.feedback == "accepted":
        on_path = {0, *(node + 1 for node in report.path)}
        pick = [i for i, node in enumerate(report.nodes) if node in on_path]

    def cut(value: Tensor | None, wanted: bool) -> Tensor | None:
        return None if value is None or not wanted else value if len(pick) == len(value) else value[pick]

    scored = bool(report.nodes) or needs.prompt_logits
    topk, values = (cut(value, scored and needs.topk > 0) for value in (report.topk, report.topk_logits))
    return Feedback(
        row=report.row,
        nodes=tuple(report.nodes[i] for i in pick) if report.nodes else (),
        tokens=tuple(report.tokens[i] for i in pick),
        path=report.path,
        next=report.next,
        hidden={
            layer: value if len(pick) == len(value) else value[pick]
            for layer, value in report.hidden.items()
            if layer in needs.hidden
        },
        final=cut(report.final, needs.final_hidden),
        topk=None if topk is None else topk[:, : needs.topk],
        topk_logits=None if values is None else values[:, : needs.topk],
        logits=cut(report.logits, scored and needs.logits),
        pseudo=report.pseudo if needs.pseudo is not None else None,
    )
