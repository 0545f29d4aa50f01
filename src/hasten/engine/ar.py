"""The autoregressive loop: propose -> one target pass over [pending tokens + nodes] -> verify -> commit -> observe.

A row's pending tokens are those not in its cache yet: a prompt (read in chunks), or the root, its last committed token.
Draft nodes follow the root as a tree. Prefill, plain decoding and verification are therefore one code, and rows in
different phases share a pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import cast

from torch import Tensor

from hasten.budget import Budget, select, shares
from hasten.engine.contracts import NO_NEEDS, Backbone, Draft, Drafter, Feedback, Needs, Pass, Pseudo
from hasten.engine.limits import LIMITS
from hasten.engine.rows import Row, Turn
from hasten.engine.sampling import token_logprob
from hasten.engine.trace import Trace
from hasten.engine.verify import check_draft, check_law, depths, verify
from hasten.failure import contained
from hasten.pass_cost import ReadingCost


class AutoregressiveLoop:
    """Advances autoregressive rows of one backbone by one target pass per step."""

    def __init__(self, backbone: Backbone, trace: Trace) -> None:
        self.backbone, self.trace = backbone, trace
        self.budget = Budget()
        self.reading = ReadingCost()

    def step(self, rows: Sequence[Row]) -> None:
        """One pass over `rows`; finished rows have `reason` set afterwards. Events go to the trace.

        If it raises, no row has changed: nothing is committed before the pass returns, and what fails afterwards fails one
        row, which then ends with reason "error".
        """
        turns = self._turns(rows)
        if not turns:
            return
        started_s = self.trace.now()
        self._place(turns)
        self._propose(turns)
        drafted_s = self.trace.now()
        asked: dict[int, Needs] = {}
        for turn in turns:
            if turn.row.drafter is not None:
                key = id(turn.row.drafter)
                turn.needs = asked[key] if key in asked else asked.setdefault(key, turn.row.drafter.needs)
        needs = reduce(Needs.union, asked.values()) if asked else NO_NEEDS
        for turn in turns:
            turn.row.size = turn.count + len(turn.draft)
        done = self.backbone.run([turn.input() for turn in turns], needs)
        feedback: dict[int, tuple[Drafter, list[Feedback], list[Row]]] = {}
        for index, turn in enumerate(turns):
            with contained() as caught:
                report = self._take(turn, index, done)
            if caught.error is not None:
                turn.row.fail(caught.error)
            elif turn.row.drafter is not None and report:
                told = feedback.setdefault(id(turn.row.drafter), (turn.row.drafter, [], []))
                told[1].extend(report)
                told[2].append(turn.row)
        for drafter, reports, hearers in feedback.values():
            with contained() as caught:
                drafter.observe(reports)
            for row in hearers:
                if caught.error is not None and row.reason is None:
                    row.fail(caught.error)
        self._time(turns, drafted_s - started_s, self.trace.now() - drafted_s)
        for turn in turns:
            turn.row.draft_s += (drafted_s - started_s) / len(turns)

    def _take(self, turn: Turn, index: int, done: Pass) -> list[Feedback]:
        """What the pass means for one row: its commits or the chunk read, and the reports for its drafter."""
        row, drafter, reports = turn.row, turn.row.drafter, []
        row.computed += row.size
        row.drafted += len(turn.draft)
        row.native &= done.backbone == self.backbone.name
        logits = done.row_logits(index)
        if drafter is not None and turn.needs.prompt and turn.read:
            reports.append(self._reading(turn, index, done, logits, turn.needs))
        if turn.ready:
            logits = logits[turn.heard :] if turn.heard else logits
            judged = self._judge(turn, logits, done, done.logit_starts[index] + turn.heard)
            if judged is None:
                return []
            if drafter is not None and turn.needs.feedback != "none":
                reports.append(self._feedback(turn, index, done, logits, *judged, turn.needs))
        else:
            row.cache.advance(turn.count)
            self._prefilled(row, row.cache.length)
        return reports

    def _time(self, turns: Sequence[Turn], drafted_s: float, seconds: float) -> None:
        """Learn from a pass that took so long what decoding costs, or what reading prompts beside it does."""
        size = sum(1 + len(turn.draft) + self._worth(turn.pseudo, len(turn.anchors)) for turn in turns if turn.count == 1)
        rows = sum(turn.count == 1 for turn in turns)
        if rows == len(turns):
            self.budget.cost.record(rows, size, seconds)
            if all(turn.asked or not len(turn.draft) for turn in turns):
                asked = {id(one): one for turn in turns if turn.asked and (one := turn.row.drafter) is not None}
                tokens = self.budget.promised if rows == 1 else rows + sum(turn.taken for turn in turns)
                self.budget.settle(asked.values(), rows, size, tokens, drafted_s, seconds)
        else:
            alone = self.budget.cost(rows, size) or self.budget.plain(rows)
            if alone or not rows:
                self.reading.record(sum(turn.count for turn in turns if turn.count > 1), seconds - alone)

    def _turns(self, rows: Sequence[Row]) -> list[Turn]:
        """Who takes part in this pass, and with how many tokens: ready rows first, prompts share what is left.

        While rows decode, prompts get no more than lets the others go on at a bounded part of their own speed.
        """
        turns: list[Turn] = []
        readers: list[Row] = []
        for row in rows:
            if row.lead is not None:
                if row.lead.generated or row.lead.pending == 1:
                    self._take_over(row, row.lead)
                else:
                    continue
            if row.pending == 1:
                turns.append(Turn(row, 1, True))
            else:
                readers.append(row)
        if not readers:
            return turns
        room = LIMITS.step_tokens - len(turns)
        if turns:
            room = min(room, self.reading.room(self.budget.plain(len(turns))))
        for row, count in zip(readers, shares([row.pending for row in readers], room, LIMITS.prefill_chunk), strict=True):
            if count > 0:
                turns.append(Turn(row, count, count == row.pending))
        return turns

    @staticmethod
    def _take_over(row: Row, lead: Row) -> None:
        """Start a further choice from its lead's reading of the shared prompt (all but the last prompt token)."""
        row.cache.copy_from(lead.cache)
        row.cache.truncate(row.prompt_len - 1)
        row.lead = None

    def _place(self, turns: Sequence[Turn]) -> None:
        """Give ready rows the placeholders that their drafters ask for; to measured rows only where they pay."""
        for turn in turns:
            row = turn.row
            asked = row.drafter.needs.pseudo if turn.ready and row.drafter is not None and row.remaining > 1 else None
            if asked is None or not asked.layers or row.drafter is None:
                continue
            if not row.measured or self.budget.looks(row.drafter, len(turns), len(turns) * self._worth(asked, 1)):
                turn.pseudo = asked

    def _worth(self, pseudo: Pseudo | None, anchors: int) -> int:
        """Placeholders in whole queries: one that enters half-way up the layers costs half of one."""
        layers = self.backbone.capabilities.layers
        return 0 if pseudo is None else math.ceil(anchors * sum(1 - at / layers for at in pseudo.layers))

    def _propose(self, turns: Sequence[Turn]) -> None:
        """Fill in the drafts of ready rows, each within its row's budget."""
        asked: dict[int, tuple[Drafter, list[Turn]]] = {}
        for turn in turns:
            row = turn.row
            if row.drafter is not None and not row.opened:
                row.drafter.open(row.id, row.request.prompt)
                row.opened = True
            if not turn.ready:
                continue
            forced = row.sampler.forced() if row.sampler.rules else ()
            if forced:
                chain = tuple(forced[: max(0, min(row.remaining - 1, LIMITS.draft_nodes))])
                turn.draft = Draft(chain, tuple(range(-1, len(chain) - 1)))
            elif row.drafter is not None and row.remaining > 1 and not (row.measured and turn.count > 1):
                # beside a prompt a measured row's drafts would be guesses about an answer that has not begun
                asked.setdefault(id(row.drafter), (row.drafter, []))[1].append(turn)
        for drafter, waiting in asked.values():
            self._ask(drafter, waiting, len(turns))
        self._keep(turns, [turn for _, waiting in asked.values() for turn in waiting if len(turn.draft)])
        for turn in turns:
            if len(turn.draft):
                self._emit(turn.row, "draft", tokens=turn.draft.tokens, parents=turn.draft.parents)

    def _ask(self, drafter: Drafter, waiting: Sequence[Turn], rows: int) -> None:
        """Drafts of one drafter for its rows, as many nodes as its measured record is worth."""
        budgets = [self._budget(turn, drafter) for turn in waiting]
        measured = any(turn.row.measured for turn in waiting)
        if measured:
            budgets = self.budget.ask(drafter, budgets)
            if not any(budgets):
                return
            for turn in waiting:
                self.budget.book(drafter).acceptance.judge(turn.row.id, turn.row.tokens)
        started_s = self.trace.now()
        drafts = drafter.propose([turn.row.view() for turn in waiting], budgets)
        if measured and any(map(len, drafts)):  # before the prompt is read there may be nothing to draft from
            self.budget.book(drafter).cost.record(rows, rows + sum(budgets), self.trace.now() - started_s)
        for turn, budget, draft in zip(waiting, budgets, drafts, strict=True):
            check_draft(draft, budget, self.backbone.capabilities.vocab_size)
            check_law(turn.row.law, drafter.draws, draft)
            turn.draft, turn.asked = _cut(draft, turn.row.remaining - 1), turn.row.measured
            if turn.row.measured and len(turn.draft):
                self.budget.book(drafter).acceptance.watch(turn.row.id, len(turn.row.tokens), turn.draft)

    def _keep(self, turns: Sequence[Turn], asked: Sequence[Turn]) -> None:
        """Cut the drafts of measured rows, asked of their drafters, to the nodes that pay here."""
        measured = [turn for turn in asked if turn.asked]
        if not measured:
            return
        others = sum(turn.count - 1 + len(turn.draft) for turn in turns) - sum(len(turn.draft) for turn in measured)
        others += sum(self._worth(turn.pseudo, 1) for turn in turns)
        drafts = [(turn.row.id, cast(Drafter, turn.row.drafter), turn.draft) for turn in measured]
        for turn, draft in zip(measured, self.budget.keep(len(turns), others, drafts), strict=True):
            turn.draft = draft

    @staticmethod
    def _budget(turn: Turn, drafter: Drafter) -> int:
        """Nodes this row can afford: its own budget, and the slots left in its cache."""
        room = turn.row.cache.capacity - turn.row.cache.length - turn.count
        return max(0, min(drafter.max_nodes(turn.row.budget), turn.row.budget, room, LIMITS.draft_nodes))

    def _judge(self, turn: Turn, logits: Tensor, done: Pass, first: int) -> tuple[tuple[int, ...], int] | None:
        """Judge and commit one ready row, whose `logits` are rows `first`.. of the pass; (path, following token)."""
        row, base = turn.row, turn.row.cache.length
        if done.best is not None:
            best = done.best[first : first + 1 + len(turn.draft)]
            broken = min(best) < 0
        else:
            top = logits.max(-1)
            best, broken = top.indices.tolist(), not all(math.isfinite(value) for value in top.values.tolist())
        if broken:
            row.cache.advance(turn.count)
            row.end("error", "the model produced logits that are not finite (check the model file; try dtype='float32')")
            return None
        first_pass = row.first_s == 0.0
        if first_pass:
            self._prefilled(row, row.prompt_len)
        else:
            row.forwards += 1
        self._emit(row, "forward", total=turn.count + len(turn.draft), backbone=done.backbone)
        position = len(row.tokens)
        draws = row.drafter.draws if row.drafter is not None and turn.draft.q is not None else "point"
        verdict = verify(row.law, logits, turn.draft, row.sampler, position, draws, best)
        chosen = [0, *(node + 1 for node in verdict.path)]
        if done.log_sum_exp is not None:
            lse = {node: done.log_sum_exp[first + node] for node in chosen}
        else:
            lse = dict(zip(chosen, logits[chosen].logsumexp(-1).tolist(), strict=True))
        if verdict.path:
            kept = tuple(turn.draft.tokens[node] for node in verdict.path)
            self._emit(row, "accept", tokens=kept)
        sure, taken, following = done.best_logprob, [], -1
        for at, node in zip(chosen, (*verdict.path, -1), strict=True):
            if node < 0:
                token = following = verdict.next
            else:
                token = turn.draft.tokens[node]
                taken.append(node)
            # torch is asked only where the backbone has not said it: between passes one operator takes 40 microseconds
            logprob = sure[first + at] if sure is not None and best[at] == token else logits[at, token].item() - lse[at]
            self._commit(row, token, logits, at, lse[at], logprob)
            if row.reason is not None:
                break
        # everything committed but the newest token is in the cache now; the newest is the next root
        row.cache.gather(base, [*range(turn.count), *(turn.count + node for node in taken)])
        row.accepted += len(taken)
        turn.taken = len(taken)
        if first_pass:
            row.first_s = self.trace.now()
        return tuple(taken), following

    def _commit(self, row: Row, token: int, logits: Tensor, at: int, lse: float, logprob: float) -> None:
        """Make one token final, which follows node `at`: history, text, stop conditions, trace."""
        position = len(row.tokens)
        row.tokens.append(token)
        row.sampler.commit(token)
        params = row.request.sampling
        report = None
        if params.logprobs is not None:
            report = token_logprob(logits[at], lse, token, params.logprobs)
            row.logprobs.append(report)
        if token in row.eos_ids or token in params.stop_ids:
            row.reason, row.stop = "stop", token
            text = row.text.finish()
        else:
            text = row.text.push(token)
            if row.text.found is not None:
                row.reason, row.stop = "stop", row.text.found
            elif row.remaining <= 0:
                row.reason = "length"
                text += row.text.finish()
                if row.text.found is not None:  # the last incomplete character completed a stop string
                    row.reason, row.stop = "stop", row.text.found
        confidence = math.exp(min(0.0, logprob))
        self._emit(row, "commit", position=position, token=token, confidence=confidence, text=text, logprob=report)

    def _feedback(
        self,
        turn: Turn,
        index: int,
        done: Pass,
        logits: Tensor,
        path: tuple[int, ...],
        following: int,
        needs: Needs,
    ) -> Feedback:
        """What the drafter asked to learn, for all nodes or the accepted ones; entry 0 is the root."""
        nodes = tuple(range(len(turn.draft) + 1)) if needs.feedback == "all" else (0, *(node + 1 for node in path))
        base = len(turn.row.tokens) - len(path) - (1 if following >= 0 else 0)
        root = turn.row.tokens[base - 1]
        tokens = tuple(root if node == 0 else turn.draft.tokens[node - 1] for node in nodes)
        picked = logits if len(nodes) == len(logits) else logits[list(nodes)]
        first = done.spans[index][0] + turn.count - 1
        inside = [first + node for node in nodes]
        tip, pseudo = turn.count + (path[-1] if path else -1), done.pseudo[index] if done.pseudo else None
        ids, values = done.topk(picked, needs.topk) if needs.topk else (None, None)
        return Feedback(
            row=turn.row.id,
            nodes=nodes,
            tokens=tokens,
            path=path,
            next=following,
            hidden={layer: done.hidden[layer][inside] for layer in needs.hidden},
            final=done.final_hidden[inside] if needs.final_hidden and done.final_hidden is not None else None,
            topk=ids,
            topk_logits=values,
            logits=picked if needs.logits else None,
            pseudo=pseudo[turn.anchors.index(tip)] if pseudo is not None and tip in turn.anchors else None,
        )

    @staticmethod
    def _reading(turn: Turn, index: int, done: Pass, logits: Tensor, needs: Needs) -> Feedback:
        """The report of the prompt tokens read in this pass, all but the root: it has no nodes."""
        row, base = turn.row, turn.row.cache.length
        first = done.spans[index][0]
        span, heard = slice(first, first + turn.read), logits[: turn.heard]
        ids, values = done.topk(heard, needs.topk) if needs.topk and turn.heard else (None, None)
        return Feedback(
            row=row.id,
            nodes=(),
            tokens=tuple(row.tokens[base : base + turn.read]),
            path=(),
            next=row.tokens[base + turn.read],
            hidden={layer: done.hidden[layer][span] for layer in needs.hidden},
            final=done.final_hidden[span] if needs.final_hidden and done.final_hidden is not None else None,
            topk=ids,
            topk_logits=values,
            logits=heard if needs.logits and turn.heard else None,
        )

    def _prefilled(self, row: Row, position: int) -> None:
        self._emit(row, "prefill", position=position, total=row.prompt_len, cached_tokens=row.cached)

    def _emit(self, row: Row, kind: str, **fields: object) -> None:
        self.trace.emit(kind, row.request_id, row.choice, row.added_s, **fields)  # type: ignore[arg-type]


def _cut(draft: Draft, depth: int) -> Draft:
    """The draft without nodes deeper than `depth`: they could not be committed any more."""
    return select(draft, [i for i, level in enumerate(depths(draft.parents)) if level <= depth])
