"""The parts of a canvas request and the policy they make: contracts, what is refused, and the order of one step.

One step of a row: raw logits (guided, with a guide) -> logit stages -> candidates and their scores -> score stages -> stop
rules that fill -> selectors (united) -> commit -> reviser -> stop rules that cut -> the next block's plan. A part is a pure
function of what it is given: its `history` is returned, never changed, so that drafted steps, batching and preemption can
fork it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from hasten.engine.contracts import Capabilities
from hasten.engine.limits import LIMITS
from hasten.engine.parts import (
    FIXED,
    PROMPT,
    SLOT,
    Advance,
    CanvasRow,
    Forward,
    PartRange,
    StopAction,
    Taken,
    View,
)
from hasten.errors import ConfigError, ContextLengthError, IncompatibleError, out_of_range
from hasten.types import Request, SamplingParams

_Part = TypeVar("_Part")


class CanvasPart(Protocol):
    """Common declarations: a part's name, the positions it reads, and what it breaks.

    `range`: the block, all masked positions that a forward shows, or everything at a block's start.
    `memoryless`: keeps no history. `lossless`: changes no result. `mutates_committed`: may take back what is final.
    """

    name: str
    range: PartRange
    memoryless: bool
    lossless: bool
    mutates_committed: bool


class BlockPlanner(CanvasPart, Protocol):
    """Decides where the next block ends.

    A planner may have `whole`, the size of blocks that begin behind the prompt and are computed to their end, whatever
    length of text is asked for.
    """

    def plan(self, view: View | None, row: CanvasRow) -> int:
        """End (exclusive) of the block that starts at row.window[0]; the view is there with range block_start_full."""


class Schedule(CanvasPart, Protocol):
    """How many positions each step of a block commits at least."""

    def quotas(self, row: CanvasRow) -> tuple[int, ...]:
        """Quotas of the block row.window, summing to its open positions."""

    def planned(self, row: CanvasRow) -> int:
        """Steps of the whole canvas."""


class Scorer(CanvasPart, Protocol):
    """Draws a candidate per position and scores it."""

    def draw(self, view: View, row: CanvasRow) -> tuple[Tensor, Tensor]:
        """(x0 [P], score float [P]) from view.changed."""


class LogitStage(CanvasPart, Protocol):
    """Changes logits before candidates are drawn (grammar, credit)."""

    def apply(self, history: Any, view: View, row: CanvasRow) -> tuple[Any, Tensor]:
        """(history', logits' [P, vocab])."""


class ScoreStage(CanvasPart, Protocol):
    """Changes the scores by which positions are ranked."""

    def rescore(self, view: View, row: CanvasRow) -> Tensor:
        """score' [P]."""


class Selector(CanvasPart, Protocol):
    """Chooses the positions to commit; several selectors are united."""

    def select(self, history: Any, view: View, row: CanvasRow, quota: int) -> tuple[Any, Tensor]:
        """(history', bool [P])."""


class Stepper(CanvasPart, Protocol):
    """Owns the forwards of a step: plain, or drafted states that are checked together."""

    most: int  # branches of one pass at most

    def branches(self, row: CanvasRow, seen: Forward | None, advance: Advance) -> Sequence[CanvasRow]:
        """States this pass is to compute: [row] alone while nothing was `seen` of it, none when that is enough."""

    def settle(
        self,
        row: CanvasRow,
        seen: Forward | None,
        branches: Sequence[CanvasRow],
        forwards: Sequence[Forward],
        advance: Advance,
    ) -> tuple[Sequence[Taken], Forward | None]:
        """The steps taken, in order, and the forward of the last state where it is known."""


class Reviser(CanvasPart, Protocol):
    """Takes back or replaces committed positions of the window."""

    def revise(self, history: Any, view: View, row: CanvasRow) -> tuple[Any, Mapping[int, int | None]]:
        """(history', position -> replacement token, or None to open it again)."""


class StopRule(CanvasPart, Protocol):
    """Ends a canvas early: before the commits of a step ("fill_all"), or after them ("truncate", "finish")."""

    when: Literal["before", "after"]

    def check(self, view: View, row: CanvasRow, chosen: Tensor) -> tuple[StopAction, int]:
        """What to do, and the new end for "truncate" (else -1); `chosen` bool [P] are this step's commits."""


