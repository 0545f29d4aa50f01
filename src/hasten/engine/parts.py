"""What passes between the canvas loop and the parts of a policy (hasten.policy has their contracts)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from hasten.types import SamplingParams

StopAction = Literal["continue", "fill_all", "truncate", "finish"]
PartRange = Literal["block", "all_masked", "block_start_full"]
PROMPT, FIXED, SLOT = 0, 1, 2  # provenance of a canvas position


@dataclass(slots=True)
class CanvasRow:
    """The state of one canvas: `tokens` int64 [L] (prompt, fixed text and slots), `provenance` uint8 [L].

    `accepted` bool [L] marks final positions (models without a mask token have no other sign). `window` is the active
    block [start, end), empty between blocks; `end` of the canvas may shrink. `step_in_block` and `global_step` count
    commits, `quotas` are those of the block's steps and `planned` all the canvas needs; `blank` is the token
    of open positions. `stored` positions have valid keys,
    computed `fresh` forwards ago (-1: not in this block). Noise is keyed by (seed,
    global_step, position). `history` maps a part's name to its own value. Tensors are replaced, never written to.
    `before` [window, vocab]: logits of the last step, as models with self-conditioning are to be told them.
    """

    id: int
    tokens: Tensor
    provenance: Tensor
    accepted: Tensor
    prompt_len: int
    end: int
    window: tuple[int, int]
    sampling: SamplingParams
    seed: int = 0
    step_in_block: int = 0
    global_step: int = 0
    quotas: tuple[int, ...] = ()
    planned: int = 1
    blank: int = 0
    fresh: int = -1
    stored: int = 0
    history: Mapping[str, Any] = field(default_factory=dict)
    before: Tensor | None = None

    @property
    def masked(self) -> Tensor:
        """Open positions bool [L], those from `end` on excluded."""
        masked = ~self.accepted
        masked[self.end :] = False
        return masked

    @property
    def left(self) -> int:
        """Open positions of the window."""
        return (self.window[1] - self.window[0]) - int(self.accepted[self.window[0] : self.window[1]].sum())

    @property
    def quota(self) -> int:
        """Commits due in this step: the schedule's, at least 1 and at most what is open."""
        due = self.quotas[self.step_in_block] if self.step_in_block < len(self.quotas) else 1
        return max(1, min(due, self.left))


@dataclass(frozen=True, slots=True)
class Forward:
    """What a forward computed at absolute `positions` int64 [P], ascending: aligned raw `logits` float32 [P, vocab].

    `best` int64 [P] are their arg-max where the backbone had it at hand; the mask token has logit -inf.
    """

    logits: Tensor
    positions: Tensor
    best: Tensor | None = None


@dataclass(slots=True)
class View:
    """A forward as the parts of one step see it, at `positions` int64 [P] for the raw `logits` [P, vocab].

    `masked` bool [P]: still open. `inside` bool [P]: of the window. After the logit stages `changed` [P, vocab] are the
    logits that candidates come from, `x0` [P] the candidates, `prob` [P] their scores before the score stages and
    `score` [P] after. The mask token has logit -inf throughout.
    """

    forward: Forward
    logits: Tensor
    positions: Tensor
    masked: Tensor
    inside: Tensor
    changed: Tensor
    x0: Tensor
    prob: Tensor
    score: Tensor


@dataclass(frozen=True, slots=True)
class Taken:
    """One step of a canvas: the state after it and what it wrote, (position, token or -1 for opened again, score)."""

    row: CanvasRow
    writes: tuple[tuple[int, int, float], ...] = ()


Advance = Callable[[CanvasRow, Forward], Taken]
