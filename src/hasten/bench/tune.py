"""The fastest combination of methods for a model on this machine: searched on some prompts, confirmed on others.

Successive halving (Jamieson and Talwalkar, 1502.07943): every candidate answers a few dev prompts, the better half answers
twice as many, until four are left. These answer held-out prompts, and the fastest of those that keep the promise is chosen.
The promise: an exact combination gives the baseline's tokens, all of them; a lossy one loses no more quality than allowed,
by an upper bound at 95 percent that counts chance and the number of lossy combinations it was asked of. The baseline takes
its turn with the others, so that speed is a ratio within one run. Where nothing holds it stays.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from hasten.bench.bounds import above, below, lower, upper
from hasten.bench.candidates import Candidate, Space
from hasten.bench.report import Progress, Spread
from hasten.bench.splits import Splits, Task
from hasten.bench.trials import Answer, Finding, Pair, Trial, pair, speedup, timed
from hasten.errors import HastenError, out_of_range

if TYPE_CHECKING:
    from hasten.llm import LLM
    from hasten.models.tuned import Profile

ALPHA = 0.05  # chance that any lossy combination is confirmed that loses more than it may
FINALISTS = 4
FASTER = 1.05  # a ratio below this may be noise
_SEARCH = 0.4  # share of the time for the search; the rest is for confirming
_ENOUGH = 48  # held-out prompts after which confirming ends, where every combination is decided
_LEAST = 4  # held-out prompts without which nothing is confirmed
_TIMED = 16  # held-out prompts on which all take turns, where lossy ones need many more for their quality alone
_TURNS = 0.35  # share of the time for confirming after which there are no more turns, if there were `_LEAST`
Answerer = Callable[[Candidate, Task], Answer]


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
        standing = [trial for trial in live if timed(trial.dev) and not self._refuted(trial, trial.dev, "dev", ALPHA)]
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
        live, begun = list(finalists), self.clock()
        for i, task in enumerate(self.splits.held_out):
            lossy = [trial for trial in live if not trial.candidate.exact]
            over = i >= _TIMED or (i >= _LEAST and self.clock() >= begun + _TURNS * (end - begun))
            asked = lossy if lossy and over else live
            if not live or not self._row(task, asked, "held_out", end, "confirming", turns=asked is live):
                break
            live = [trial for trial in live if not self._refuted(trial, trial.held_out, "held-out", alpha)]
            if i + 1 >= _ENOUGH and all(trial.candidate.exact or self._within(trial, alpha) for trial in live):
                break

    def _warm(self, limit: float) -> None:
        """One answer that is not counted."""
        if self.splits.held_out and self.clock() < limit:
            self.answer(self.space.baseline, self.splits.dev[0] if self.splits.dev else self.splits.held_out[0])

    def _row(self, task: Task, live: Sequence[Trial], part: str, limit: float, what: str, *, turns: bool = True) -> bool:
        """One prompt answered by all that are `live` and by the baseline, in turning order; False when time was up before.

        Without `turns` the baseline comes last, and only where it is needed to judge the others: not where a verifier finds
        all of them right, since none of those can have lost anything.
        """
        order: list[Trial | None] = [None, *(trial for trial in live if not trial.failed)]
        shift = self.turn % len(order) if turns else 1
        self.turn += turns
        base: Answer | None = None
        answers: list[tuple[Trial, Answer]] = []
        in_time = True
        for trial in order[shift:] + order[:shift]:
            now = self.clock()
            self.progress(what, min(int(now - self.start), int(self.seconds)), int(self.seconds))
            if trial is None and not turns and task.verify is not None and all(task.verify(one.text) for _, one in answers):
                continue
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
        for trial, own in answers:
            found = pair(task, own, base, trial.candidate.exact, turns)
            if found is not None:
                (trial.dev if part == "dev" else trial.held_out).append(found)
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
        both = timed(pairs)
        if len(both) < _LEAST:
            trial.fate = "not confirmed: time was up"
            return False
        if not trial.candidate.exact and not self._within(trial, alpha):
            most = upper([one.loss for one in pairs], alpha)
            trial.fate = f"may lose up to {most:.1%}"
            return False
        ratio = min(speedup(pairs).median, sum(one[0] for one in both) / max(1e-9, sum(one[1] for one in both)))
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
            for trial in sorted(finalists, key=lambda one: -speedup(one.best).median if timed(one.best) else 0.0)[:1]:
                said.append(f"The nearest, {trial.candidate}: {trial.fate}.")
        else:
            pairs, both = best.held_out, timed(best.held_out)
            said.append(
                f"{best.candidate} answered {len(both)} held-out prompts {speedup(pairs)} times as fast as "
                f"{self.space.baseline} (median, least-greatest)"
            )
            if best.candidate.exact:
                said[0] += ", with the same tokens in every one."
            else:
                own, base = sum(one.quality for one in pairs) / len(pairs), sum(one[2] for one in both) / len(both)
                most = max(0.0, upper([one.loss for one in pairs], alpha))
                said[0] += (
                    f". Quality {own:.1%} on {len(pairs)} prompts, that of {self.space.baseline} {base:.1%} on the "
                    f"{len(both)}; with {1 - ALPHA:.0%} confidence it loses at most {most:.1%}, within the "
                    f"{self.max_loss:.1%} allowed."
                )
        auto = next((one for one in finalists if one.candidate.methods == ("auto",) and timed(one.held_out)), None)
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