class CachePolicy(CanvasPart, Protocol):
    """Which positions a forward recomputes; says when it is exact for a model."""

    stores: bool  # whether keys are kept between forwards

    def exact(self, capabilities: Capabilities) -> bool:
        """Whether this policy changes no result on such a model."""

    def refresh(self, row: CanvasRow) -> bool:
        """Whether the next forward must recompute everything."""

    def span(self, row: CanvasRow, refresh: bool, shift: int) -> tuple[int, int]:
        """Queries [low, high) of the next forward."""

    def length(self, row: CanvasRow, refresh: bool, high: int) -> int:
        """Positions whose keys stay valid after that forward."""


class Guide(CanvasPart, Protocol):
    """Steers by a second forward in the same pass: that of a companion of every state, over the same positions."""

    def companion(self, row: CanvasRow) -> CanvasRow:
        """The state to compute beside `row`: other tokens in the same places."""

    def join(self, seen: Forward, other: Forward) -> Forward:
        """The forward that all parts see, out of that of a state and that of its companion."""


@dataclass(frozen=True)
class Policy:
    """What one method brings to a canvas, or several joined; `over` completes it with a baseline's parts.

    `pins` maps offsets of the canvas to tokens that are fixed before decoding starts.
    """

    planner: BlockPlanner | None = None
    schedule: Schedule | None = None
    scorer: Scorer | None = None
    stages: tuple[LogitStage, ...] = ()
    scores: tuple[ScoreStage, ...] = ()
    selectors: tuple[Selector, ...] = ()
    stepper: Stepper | None = None
    reviser: Reviser | None = None
    stops: tuple[StopRule, ...] = ()
    cache: CachePolicy | None = None
    guide: Guide | None = None
    pins: Mapping[int, int] = field(default_factory=dict)

    @cached_property
    def parts(self) -> list[CanvasPart]:
        """All parts, in the order of the fields."""
        found: list[CanvasPart] = []
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name != "pins" and value is not None:
                found += value if isinstance(value, tuple) else [value]
        return found

    @cached_property
    def everywhere(self) -> bool:
        """Whether a part reads masked positions beyond the window."""
        return any(part.range == "all_masked" for part in self.parts)

    @cached_property
    def ahead(self) -> bool:
        """Whether blocks are planned from a forward that shows everything."""
        return any(part.range == "block_start_full" for part in self.parts)

    @cached_property
    def final(self) -> bool:
        """Whether committed text stays."""
        return not any(part.mutates_committed for part in self.parts)

    @property
    def sides(self) -> int:
        """Forwards of one state: 2 with a guide, else 1."""
        return 1 if self.guide is None else 2

    def states(self, branches: Sequence[CanvasRow]) -> Sequence[CanvasRow]:
        """What a pass computes for `branches`: the states themselves, then with a guide their companions."""
        return branches if self.guide is None else [*branches, *map(self.guide.companion, branches)]

    def joined(self, forwards: Sequence[Forward]) -> Sequence[Forward]:
        """The forwards of the branches, out of those of all `states`, in their order."""
        if self.guide is None:
            return forwards
        half = len(forwards) // 2
        return [self.guide.join(*pair) for pair in zip(forwards[:half], forwards[half:], strict=True)]

    def join(self, other: Policy) -> Policy:
        """Both as one; raises IncompatibleError naming two parts that claim one place."""
        values: dict[str, Any] = {}
        for f in fields(self):
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            if f.name == "pins":
                if twice := set(mine) & set(theirs):
                    raise IncompatibleError(f"two methods pin offset {min(twice)} of the canvas", field="method")
                values[f.name] = {**mine, **theirs}
            elif isinstance(mine, tuple):
                values[f.name] = mine + theirs
            elif mine is not None and theirs is not None:
                raise _refusal(mine, theirs, f"a canvas has one {f.name}")
            else:
                values[f.name] = theirs if mine is None else mine
        return Policy(**values)

    def over(self, base: Policy) -> Policy:
        """This policy, with the parts of `base` wherever it has none; selectors replace those of the base."""
        own = {f.name: getattr(self, f.name) or getattr(base, f.name) for f in fields(self)}
        return Policy(**own)

    def check(self, capabilities: Capabilities) -> Policy:
        """Refuse parts that cannot work together or on this model; raises IncompatibleError naming both sides."""
        verifier = self.stepper if getattr(self.stepper, "verifies", False) else None
        for part in self.parts:
            if part.mutates_committed:
                if verifier is not None:
                    raise _refusal(verifier, part, "drafted steps are checked against text that stays")
                if late := next((stop for stop in self.stops if stop.range == "all_masked"), None):
                    raise _refusal(late, part, "it trusts committed text, which the other takes back")
            if capabilities.block is not None and part.range == "block_start_full":
                raise IncompatibleError(
                    f"method {part.name!r} plans blocks; this model was trained on blocks of {capabilities.block}",
                    hint="leave it out, or load a model with full attention",
                    field="method",
                )
        if self.guide is not None and self.cache is not None and self.cache.stores:
            raise _refusal(self.guide, self.cache, "the keys that are kept are not those of its second forward")
        if verifier is not None and self.cache is not None and getattr(self.cache, "periodic", False):
            raise _refusal(
                verifier, self.cache, "refreshing inside a block would happen at other steps than without drafts"
            )
        return self

    # --- one step ---

    def open(self, request: Request, capabilities: Capabilities) -> CanvasRow:
        """The first state of a request's canvas: its prompt, then masks, fixed text and pins.

        Raises ConfigError naming the field: the mask token in a prompt, settings that only mean something from left to
        right, a template or pins outside the canvas, fewer steps than blocks, and whatever `admit(row)` of a part refuses,
        where a part has one.
        """
        _refuse_sequential(request.sampling)
        prompt, sampling, mask_id = request.prompt, request.sampling, capabilities.mask_id
        if mask_id is not None and mask_id in (*prompt, *(request.template or ())):
            raise ConfigError(
                f"prompt holds the mask token {mask_id}; a prompt is fixed text",
                hint="give slots through fill(), or as -1 in a template",
                field="prompt",
            )
        room = capabilities.max_len - len(prompt)
        asked = sampling.max_tokens or capabilities.canvas or LIMITS.canvas
        slots = [-1] * min(asked, room) if request.template is None else list(request.template)
        if len(slots) > room:
            raise ContextLengthError(
                f"a prompt of {len(prompt)} tokens and a template of {len(slots)} exceed the model's window",
                hint=f"shorten them to {capabilities.max_len} tokens",
                field="template",
            )
        for offset, token in self.pins.items():
            if not 0 <= offset < len(slots) or slots[offset] >= 0:
                raise out_of_range("template", offset, f"a free offset of the canvas, in [0, {len(slots) - 1}]")
            slots[offset] = token
        if max(slots) >= capabilities.vocab_size:
            raise out_of_range("template", max(slots), f"token ids below the vocabulary of {capabilities.vocab_size}")
        if request.template is not None:  # its slots are text
            sampling = replace(sampling, logit_bias={**sampling.logit_bias, **dict.fromkeys(capabilities.eos_ids, -100.0)})
        whole = self._whole
        wanted = torch.tensor([*prompt, *slots, *[-1] * (-len(slots) % whole if whole else 0)])
        fixed = wanted >= 0
        provenance = torch.where(fixed, FIXED, SLOT).to(torch.uint8)
        provenance[: len(prompt)] = PROMPT
        aligned = None if whole else capabilities.block
        start = len(prompt) if aligned is None else len(prompt) // aligned * aligned
        row = CanvasRow(
            id=0,
            tokens=wanted.where(fixed, torch.tensor(mask_id or 0)),
            provenance=provenance,
            accepted=fixed,
            prompt_len=len(prompt),
            end=len(prompt) + len(slots),
            window=(start, start),
            sampling=sampling,
            blank=mask_id or 0,
        )
        for part in self.parts:
            if (admit := getattr(part, "admit", None)) is not None:
                admit(row)
        return replace(row, planned=self._has(self.schedule, "schedule").planned(row))

    @property
    def _whole(self) -> int:
        return getattr(self.planner, "whole", 0)

    @staticmethod
    def _has(part: _Part | None, name: str) -> _Part:
        """The part, which a policy completed by `over` has."""
        if part is None:
            raise IncompatibleError(f"this policy has no {name}; complete it with a baseline", field="method")
        return part

    def begin(self, row: CanvasRow, seen: Forward | None) -> CanvasRow:
        """The state with the block that starts at row.window[1] opened; histories start anew."""
        start = row.window[1]
        row = replace(row, window=(start, row.end), history={})
        view = None
        if seen is not None:
            view = _view(row, seen)
            view.x0, view.prob = self._has(self.scorer, "scorer").draw(view, row)
            view.score = view.prob
        last = len(row.tokens) if self._whole else row.end
        end = min(max(self._has(self.planner, "planner").plan(view, row), start + 1), last)
        row = replace(row, window=(start, end))
        return replace(row, quotas=self._has(self.schedule, "schedule").quotas(row))

    def advance(self, row: CanvasRow, seen: Forward) -> Taken:
        """One step of the canvas from the forward of its state; a pure function."""
        view = _view(row, seen)
        history = dict(row.history)
        if row.sampling.logit_bias:
            view.changed = view.changed.clone()
            view.changed[:, list(row.sampling.logit_bias)] += torch.tensor(list(row.sampling.logit_bias.values()))
        for stage in self.stages:
            history[stage.name], view.changed = stage.apply(history.get(stage.name), view, row)
        view.x0, view.prob = self._has(self.scorer, "scorer").draw(view, row)
        view.score = view.prob
        for rescorer in self.scores:
            view.score = rescorer.rescore(view, row)
        open_ = view.masked & view.inside
        chosen = torch.zeros_like(open_)
        for stop in self.stops:
            if stop.when == "before" and stop.check(view, row, chosen)[0] == "fill_all":
                return _commit(row, view, view.masked if stop.range == "all_masked" else open_, history)
        for selector in self.selectors:
            history[selector.name], more = selector.select(history.get(selector.name), view, row, row.quota)
            chosen = chosen | more
        chosen &= open_
        if not bool(chosen.any()):
            chosen[view.score.masked_fill(~open_, -torch.inf).argmax()] = True
        taken = _commit(row, view, chosen, history)
        if self.reviser is not None:
            taken = _revise(self.reviser, taken, view)
        for stop in self.stops:
            if stop.when == "after":
                action, end = stop.check(view, taken.row, chosen)
                if action == "truncate" and end < taken.row.end:
                    low, high = taken.row.window
                    taken = replace(taken, row=replace(taken.row, end=end, window=(min(low, end), min(high, end))))
        return taken


