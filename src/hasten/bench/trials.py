"""What a search measures of one candidate, and what it comes to: answers in pairs with the baseline's, speed, quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any, NamedTuple

from hasten.bench.candidates import Candidate
from hasten.bench.report import Spread
from hasten.bench.splits import Task

ROUNDS = 5  # consecutive parts of the prompts, each with a ratio of its own: the spread


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer: its tokens and text, and the seconds of the whole request."""

    tokens: tuple[int, ...]
    text: str
    seconds: float


class Pair(NamedTuple):
    """One prompt answered by a candidate: its seconds, its quality in [0, 1], and what it lost, in [-1, 1].

    `base_s` and `base_quality` are the baseline's, where both took their turns on the prompt. Where the baseline was not
    asked in turn, `loss` is the most that may have been lost.
    """

    own_s: float
    quality: float
    loss: float
    base_s: float | None = None
    base_quality: float | None = None


def pair(task: Task, own: Answer, base: Answer | None, exact: bool, timed: bool = True) -> Pair | None:
    """What an answer is worth beside the baseline's; None where it cannot be judged without one.

    Quality is equality of all tokens for exact candidates, else right or wrong where there is a verifier, else the share of
    tokens in common with the baseline's, in order (2 M / T of difflib). With a verifier no answer loses more than it lacks.
    """
    if task.verify is not None and not exact:
        quality = float(task.verify(own.text))
        if base is None:
            return Pair(own.seconds, quality, 1.0 - quality)
        best = float(task.verify(base.text))
    elif base is None:
        return None
    else:
        best = 1.0
        matched = SequenceMatcher(None, base.tokens, own.tokens, autojunk=False)
        quality = float(own.tokens == base.tokens) if exact else matched.ratio()
    if not timed:
        return Pair(own.seconds, quality, best - quality)
    return Pair(own.seconds, quality, best - quality, base.seconds, best)


def timed(pairs: Sequence[Pair]) -> list[tuple[float, float, float]]:
    """(seconds of the baseline, of the candidate, the baseline's quality) of the prompts on which both took turns."""
    return [
        (one.base_s, one.own_s, one.base_quality)
        for one in pairs
        if one.base_s is not None and one.base_quality is not None
    ]


def speedup(pairs: Sequence[Pair]) -> Spread:
    """The baseline's time divided by the candidate's, for each of up to five consecutive parts of the timed prompts.

    Raises ConfigError without any.
    """
    both = timed(pairs)
    rounds = min(ROUNDS, len(both))
    parts = [both[len(both) * i // rounds : len(both) * (i + 1) // rounds] for i in range(rounds)]
    return Spread.of([sum(one[0] for one in part) / max(1e-9, sum(one[1] for one in part)) for part in parts])


def figures(pairs: Sequence[Pair]) -> dict[str, Any] | None:
    """Prompts, speed and quality of some answers, JSON-ready; None without any."""
    both = timed(pairs)
    if not both:
        return None
    return {
        "prompts": len(pairs),
        "timed": len(both),
        "speedup": speedup(pairs).to_dict(),
        "quality": round(sum(one.quality for one in pairs) / len(pairs), 4),
        "baseline_quality": round(sum(one[2] for one in both) / len(both), 4),
        "loss": round(sum(one.loss for one in pairs) / len(pairs), 4),
    }


@dataclass(slots=True, eq=False)
class Trial:
    """What became of one candidate: its answers to dev and held-out prompts, and why it was not chosen ("" if it was)."""

    candidate: Candidate
    dev: list[Pair] = field(default_factory=list)
    held_out: list[Pair] = field(default_factory=list)
    fate: str = "not tried: time was up"
    failed: bool = False

    @property
    def best(self) -> list[Pair]:
        """The held-out answers, else those to dev prompts."""
        return self.held_out if timed(self.held_out) else self.dev

    def to_dict(self) -> dict[str, Any]:
        """The trial as JSON-ready values."""
        return {
            "method": list(self.candidate.methods),
            "exact": self.candidate.exact,
            "dev": figures(self.dev),
            "held_out": figures(self.held_out),
            "fate": self.fate or "chosen",
        }


@dataclass(frozen=True, slots=True)
class Finding:
    """What a search came to: the `chosen` candidate (the baseline where nothing better was confirmed), `why` in words."""

    chosen: Candidate
    baseline: Candidate
    speedup: Spread
    max_loss: float
    trials: tuple[Trial, ...]
    why: str
    prompts: str
    quality_is: str
    left_out: Mapping[str, str]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The finding as JSON-ready values."""
        return {
            "method": list(self.chosen.methods),
            "exact": self.chosen.exact,
            "baseline": list(self.baseline.methods),
            "speedup": self.speedup.to_dict(),
            "max_quality_loss": self.max_loss,
            "why": self.why,
            "prompts": self.prompts,
            "quality_is": self.quality_is,
            "seconds": round(self.seconds, 1),
            "tried": [trial.to_dict() for trial in self.trials],
            "left_out": dict(self.left_out),
        }
