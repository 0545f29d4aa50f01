"""How many draft nodes a pass should verify: measured pass times against measured acceptance (speculative spec, section 5).

A pass over R rows and K nodes takes t(R + K) seconds and commits R tokens plus one for every accepted node. `PassCost`
(pass_cost.py) learns t from the passes themselves, `Acceptance` how often the nodes of one drafter are right, and `Budget`
keeps the nodes that maximise tokens per second. Nothing here changes what is decoded, only how much of a draft is looked
at; K = 0 is always a choice, and the choice depends on past cycles and on the draft's own scores alone. Of a draft and its
drafter it asks no more than the two protocols below, so that the engine can stand on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, TypeVar

from hasten.pass_cost import PassCost

# few sizes, so that each is soon known; with the root 32 tokens, the most of which attention treats all alike
GRID = (*range(9), *range(10, 17, 2), 20, 24, 28, 31, *range(40, 257, 8))
_GROWTH = 3  # a pass is at most so many times as large as any tried before
_BINS = 20  # bins of a drafter's scores
_KEEP = 0.98  # weight of a bin's past against its next observation: about 50 observations count
_ROW = 6.0  # observations by which one row's acceptance is drawn to that of all rows
_PRIOR = 4.0  # observations that the drafter's own score is worth
_FREE = 0.01  # share of a pass that drafting takes when there is nothing to save by resting
_MARGIN = 1.03  # nodes are verified where they promise so many times what a plain pass gives, and not for less
_UNLIKELY = 0.02  # a node that is right less often pays nowhere
_AGAIN = 8  # passes until a costly drafter that does not pay is weighed again
_CREDIT = 0.5  # plain passes of time that a drafter may lose before it rests; half of it after a rest
_PROVEN = 2.0  # plain passes of time gained that are remembered in its favour
_REST = 8  # a rest in passes; the next one is twice as long
_LONGEST = 32  # but no longer than this: texts begin to repeat themselves at any place
_LONGEST_TOGETHER = 64  # several rows lose more by drafts that fail, and each has less to gain
_WINDOW, _LEAST = 16, 8  # nodes asked of a cheap drafter at first, and at least
_IDLE = 16  # drafts of which no more than a quarter was verified, after which half as many nodes are asked for
CHEAP = 0.04  # share of a plain pass that drafting may take before it is weighed before it is done


class Draft(Protocol):
    """What is asked of a draft here; `hasten.engine.contracts.Draft` is one, and says what the fields mean."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def tokens(self) -> tuple[int, ...]:
        """The nodes' tokens."""

    @property
    def parents(self) -> tuple[int, ...]:
        """The nodes' parents, -1 = root."""

    @property
    def q(self) -> Mapping[int, Any] | None:
        """Expanded parent -> what its children were drawn from."""

    @property
    def order(self) -> tuple[int, ...] | None:
        """Nodes in draw order."""

    @property
    def scores(self) -> tuple[float, ...] | None:
        """The drafter's own estimate of each node's chance."""

    def __len__(self) -> int:
        """The number of nodes."""


class Drafter(Protocol):
    """What is asked of a drafter here; `hasten.engine.contracts.Drafter` is one."""

    @property
    def draws(self) -> str:
        """How siblings were chosen; "point" when nothing was drawn at random."""


AnyDraft = TypeVar("AnyDraft", bound=Draft)


@dataclass(slots=True)
class _Rate:
    """A decayed success rate; `hits / tries` is it, and `tries` says how much it knows."""

    tries: float = 0.0
    hits: float = 0.0

    def add(self, hit: bool) -> None:
        self.tries = self.tries * _KEEP + 1.0
        self.hits = self.hits * _KEEP + hit


@dataclass(slots=True)
class _Guess:
    """A draft that the text has not caught up with: `tip` is the deepest node on it that came true, at `length` tokens."""

    children: dict[int, list[tuple[int, int, int]]]
    length: int
    tip: int = -1


@dataclass(slots=True)
class _RowRates:
    rates: dict[int, _Rate] = field(default_factory=dict)
    guesses: list[_Guess] = field(default_factory=list)