def _revise(reviser: Reviser, taken: Taken, view: View) -> Taken:
    """The step with what `reviser` takes back or replaces."""
    row = taken.row
    state, changes = reviser.revise(row.history.get(reviser.name), view, row)
    tokens, accepted, writes = row.tokens.clone(), row.accepted.clone(), list(taken.writes)
    for at, token in changes.items():
        accepted[at] = token is not None
        tokens[at] = row.blank if token is None else token
        writes.append((at, -1 if token is None else token, 0.0))
    row = replace(row, tokens=tokens, accepted=accepted, history={**row.history, reviser.name: state})
    return Taken(row, tuple(writes))


def _refuse_sequential(sampling: SamplingParams) -> None:
    """Refuse settings that only mean something from left to right."""
    for name, off in (("repetition_penalty", 1), ("presence_penalty", 0), ("frequency_penalty", 0), ("logprobs", None)):
        if getattr(sampling, name) != off:
            raise ConfigError(
                f"{name} = {getattr(sampling, name)} is for models that write from left to right; this one fills a canvas",
                hint=f"leave {name} out",
                field=name,
            )


def _view(row: CanvasRow, seen: Forward) -> View:
    low, high = row.window
    inside = (seen.positions >= low) & (seen.positions < high)
    none = seen.logits.new_empty(0)
    masked = row.masked[seen.positions]
    return View(seen, seen.logits, seen.positions, masked, inside, seen.logits, none.long(), none, none)


def _commit(row: CanvasRow, view: View, chosen: Tensor, history: Mapping[str, Any]) -> Taken:
    """The state with the candidates of `chosen` bool [P] written, one step later."""
    at, x0 = view.positions[chosen], view.x0[chosen]
    writes = tuple(zip(at.tolist(), x0.tolist(), view.prob[chosen].tolist(), strict=True))
    after = replace(
        row,
        tokens=row.tokens.index_copy(0, at, x0),
        accepted=row.accepted.index_fill(0, at, True),
        step_in_block=row.step_in_block + 1,
        global_step=row.global_step + 1,
        history=history,
    )
    return Taken(after, writes)


def _refusal(one: CanvasPart, other: CanvasPart, why: str) -> IncompatibleError:
    return IncompatibleError(f"method {one.name!r} cannot be combined with {other.name!r}: {why}", field="method")
