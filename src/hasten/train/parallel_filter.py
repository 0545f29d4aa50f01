"""Training of Learn2PD's filter (2509.25188): what a model's confidences say about which predictions are final already.

The model answers prompts one token per step; then an oracle that knows these answers decodes them again, committing all
that is predicted right at once. Every one of its steps is a record: the block's confidences, and which were right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten import registry
from hasten.engine.contracts import MethodContext
from hasten.engine.engine import Engine, Parts
from hasten.engine.parts import CanvasRow, PartRange, View
from hasten.errors import ConfigError, HastenError, IncompatibleError, out_of_range
from hasten.models.feature import identity
from hasten.policy import Policy, Scorer
from hasten.types import Request, SamplingParams
from hasten.unmask.learn2pd import Filter, confidences

if TYPE_CHECKING:
    from hasten.llm import LLM

Report = Callable[[str, int, int], None]
_TOGETHER = 16  # requests that are decoded side by side
_EVERY, _PATIENCE = 50, 10  # steps between looks at the validation loss, and looks without a better one before it stops


@dataclass(frozen=True, slots=True)
class Config:
    """`canvas` positions per answer in blocks of `block`; at most `steps` full-batch steps at learning rate `lr`."""

    canvas: int = 128
    block: int = 32
    steps: int = 2000
    lr: float = 3e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("canvas", "block", "steps"):
            if getattr(self, name) < 1:
                raise out_of_range(f"train.{name}", getattr(self, name), "at least 1")
        if not 0 < self.lr < 1:
            raise out_of_range("train.lr", self.lr, "in (0, 1)")


@dataclass(frozen=True, slots=True)
class Records:
    """Steps of the oracle: `inputs` float32 [N, B], `right` and `open` bool [N, B], `known` bool [N, B] marks positions
    of the answer (not of a prompt, nor behind the canvas), `prompt` int64 [N] says whose step it is."""

    inputs: Tensor
    right: Tensor
    open: Tensor
    known: Tensor
    prompt: Tensor

    def of(self, prompts: Tensor) -> Records:
        """The records of these prompts."""
        keep = torch.isin(self.prompt, prompts)
        return Records(*(getattr(self, name)[keep] for name in ("inputs", "right", "open", "known", "prompt")))


@dataclass(slots=True, eq=False)
class Oracle:
    """Commits what is right by `answer` int64 [canvas], and writes it where nothing is; notes every step in `steps`.

    Where the text, `length` tokens of it, ends inside the window, `cuts` has the step as a canvas cut there would show it.
    """

    inner: Scorer
    answer: Tensor
    length: int
    block: int
    steps: list[tuple[Tensor, ...]] = field(default_factory=list)
    cuts: list[tuple[Tensor, ...]] = field(default_factory=list)
    name: str = "oracle"
    range: PartRange = "block"
    memoryless: bool = True
    lossless: bool = False
    mutates_committed: bool = False

    def draw(self, view: View, row: CanvasRow) -> tuple[Tensor, Tensor]:
        """(x0 [P], score [P]); x0 is the answer where no open position is predicted right."""
        view.x0, score = self.inner.draw(view, row)
        known = view.inside & (view.positions >= row.prompt_len)
        wanted = self.answer[(view.positions - row.prompt_len).clamp(min=0)]
        right, open_ = (view.x0 == wanted) & known, view.masked & view.inside
        step = confidences(view, self.block), *(self._pieces(one[view.inside]) for one in (right, open_, known))
        self.steps.append(step)
        text = self._pieces((view.positions < row.prompt_len + self.length)[view.inside])
        if bool((known[view.inside] & ~text.flatten()[: int(view.inside.sum())]).any()):
            self.cuts.append((step[0] * text, *(one & text for one in step[1:])))
        return view.x0 if bool((right & open_).any()) else torch.where(open_, wanted, view.x0), score

    def _pieces(self, marks: Tensor) -> Tensor:
        size = -(-len(marks) // self.block) * self.block
        return F.pad(marks, (0, size - len(marks))).view(-1, self.block)

    def select(self, history: Any, view: View, row: CanvasRow, quota: int) -> tuple[Any, Tensor]:
        """(history, bool [P])."""
        return history, view.x0 == self.answer[(view.positions - row.prompt_len).clamp(min=0)]


def _decode(
    engine: Engine, given: Sequence[tuple[Request, Policy]], what: str, show: Report
) -> tuple[list[tuple[int, ...]], int]:
    """The answers, and the forwards they took together."""
    tokens: list[tuple[int, ...]] = []
    forwards = 0
    for start in range(0, len(given), _TOGETHER):
        some = given[start : start + _TOGETHER]
        for outs in engine.run([(request, Parts(canvas=policy)) for request, policy in some]):
            if outs[0].finish_reason == "error":
                raise HastenError("the model's logits are not finite", hint="check the model file")
            tokens.append(outs[0].tokens)
            forwards += outs[0].usage.forwards
        show(what, min(start + _TOGETHER, len(given)), len(given))
    return tokens, forwards


def replay(
    engine: Engine, context: MethodContext, prompts: Sequence[Sequence[int]], config: Config, show: Report
) -> tuple[Records, dict[str, int]]:
    """The records of these prompts' answers, and the forwards that writing them and replaying them took.

    What follows an answer's end token counts as end tokens too; steps beside such tokens are noted a second time without
    them, as a canvas that was cut shows them. Raises ConfigError where no prompt leaves room.
    """
    caps, base = context.capabilities, registry.build(f"reference:block={config.block}", context)
    sampling = SamplingParams(max_tokens=config.canvas)
    requests = [Request(tuple(p), sampling) for p in prompts if len(p) + config.canvas <= caps.max_len]
    if len(requests) < 3:
        raise ConfigError(
            f"{len(requests)} of {len(prompts)} prompts leave room for a canvas of {config.canvas}; at least 3 must",
            hint="take a smaller canvas",
            field="train.canvas",
        )
    plain = base.policy.over(base.rest).check(caps)
    answers, written = _decode(engine, [(request, plain) for request in requests], "writing answers", show)
    oracles = []
    for answer in answers:
        whole = torch.full((config.canvas,), answer[-1])
        whole[: len(answer)] = torch.tensor(answer)
        oracles.append(Oracle(cast(Scorer, base.policy.scorer), whole, len(answer), config.block))
    policies = [Policy(scorer=one, selectors=(one,)).over(plain) for one in oracles]
    again, replayed = _decode(engine, list(zip(requests, policies, strict=True)), "replaying answers", show)
    if again != answers:
        raise ConfigError("the oracle's answers are not those it was given; the model is not deterministic", field="model")
    inputs, right, open_, known = (
        torch.cat([step[i] for one in oracles for step in one.steps + one.cuts]) for i in range(4)
    )
    owner = [i for i, one in enumerate(oracles) for step in one.steps + one.cuts for _ in step[0]]
    counts = {"reference_forwards": written, "oracle_forwards": replayed}
    return Records(inputs, right, open_, known, torch.tensor(owner)), counts


def split(records: Records, seed: int) -> tuple[Records, Records, Records]:
    """80, 10 and 10 of a hundred prompts to learn from, to stop by and to test on: no prompt is in two of them."""
    count = int(records.prompt.max()) + 1
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    tenth = max(1, count // 10)
    return records.of(order[2 * tenth :]), records.of(order[:tenth]), records.of(order[tenth : 2 * tenth])


def loss(model: Filter, records: Records) -> Tensor:
    """Binary cross-entropy over all positions of answers, final ones too."""
    each = F.binary_cross_entropy_with_logits(model(records.inputs), records.right.float(), reduction="none")
    return each[records.known].mean()


def fit(learn: Records, stop: Records, config: Config, show: Report) -> tuple[Filter, int]:
    """The filter with the least loss on `stop`, and the steps taken."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = Filter(config.block)
    optimiser = torch.optim.AdamW(model.parameters(), lr=config.lr)
    best, kept, waited, step = float("inf"), model.state_dict(), 0, 0
    while step < config.steps and waited < _PATIENCE:
        step += 1
        value = loss(model, learn)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        if step % _EVERY == 0 or step == config.steps:
            show("training", step, config.steps)
            with torch.no_grad():
                now = float(loss(model, stop))
            waited += 1
            if now < best:
                best, waited = now, 0
                kept = {name: value.clone() for name, value in model.state_dict().items()}
    show("training", config.steps, config.steps)
    model.load_state_dict(kept)
    return model.eval().requires_grad_(False), step


