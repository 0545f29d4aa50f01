"""The fastest combination of methods for a model on this machine: searched on some prompts, confirmed on others.

Successive halving (Jamieson and Talwalkar, 1502.07943): every candidate answers a few dev prompts, the better half answers
twice as many, until four are left. These answer held-out prompts, and the fastest of those that keep the promise is chosen.
The promise: an exact combination gives the baseline's tokens, all of them; a lossy one loses no more quality than allowed,
by an upper bound at 95 percent that counts chance and the number of lossy combinations it was asked of. The baseline
answers every prompt too, in turn with the others, so that speed is a ratio within one run. Where nothing holds it stays.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any, NamedTuple

from hasten.bench.bounds import above, below, lower, upper
from hasten.bench.candidates import Candidate, Space
from hasten.bench.report import Progress, Spread
from hasten.bench.splits import Splits, Task
from hasten.errors import HastenError, out_of_range

if TYPE_CHECKING:
    from hasten.llm import LLM
    from hasten.models.tuned import Profile

ALPHA = 0.05  # chance that any lossy combination is confirmed that loses more than it may
FINALISTS = 4
FASTER = 1.05  # a ratio below this may be noise
_SEARCH = 0.4  # share of the time for the search; the rest is for confirming
_ROUNDS = 5  # consecutive parts of the prompts, each with a ratio of its own: the spread
_ENOUGH = 48  # held-out prompts after which confirming ends, where every combination is decided
_LEAST = 4  # held-out prompts without which nothing is confirmed
_EXACT = 16  # held-out prompts for an exact combination beside lossy ones, which need the time: one wrong token decides it


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer: its tokens and text, and the seconds of the whole request."""

    tokens: tuple[int, ...]
    text: str
    seconds: float


Answerer = Callable[[Candidate, Task], Answer]


class Pair(NamedTuple):
    """One prompt answered by the baseline and by a candidate: seconds and quality in [0, 1] of both."""

    base_s: float
    own_s: float
    base_quality: float
    quality: float

    @property
    def loss(self) -> float:
        """Quality the candidate lost, in [-1, 1]."""
        return self.base_quality - self.quality


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
        return self.held_out or self.dev

    def to_dict(self) -> dict[str, Any]:
        """The trial as JSON-ready values."""
        return {
            "method": list(self.candidate.methods),
            "exact": self.candidate.exact,
            "dev": figures(self.dev),
            "held_out": figures(self.held_out),
            "fate": self.fate or "chosen",
        }


def figures(pairs: Sequence[Pair]) -> dict[str, Any] | None:
    """Prompts, speed and quality of some answers, JSON-ready; None without any."""
    if not pairs:
        return None
    return {
        "prompts": len(pairs),
        "speedup": speedup(pairs).to_dict(),
        "quality": round(sum(one.quality for one in pairs) / len(pairs), 4),
        "baseline_quality": round(sum(one.base_quality for one in pairs) / len(pairs), 4),
    }