class Acceptance:
    """How often one drafter's nodes are right, by score (or by place in the draft), overall and for each row.

    A draft is judged by the text that followed it, so that nodes which were never verified count as well. Under the
    greedy and match laws that is what verification would have said of them.
    """

    def __init__(self) -> None:
        self._rates: dict[int, _Rate] = {}
        self._rows: dict[int, _RowRates] = {}
        self._places: list[_Rate] = []
        self._parents: tuple[int, ...] = ()

    def watch(self, row: int, length: int, draft: Draft) -> None:
        """Remember a draft proposed when the row had `length` tokens, to be judged by what follows."""
        children: dict[int, list[tuple[int, int, int]]] = {}
        for i, (token, parent, key) in enumerate(zip(draft.tokens, draft.parents, _bins(draft), strict=True)):
            children.setdefault(parent, []).append((token, i, key))
        self._rows.setdefault(row, _RowRates()).guesses.append(_Guess(children, length))
        self._parents = draft.parents
        self._places += [_Rate() for _ in range(len(draft) - len(self._places))]

    def judge(self, row: int, tokens: Sequence[int]) -> None:
        """Count what the row's `tokens` say about the drafts that are still open."""
        book = self._rows.get(row)
        if book is None:
            return
        open_: list[_Guess] = []
        for guess in book.guesses:
            while guess.length < len(tokens) and guess.tip in guess.children:
                following, tip = tokens[guess.length], None
                for token, node, key in guess.children[guess.tip]:
                    hit = token == following and tip is None  # a sibling that repeats a token is never accepted
                    if hit:
                        tip = node
                    self._rates.setdefault(key, _Rate()).add(hit)
                    book.rates.setdefault(key, _Rate()).add(hit)
                    self._places[node].add(hit)
                if tip is None:
                    guess.children = {}
                    break
                guess.tip, guess.length = tip, guess.length + 1
            if guess.tip in guess.children:
                open_.append(guess)
        book.guesses = open_

    def forget(self, row: int) -> None:
        """The row has left."""
        self._rows.pop(row, None)

    def chances(self, row: int, draft: Draft) -> list[float]:
        """The estimated chance of every node given that its parent is accepted, in [0, 1]."""
        book = self._rows.get(row)
        own = {} if book is None else book.rates
        out = []
        for i, key in enumerate(_bins(draft)):
            chance = 0.5 if draft.scores is None else draft.scores[i]
            for rates, weight in ((self._rates, _PRIOR), (own, _ROW)):
                rate = rates.get(key)
                if rate is not None:
                    chance = (rate.hits + weight * chance) / (rate.tries + weight)
            out.append(chance)
        return out

    def expected(self, nodes: int) -> float:
        """Tokens accepted on average of a draft's first `nodes` nodes, shaped like the last draft (a chain beyond it)."""
        reach: list[float] = []
        for place in range(nodes):
            rate = self._places[place] if place < len(self._places) else _Rate()
            parent = self._parents[place] if place < len(self._parents) else place - 1
            chance = (rate.hits + _PRIOR * 0.7) / (rate.tries + _PRIOR)
            reach.append(chance if parent < 0 else chance * reach[parent])
        return sum(reach)


def _bins(draft: Draft) -> list[int]:
    """A bin per node: by score, or (negative) by place where a draft has no scores."""
    if draft.scores is None:
        return [-1 - i for i in range(len(draft))]
    return [int(score * _BINS) for score in draft.scores]


def paths(draft: Draft, chances: Sequence[float]) -> list[float]:
    """The chance that each node is accepted, its ancestors included."""
    out: list[float] = []
    for chance, parent in zip(chances, draft.parents, strict=True):
        out.append(chance if parent < 0 else chance * out[parent])
    return out


def select(draft: AnyDraft, nodes: Sequence[int]) -> AnyDraft:
    """The draft with these nodes in this order (every node's parent among them, and before it)."""
    if len(nodes) == len(draft) and list(nodes) == list(range(len(draft))):
        return draft
    place = {old: new for new, old in enumerate(nodes)}
    place[-1] = -1
    q = {place[parent]: dist for parent, dist in draft.q.items() if parent in place} if draft.q else draft.q
    order = tuple(place[i] for i in draft.order if i in place) if draft.order is not None else None
    scores = tuple(draft.scores[i] for i in nodes) if draft.scores is not None else None
    parents = tuple(place[draft.parents[i]] for i in nodes)
    return replace(draft, tokens=tuple(draft.tokens[i] for i in nodes), parents=parents, q=q, order=order, scores=scores)