def auc(scores: Tensor, right: Tensor) -> float:
    """The chance that a right position scores higher than a wrong one, ties half; 0.5 where one kind is missing."""
    good, bad = int(right.sum()), int((~right).sum())
    if not good or not bad:
        return 0.5
    _, place, counts = scores.unique(return_inverse=True, return_counts=True)
    rank = counts.cumsum(0) - (counts - 1) / 2
    return float((rank.double()[place][right].sum() - good * (good + 1) / 2) / (good * bad))


def tau_for(model: Filter, records: Records, share: float = 0.01) -> float:
    """The least threshold, in hundredths from 0.5, that at most this share of the wrong open positions passes."""
    at = records.open & records.known
    says, wrong = model(records.inputs).sigmoid()[at], ~records.right[at]
    for hundredth in range(50, 100):
        if float(((says > hundredth / 100) & wrong).sum()) <= share * max(1, int(wrong.sum())):
            return hundredth / 100
    return 1.0


def measure(model: Filter, records: Records, tau: float = 0.9) -> dict[str, float]:
    """On open positions: accuracy and both error rates at `tau`, and how well filter and confidence tell right ones."""
    at = records.open & records.known
    says, bare, right = model(records.inputs).sigmoid()[at], records.inputs[at], records.right[at]
    final = says > tau
    return {
        "accuracy": float((final == right).float().mean()),
        "false_positives": float((final & ~right).sum()) / max(1, int((~right).sum())),
        "false_negatives": float((~final & right).sum()) / max(1, int(right.sum())),
        "auc": auc(says, right),
        "auc_of_confidence": auc(bare, right),
    }