def speedup(pairs: Sequence[Pair]) -> Spread:
    """The baseline's time divided by the candidate's, for each of up to five consecutive parts of the prompts."""
    rounds = min(_ROUNDS, len(pairs))
    parts = [pairs[len(pairs) * i // rounds : len(pairs) * (i + 1) // rounds] for i in range(rounds)]
    return Spread.of([sum(one.base_s for one in part) / max(1e-9, sum(one.own_s for one in part)) for part in parts])


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


def runner(llm: LLM, max_tokens: int, clock: Callable[[], float] = time.perf_counter) -> Answerer:
    """Greedy answers of a model by any candidate, timed without building its parts."""

    def run(one: Candidate, task: Task) -> Answer:
        llm.parts(one.methods)
        start = clock()
        out = llm.generate(list(task.ids), method=list(one.methods), max_tokens=max_tokens, seed=0)
        return Answer(out.tokens, out.text, clock() - start)

    return run


def search(
    space: Space,
    splits: Splits,
    answer: Answerer,
    *,
    seconds: float,
    max_loss: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
    progress: Progress = lambda what, done, total: None,
    fresh: Callable[[], None] = lambda: None,
) -> Finding:
    """The fastest candidate whose quality on held-out prompts is within `max_loss` (a share) of the baseline's.

    No answer begins once `seconds` of `clock` are over. `fresh` is called before the search and before confirming, so that
    what methods have learnt from dev prompts is gone. With `max_loss` 0 only exact candidates are run. Raises ConfigError
    for seconds that are not above 0 and a loss outside [0, 1); what the baseline is refused with.
    """
    if not 0 < seconds < math.inf:
        raise out_of_range("seconds", seconds, "above 0")
    if not 0 <= max_loss < 1:
        raise out_of_range("max_quality_loss", max_loss, "in [0, 1)")
    return _Search(space, splits, answer, seconds, max_loss, clock, progress, fresh).run()


class _Search:
    def __init__(
        self,
        space: Space,
        splits: Splits,
        answer: Answerer,
        seconds: float,
        max_loss: float,
        clock: Callable[[], float],
        progress: Progress,
        fresh: Callable[[], None],
    ) -> None:
        self.space, self.splits, self.answer, self.max_loss = space, splits, answer, max_loss
        self.clock, self.progress, self.fresh = clock, progress, fresh
        self.start, self.seconds = clock(), seconds
        self.trials = [Trial(one) for one in space.candidates if one.exact or max_loss > 0]
        self.turn = 0

    def run(self) -> Finding:
        """Halve, confirm, choose."""
        self.fresh()
        finalists = self._halve(list(self.trials))
        tested = sum(not trial.candidate.exact for trial in finalists)
        alpha = ALPHA / max(1, tested)
        self._confirm(finalists, alpha)
        passed = [trial for trial in finalists if self._holds(trial, alpha)]
        best = max(passed, key=lambda trial: speedup(trial.held_out).median, default=None)
        for trial in passed:
            trial.fate = "" if trial is best else "slower on held-out prompts"
        return Finding(
            chosen=self.space.baseline if best is None else best.candidate,
            baseline=self.space.baseline,
            speedup=Spread(1.0, 1.0, 1.0) if best is None else speedup(best.held_out),
            max_loss=self.max_loss,
            trials=tuple(self.trials),
            why=self._why(best, finalists, alpha),
            prompts=self.splits.what,
            quality_is=self.splits.quality if self.max_loss else "the baseline's own tokens, all of them",
            left_out=self.space.left_out,
            seconds=self.clock() - self.start,
        )

    # --- the two stages ---

    def _halve(self, live: list[Trial]) -> list[Trial]:
        """The candidates that are left after dev prompts; few need no search."""
        if len(live) <= FINALISTS:
            return live
        rungs = math.ceil(math.log2(len(live) / FINALISTS))
        end = self.start + self.seconds * _SEARCH
        self._warm(end)
        at = 0
        for rung in range(rungs):
            deadline = self.start + self.seconds * _SEARCH * (rung + 1) / rungs
            count = max(1, len(self.splits.dev) * 2**rung // (2**rungs - 1))
            for i, task in enumerate(self.splits.dev[at : at + count]):
                if not self._row(task, live, "dev", deadline if i else end, "searching"):
                    break
            at += count
            live = self._cut(live, max(FINALISTS, math.ceil(len(live) / 2)) if rung + 1 < rungs else FINALISTS)
        return live

    def _cut(self, live: list[Trial], keep: int) -> list[Trial]:
        """The fastest `keep` of those that are not refuted.

        Two places are for the fastest exact one and the lossy one that lost least: what there is to fall back to.
        """
        standing = [trial for trial in live if trial.dev and not self._refuted(trial, trial.dev, "dev", ALPHA)]
        ranked = sorted(standing, key=lambda trial: (self._over(trial.dev), -speedup(trial.dev).median))
        exact = [trial for trial in ranked if trial.candidate.exact][:1]
        lossy = [trial for trial in ranked if not trial.candidate.exact]
        safest = sorted(lossy, key=lambda trial: sum(max(0.0, one.loss) for one in trial.dev) / len(trial.dev))[:1]
        kept = exact + safest
        kept += [trial for trial in ranked if trial not in kept][: keep - len(kept)]
        for trial in ranked:
            if trial in kept:
                continue
            over = self._over(trial.dev)
            trial.fate = "lost more on dev prompts" if over else "slower on dev prompts"
        return kept

    def _confirm(self, finalists: list[Trial], alpha: float) -> None:
        """Held-out prompts until time is up, or all of them are answered, or every finalist is decided."""
        end = self.start + self.seconds
        self.fresh()
        self._warm(end)
        live = list(finalists)
        for i, task in enumerate(self.splits.held_out):
            if not live or not self._row(task, live, "held_out", end, "confirming"):
                break
            live = [trial for trial in live if not self._refuted(trial, trial.held_out, "held-out", alpha)]
            if i + 1 >= _EXACT and any(not trial.candidate.exact for trial in live):
                live = [trial for trial in live if not trial.candidate.exact]
            if i + 1 >= _ENOUGH and all(trial.candidate.exact or self._within(trial, alpha) for trial in live):
                break

    def _warm(self, limit: float) -> None:
        """One answer that is not counted."""
        if self.splits.held_out and self.clock() < limit:
            self.answer(self.space.baseline, self.splits.dev[0] if self.splits.dev else self.splits.held_out[0])

    def _row(self, task: Task, live: Sequence[Trial], part: str, limit: float, what: str) -> bool:
        """One prompt answered by the baseline and all that are `live`, in turning order; False when time was up before."""
        order: list[Trial | None] = [None, *(trial for trial in live if not trial.failed)]
        shift = self.turn % len(order)
        self.turn += 1
        base: Answer | None = None
        answers: list[tuple[Trial, Answer]] = []
        in_time = True
        for trial in order[shift:] + order[:shift]:
            now = self.clock()
            self.progress(what, min(int(now - self.start), int(self.seconds)), int(self.seconds))
            if now >= limit:
                in_time = False
                break
            if trial is None:
                base = self.answer(self.space.baseline, task)
                continue
            try:
                answers.append((trial, self.answer(trial.candidate, task)))
            except HastenError as error:
                trial.failed, trial.fate = True, f"failed: {error.message}"
        if base is not None:
            for trial, own in answers:
                pair = Pair(base.seconds, own.seconds, *_qualities(task, base, own, trial.candidate.exact))
                (trial.dev if part == "dev" else trial.held_out).append(pair)
        return in_time

    # --- judging ---

    def _over(self, pairs: Sequence[Pair]) -> bool:
        """Whether these answers on average lost more than they may."""
        return sum(one.loss for one in pairs) / len(pairs) > self.max_loss

    def _refuted(self, trial: Trial, pairs: Sequence[Pair], where: str, alpha: float) -> bool:
        """Whether a candidate failed, broke its promise, or lost too much beyond chance; its fate then says so."""
        if trial.failed or not pairs:
            return trial.failed
        if trial.candidate.exact:
            other = sum(one.loss > 0 for one in pairs)
            if other:
                trial.fate = f"another text in {other} of {len(pairs)} {where} answers"
            return bool(other)
        losses = [one.loss for one in pairs]
        refuted = above(losses, self.max_loss, alpha)
        if refuted:
            trial.fate = f"lost at least {lower(losses, alpha):.1%} on {where} prompts"
        return refuted

    def _within(self, trial: Trial, alpha: float) -> bool:
        """Whether a lossy candidate is shown to lose no more than it may."""
        return below([one.loss for one in trial.held_out], self.max_loss, alpha)

    def _holds(self, trial: Trial, alpha: float) -> bool:
        """Whether a finalist may be chosen; if not, its fate says why."""
        pairs = trial.held_out
        if self._refuted(trial, pairs, "held-out", alpha):
            return False
        if len(pairs) < _LEAST:
            trial.fate = "not confirmed: time was up"
            return False
        if not trial.candidate.exact and not self._within(trial, alpha):
            most = upper([one.loss for one in pairs], alpha)
            trial.fate = f"may lose up to {most:.1%}"
            return False
        ratio = min(speedup(pairs).median, sum(one.base_s for one in pairs) / sum(one.own_s for one in pairs))
        if ratio < FASTER:
            trial.fate = f"no faster in all ({ratio:.2f}x)"
            return False
        return True

    # --- words ---

    def _why(self, best: Trial | None, finalists: Sequence[Trial], alpha: float) -> str:
        """The choice in words."""
        said = []
        if best is None:
            said.append(f"Nothing faster than {self.space.baseline} was confirmed within these bounds, so it stays.")
            for trial in sorted(finalists, key=lambda one: -speedup(one.best).median if one.best else 0.0)[:1]:
                said.append(f"The nearest, {trial.candidate}: {trial.fate}.")
        else:
            pairs = best.held_out
            said.append(
                f"{best.candidate} answered {len(pairs)} held-out prompts {speedup(pairs)} times as fast as "
                f"{self.space.baseline} (median, least-greatest)"
            )
            if best.candidate.exact:
                said[0] += ", with the same tokens in every one."
            else:
                base, own = (sum(getattr(one, name) for one in pairs) for name in ("base_quality", "quality"))
                most = upper([one.loss for one in pairs], alpha)
                said[0] += (
                    f". Quality {own / len(pairs):.1%} against {base / len(pairs):.1%}; with {1 - ALPHA:.0%} confidence it "
                    f"loses at most {max(0.0, most):.1%}, within the {self.max_loss:.1%} allowed."
                )
        auto = next((one for one in finalists if one.candidate.methods == ("auto",) and one.held_out), None)
        if auto is not None and auto is not best:
            said.append(f"auto, the default: {speedup(auto.held_out)}.")
        most_rows = max((len(one.held_out) for one in finalists if not one.candidate.exact), default=0)
        if self.max_loss and (best is None or best.candidate.exact) and most_rows:
            floor = upper([0.0] * most_rows, alpha)
            if floor > self.max_loss:
                said.append(
                    f"{most_rows} held-out prompts cannot show a loss below {floor:.1%}, even where nothing is lost: more "
                    "minutes, more prompts or a larger budget would let lossy methods take part."
                )
        return " ".join(said)


def _qualities(task: Task, base: Answer, own: Answer, exact: bool) -> tuple[float, float]:
    """Quality of the baseline's and of the candidate's answer, in [0, 1]: equality for exact ones, else right or wrong,
    else the share of tokens in common, in order (2 M / T of difflib)."""
    if exact:
        return 1.0, float(own.tokens == base.tokens)
    if task.verify is not None:
        return float(task.verify(base.text)), float(task.verify(own.text))
    return 1.0, SequenceMatcher(None, base.tokens, own.tokens, autojunk=False).ratio()


def profile_of(llm: LLM, found: Finding, **measured: Any) -> Profile:
    """The profile to store of a finding; `measured` are further figures, JSON-ready."""
    from hasten import __version__
    from hasten.models.tuned import Profile, fingerprint, machine

    return Profile(
        model=fingerprint(llm.model, llm.name),
        machine=machine(llm.model),
        name=llm.name,
        method=found.chosen.methods,
        baseline=str(found.baseline),
        exact=found.chosen.exact,
        max_quality_loss=found.max_loss,
        speedup=found.speedup.to_dict(),
        why=found.why,
        hasten=__version__,
        measured={"prompts": found.prompts, "quality_is": found.quality_is, **measured},
    )