def deepest_first(draft: Draft, nodes: Sequence[int]) -> list[int]:
    """`nodes` (likeliest first) in the order of a walk that follows the likeliest child before its siblings.

    The likeliest path then lies in the slots its tokens would have in plain decoding, where sums over keys round alike.
    """
    below: dict[int, list[int]] = {}
    for node in nodes:
        below.setdefault(draft.parents[node], []).append(node)
    out: list[int] = []
    stack = [-1]
    while stack:
        node = stack.pop()
        if node >= 0:
            out.append(node)
        stack += reversed(below.get(node, ()))
    return out


class _Book:
    """What is known of one drafter: its acceptance, what drafting costs, and how long it has not been asked."""

    def __init__(self, drafter: Drafter) -> None:
        self.drafter = drafter  # kept, so that its id stays its own
        self.acceptance = Acceptance()
        self.cost = PassCost()
        self.skipped, self.patience = 0, 8
        self.credit = _CREDIT  # plain passes of time that it gained
        self.pause, self.nap = 0, _REST  # its rest in passes, and the next one's
        self.blind, self.rest = 0, 8  # passes without its placeholders, and how many there are to be
        self.window, self.idle = _WINDOW, 0  # nodes asked of it at most; drafts in a row of which little was verified

    def kept(self, nodes: int, drafted: int) -> None:
        """Of `drafted` nodes so many were verified: twice as many are asked for if nearly all were, half if few are.

        Every node drafted costs time, whether it is verified or not.
        """
        self.idle = self.idle + 1 if 4 * nodes <= self.window else 0
        if drafted >= self.window - 1 and nodes >= 0.9 * drafted:  # sizes go in steps
            self.window = min(2 * self.window, GRID[-1])
        elif self.idle >= _IDLE:
            self.window, self.idle = max(_LEAST, self.window // 2), 0

    def earn(self, gain: float, longest: int) -> None:
        """It gained so many plain passes of time, or lost them; with no credit left it rests, each time twice as long.

        No rest is longer than `longest` passes.
        """
        self.credit = min(_PROVEN, self.credit + gain)
        if self.credit >= _PROVEN:
            self.nap = _REST
        elif self.credit < 0:
            self.credit = _CREDIT / 2
            self.pause, self.nap = min(self.nap, longest), min(2 * self.nap, longest)


class Budget:
    """Chooses how many nodes are asked of drafters and how many of them are verified."""

    def __init__(self) -> None:
        self.cost = PassCost()
        self.books: dict[int, _Book] = {}
        self.promised = 0.0  # tokens that the nodes last kept are thought to commit, those of their roots included

    def book(self, drafter: Drafter) -> _Book:
        """The record of `drafter`."""
        found = self.books.get(id(drafter))
        if found is None:
            found = self.books[id(drafter)] = _Book(drafter)
        return found

    def plain(self, rows: int) -> float:
        """Seconds of a pass of so many rows without drafts, or of the most rows below that were measured, else 0."""
        return next((seconds for n in range(rows, 0, -1) if (seconds := self.cost(n, n))), 0.0)

    def ask(self, drafter: Drafter, caps: Sequence[int]) -> list[int]:
        """Nodes to ask of `drafter` for each row, at most `caps`; all zeros: do not ask it this time.

        A drafter that is cheap and proposes fixed tokens is asked for as many as were lately of use, and they are cut
        afterwards by what they say. It rests for a few passes where its drafts lost more time than they gained. One that
        costs something, or samples (whose draft must not be cut by its tokens), is weighed before.
        """
        book, rows, cap = self.book(drafter), len(caps), max(caps)
        self.promised = float(rows)
        plain = self.cost(rows, rows)
        drafting = book.cost(rows, rows + sum(min(one, book.window) for one in caps))
        if drafter.draws == "point" and (drafting <= CHEAP * plain or getattr(drafter, "weighed", False)):
            if book.pause:
                book.pause -= 1
                return [0] * rows
            return [min(one, book.window) for one in caps]
        if not plain:
            return [0] * rows
        if book.skipped:  # it did not pay, and little was learnt of it since
            book.skipped += 1
            if book.skipped % _AGAIN:
                return [0] * rows
        best, chosen = 1.0 / plain, 0
        for nodes in (size for size in GRID if 0 < size <= cap):
            asked = rows + sum(min(nodes, one) for one in caps)
            rate = (1.0 + book.acceptance.expected(nodes)) / (self.cost(rows, asked) + book.cost(rows, asked))
            if rate > best:
                best, chosen = rate, nodes
        if chosen:
            book.skipped, book.patience = 0, 8
        elif book.skipped < book.patience:
            book.skipped = max(1, book.skipped)
        else:  # times change: look again, ever more rarely
            book.skipped, book.patience, chosen = 0, min(2 * book.patience, 128), min(2, cap)
        return [min(chosen, one) for one in caps]

    def looks(self, drafter: Drafter, rows: int, extra: int) -> bool:
        """Whether placeholders that take as long as `extra` more tokens a pass promise more than they cost."""
        book, plain = self.book(drafter), self.cost.table(rows).get(rows)
        if plain is None:
            return False
        promised = max(
            (1.0 + book.acceptance.expected(nodes)) / self.cost(rows, rows * (1 + nodes) + extra) for nodes in GRID[1:9]
        )
        if promised > 1.0 / plain:
            book.blind, book.rest = 0, 8
            return True
        book.blind += 1
        if book.blind < book.rest:
            return False
        book.blind, book.rest = 0, min(2 * book.rest, 128)  # times change: look again, ever more rarely
        return True

    def settle(
        self, drafters: Iterable[Drafter], rows: int, size: int, tokens: float, drafted_s: float, seconds: float
    ) -> None:
        """A pass of `rows` rows over `size` query tokens committed `tokens` in so many seconds, after `drafted_s` of
        drafting.

        What plain passes take for as many tokens is what these drafters have earned. For a row alone `tokens` are those
        that were promised, and it is charged what passes of its size take on the whole: one draft more or less that came
        true, or one slow pass, is more than a drafter may lose, and bursts of text that repeats itself would be slept
        through. Over several rows that evens out, and small errors of a forecast would add up.
        """
        plain = self.cost.typical(rows)
        taken = seconds if rows > 1 else self.cost(rows, size)
        if not plain or (drafted_s <= _FREE * plain and tokens == rows and taken <= (1 + _FREE) * plain):
            return
        gain = tokens / rows - (drafted_s + taken) / plain
        for book in map(self.book, drafters):
            book.earn(gain, _LONGEST if rows == 1 else _LONGEST_TOGETHER)

    def keep(self, rows: int, fixed: int, drafts: Sequence[tuple[int, Drafter, AnyDraft]]) -> list[AnyDraft]:
        """The part of each (row, drafter, draft) that pays, chosen over all rows of the pass at once.

        `rows` take part in the pass, `fixed` tokens are in it besides one per row. Sampled drafts stay whole.
        """
        whole = sum(len(draft) for _, drafter, draft in drafts if drafter.draws != "point")
        ranked: list[tuple[float, int, int]] = []
        for i, (row, drafter, draft) in enumerate(drafts):
            if drafter.draws == "point" and len(draft):
                chances = self.book(drafter).acceptance.chances(row, draft)
                reach = paths(draft, chances)
                ranked += [(-chance, i, node) for node, chance in enumerate(reach) if chance >= _UNLIKELY]
        ranked.sort()
        base = rows + fixed + whole
        best, kept = _MARGIN * rows / (self.cost(rows, base) or 1e9), 0
        gain, seen, self.promised = float(rows), 0, float(rows)
        largest = _GROWTH * max(self.cost.table(rows), default=base)
        for size in GRID[1:]:
            if size > len(ranked) or base + size > largest:
                break
            gain -= sum(chance for chance, _, _ in ranked[seen:size])
            seen = size
            seconds = self.cost(rows, base + size)
            if seconds and gain / seconds > best:
                best, kept, self.promised = gain / seconds, size, gain
        chosen: list[list[int]] = [[] for _ in drafts]
        for _, i, node in ranked[:kept]:
            chosen[i].append(node)
        for nodes, (_, drafter, draft) in zip(chosen, drafts, strict=True):
            if drafter.draws == "point":
                self.book(drafter).kept(len(nodes), len(draft))
        return [
            select(draft, deepest_first(draft, chosen[i])) if drafter.draws == "point" else draft
            for i, (_, drafter, draft) in enumerate(drafts)
        ]


def shares(pending: Sequence[int], room: int, most: int) -> list[int]:
    """Tokens that each prompt may read in a pass with room for `room`, given their unread tokens in order of arrival.

    The first one has half of the room to itself, so that none starves; the rest goes to the shortest first. None gets
    more than `most`.
    """
    given = [0] * len(pending)
    room = max(0, room)
    if pending:
        given[0] = min(pending[0], most, -(-room // 2))
        room -= given[0]
    for i in sorted(range(len(pending)), key=lambda i: pending[i] - given[i]):
        more = min(pending[i] - given[i], most - given[i], room)
        given[i] += more
        room -= more
    return given