def train(llm: LLM, prompts: Sequence[Sequence[int]], config: Config, out: Path, show: Report) -> dict[str, Any]:
    """Train a filter for `llm` on its own answers to `prompts` (ids), write it to `out`, and return facts about it.

    Raises IncompatibleError for a model that fills no canvases or names no end token.
    """
    caps = llm.model.capabilities
    if caps.kind != "masked" or not caps.eos_ids:
        raise IncompatibleError(
            f"recipe 'learn2pd' needs a model that fills canvases and names an end token; {llm.name!r} does not",
            field="model",
        )
    if caps.block is not None and caps.block != config.block:
        raise out_of_range("train.block", config.block, f"{caps.block}, the blocks that the model was trained on")
    records, counts = replay(llm.engine, MethodContext(llm.name, llm.model, llm.tokenizer), prompts, config, show)
    learn, stop, test = split(records, config.seed)
    model, steps = fit(learn, stop, config, show)
    facts: dict[str, Any] = {
        "recipe": "learn2pd",
        "target": llm.name,
        "prompts": int(records.prompt.max()) + 1,
        "records": len(records.inputs),
        "steps": steps,
        "seed": config.seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        **counts,
        "tau_1_percent": tau_for(model, stop),
        **{name: round(value, 4) for name, value in measure(model, test).items()},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    model.save(out, identity(llm.model, llm.name), caps.eos_ids[0], facts)
    return {**facts, "path": str(out), "bytes": out.stat().st_size}


def tasks(llm: LLM, count: int, canvas: int, seed: int) -> list[list[int]]:
    """Prompts (ids) for a model: tasks of the worlds' training split for the small models, else chat messages.

    Raises ConfigError for a model without a tokenizer.
    """
    from random import Random

    from hasten.train.self_text import prompts

    if llm.tokenizer is None:
        raise ConfigError(f"model {llm.name!r} has no tokenizer to write prompts with", field="model")
    if not Path(llm.name).name.startswith("mini-"):
        return [llm.tokenizer.chat([{"role": "user", "content": text}]) for text in prompts(count, seed)]
    from hasten.worlds import WORLDS, split_of

    rng, found = Random(f"learn2pd {seed}"), []  # noqa: S311 - tasks, not secrets
    sized = [(world, sizes) for world in WORLDS.values() if (sizes := world.fitting(canvas))]
    for i in range(100 * count):
        world, sizes = sized[i % len(sized)]
        prompt = world.generate(rng, world.difficulty(rng.choice(sizes))).prompt
        if split_of(prompt) == "train" and prompt not in found:
            found.append(prompt)
        if len(found) == count:
            break
    return [llm.tokenizer.encode(prompt) for prompt in found]
