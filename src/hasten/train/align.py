"""Training of a small draft model for a target (2403.00858): pretraining on text, then distillation on its answers.

The teacher is exact: a target's final states at its answers' tokens and the log-sum-exp of its logits are read once, and
every step makes p of them anew over the draft vocabulary; nothing is cut off or spread. Each step's batch depends on the
seed and the step alone, statistics of TVD++ are taken over the whole step, and prompts and padding enter nothing.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from hasten.engine.contracts import Needs, RowInput
from hasten.errors import ConfigError, HastenError, out_of_range
from hasten.models.small import SmallLM
from hasten.models.transformer import Transformer
from hasten.train import loop
from hasten.train.losses import LOSSES, Objective, acceptance
from hasten.train.self_text import Texts

_SOURCES = (
    "abc argparse base64 cmd code codecs collections concurrent.futures configparser contextlib copy dataclasses datetime "
    "decimal email.message fileinput functools getopt glob gzip http.client http.server imaplib inspect io ipaddress "
    "linecache mailbox mimetypes netrc ntpath numbers operator os pathlib pdb pickle pkgutil platform plistlib pprint "
    "profile queue re reprlib selectors shutil smtplib ssl stat subprocess symtable tarfile tempfile threading timeit "
    "trace types urllib.parse urllib.request uuid warnings wave weakref xml.dom.minidom zipapp"
)


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of both stages: `pretrain` and `align` steps of `tokens` tokens, the first ones in windows of `length`.

    `share` of an aligning step are the target's answers, the rest is text for next-token loss. Held-out acceptance is
    measured every `measure` aligning steps; the best checkpoint is kept.
    """

    pretrain: int = 600
    align: int = 600
    tokens: int = 2048
    length: int = 256
    lr: float = 4e-3
    align_lr: float = 2e-3
    warmup: int = 40
    share: float = 0.9
    measure: int = 50
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("pretrain", "align", "tokens", "length", "measure"):
            if getattr(self, name) < 1:
                raise out_of_range(f"train.{name}", getattr(self, name), "at least 1")
        for name in ("lr", "align_lr", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise out_of_range(f"train.{name}", getattr(self, name), "above 0")
        if not 0 < self.share <= 1:
            raise out_of_range("train.share", self.share, "in (0, 1]")


@dataclass(frozen=True, slots=True)
class Answer:
    """A text `ids` int64 [T] of which the tokens from `start` on are the target's, with what it thought of each.

    `states` [T - start, hidden] are the target's final states before them, `total` [T - start] its logits' log-sum-exp.
    """

    ids: Tensor
    start: int
    states: Tensor
    total: Tensor


# --- what is learnt from -------------------------------------------------------------------------------------------


def corpus(encode: Callable[[str], list[int]]) -> Tensor:
    """Token ids int32 of sources and documentation of the standard library, for pretraining; no prompt of the suites."""
    ids: list[int] = []
    for name in _SOURCES.split():
        try:
            ids += encode(inspect.getsource(import_module(name))[:60_000])
        except (ImportError, OSError):  # not part of this Python, or without a source
            continue
    topics = import_module("pydoc_data.topics").topics
    for name in sorted(topics):
        ids += encode(topics[name])
    return torch.tensor(ids, dtype=torch.int32)


def vocabulary(texts: Texts, extra: Tensor, count: int, vocab: int) -> Tensor:
    """The `count` most frequent ids int64, ascending; the target's texts weigh three quarters, the `extra` one quarter."""
    often = torch.zeros(vocab, dtype=torch.float64)
    for ids, weight in ((texts.ids, 0.75), (extra, 0.25)):
        if len(ids):
            often += weight / len(ids) * torch.bincount(ids.long(), minlength=vocab)
    best = torch.sort(often, descending=True, stable=True).indices[: min(count, vocab)]
    return best.sort().values


def read(target: Transformer, texts: Texts, tokens: int = 2048, fast: bool = False) -> Iterator[list[Answer]]:
    """Batches of the texts with the target's states at their answers, `tokens` tokens a pass, in order.

    `fast` computes the states in bfloat16 (for those learnt from; acceptance is measured on exact ones). Raises
    HastenError when the target's logits are not finite.
    """
    told = [one for one in texts.each() if 1 <= one[1] < len(one[0])]  # in the others nothing was answered
    store = torch.empty(sum(len(ids) - prompt for ids, prompt in told), target.config.hidden)
    batch: list[tuple[Tensor, int]] = []
    at = 0
    for i, one in enumerate(told):
        batch.append(one)
        if i + 1 == len(told) or sum(len(ids) for ids, _ in batch) + len(told[i + 1][0]) > tokens:
            size = sum(len(ids) - prompt for ids, prompt in batch)
            yield _answers(target, batch, fast, store[at : at + size])
            batch, at = [], at + size


def _answers(target: Transformer, batch: list[tuple[Tensor, int]], fast: bool, store: Tensor) -> list[Answer]:
    """The answers of one pass; their states are written to `store` [answer tokens, hidden]."""
    rows = [RowInput(ids, torch.arange(len(ids)), logits="none") for ids, _ in batch]
    with torch.autocast("cpu", torch.bfloat16, enabled=fast):
        done = target.run(rows, Needs(final_hidden=True))
    assert done.final_hidden is not None  # noqa: S101 - asked for
    counts = [len(ids) - prompt for ids, prompt in batch]
    for (_, prompt), (a, b), states in zip(batch, done.spans, store.split(counts), strict=True):
        states.copy_(done.final_hidden[a + prompt - 1 : b - 1])
    total = _log_sum_exp(target, store)
    if not bool(torch.isfinite(total).all()):
        raise HastenError("the target's logits are not finite", hint="check the model file; try dtype='float32'")
    parts = zip(batch, store.split(counts), total.split(counts), strict=True)
    return [Answer(ids, prompt, states, own) for (ids, prompt), states, own in parts]


_ROWS = 256  # logits of so many tokens at once, always: pieces of any size, freed and asked for anew, break up the memory


@torch.no_grad()
def _log_sum_exp(target: Transformer, states: Tensor) -> Tensor:
    """Log-sum-exp [N] of the target's logits after final states [N, hidden]."""
    padded = F.pad(states, (0, 0, 0, -len(states) % _ROWS)).to(target.dtype)
    return torch.cat([target.logits(some).logsumexp(-1) for some in padded.split(_ROWS)])[: len(states)]


def save_answers(path: Path, answers: Sequence[Answer]) -> None:
    """Write what `read` gave to a safetensors file, at once or not at all."""
    part = path.with_suffix(".part")
    state = {
        "ids": torch.cat([one.ids for one in answers]).int(),
        "lengths": torch.tensor([len(one.ids) for one in answers]),
        "starts": torch.tensor([one.start for one in answers]),
        "states": torch.cat([one.states for one in answers]),
        "total": torch.cat([one.total for one in answers]),
    }
    save_file(state, part)
    part.replace(path)


def load_answers(path: Path) -> list[Answer]:
    """Read what `save_answers` wrote."""
    state = load_file(path)
    lengths, starts = state["lengths"].tolist(), state["starts"].tolist()
    counts = [length - start for length, start in zip(lengths, starts, strict=True)]
    parts = (state["ids"].long().split(lengths), starts, state["states"].split(counts), state["total"].split(counts))
    return [Answer(*one) for one in zip(*parts, strict=True)]


# --- stages --------------------------------------------------------------------------------------------------------


def pretrain(
    model: SmallLM,
    sources: Sequence[Tensor],
    config: Config,
    checkpoint: Path | None = None,
    report: Callable[[int, float], None] | None = None,
    every: int = 100,
) -> None:
    """Stage 1: next-token loss on windows drawn from each of the `sources` (int [N] ids) in turn."""
    index = _index(model)
    sources = [ids for ids in sources if len(ids) > config.length]
    if not sources:
        raise ConfigError(f"no text to learn from holds more than {config.length} tokens", field="train.length")

    def loss(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        ids = _windows(sources, max(1, config.tokens // config.length), config.length, step, generator)
        with torch.autocast("cpu", torch.bfloat16):
            return _next_token(model, ids, index)

    pace = loop.Pace(config.pretrain, config.lr, config.warmup, config.clip)
    own = {name: value for name, value in asdict(config).items() if name not in _ALIGN}
    facts = str({"stage": "pretrain", "ids": sum(map(len, sources)), **_sizes(model), **own})
    loop.run(model.trained(), pace, loss, loop.Keep(checkpoint, every, facts), report)


_ALIGN = ("align", "align_lr", "share", "measure")  # settings that pretraining does not depend on


def align(
    model: SmallLM,
    target: Transformer,
    answers: Sequence[Answer],
    held: Sequence[Answer],
    sources: Sequence[Tensor],
    config: Config,
    objective: Objective,
    checkpoint: Path | None = None,
    report: Callable[[int, float, float], None] | None = None,
) -> float:
    """Stage 3: `objective` on the answers beside next-token loss on the `sources`; `report(step, loss, best acceptance)`.

    The model is left with the weights of the best acceptance on `held`, which is returned; it may be stage 1's own.
    """
    if not answers or not held:
        raise ConfigError("no answers to learn from, or none held out", hint="raise train.texts", field="train.texts")
    index, teacher = _index(model), Teacher(model, target)
    sources = [ids for ids in sources if len(ids) > 1]
    spare = round(config.tokens * (1 - config.share)) if sources else 0
    memory: dict[str, Tensor] = {}

    def loss(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + 500_009 + step)
        batch, size = [], 0
        while size < config.tokens - spare:
            batch.append(answers[int(torch.randint(len(answers), (1,), generator=generator))])
            size += len(batch[-1].ids)
        p = teacher(batch)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model.draft_logits(_states(model, batch))
            value = objective(p, logits, None, generator)
            if spare > 1:
                longest = min(spare, max(len(ids) for ids in sources) - 1)
                fitting = [ids for ids in sources if len(ids) > longest]
                extra = _next_token(model, _windows(fitting, 1, longest, step, generator), index)
                value = config.share * value + (1 - config.share) * extra
        return value

    def after(step: int, value: float) -> None:
        if step % config.measure == 0 or step == config.align:
            _remember(memory, model, measure(model, teacher, held))
        if report is not None:
            report(step, value, float(memory["best"]))

    _remember(memory, model, measure(model, teacher, held))
    facts = str({"stage": "align", "ids": _count(answers), **_sizes(model), **asdict(config), **asdict(objective)})
    pace = loop.Pace(config.align, config.align_lr, config.warmup, config.clip)
    loop.run(model.trained(), pace, loss, loop.Keep(checkpoint, config.measure, facts, memory), after)
    for name, p in model.trained():
        p.data.copy_(memory[f"best.{name}"])
    return float(memory["best"])


def _sizes(model: SmallLM) -> dict[str, int]:
    return {**asdict(model.shape), "vocab": len(model.kept)}


def _remember(memory: dict[str, Tensor], model: SmallLM, share: float) -> None:
    if "best" not in memory or share > float(memory["best"]):
        memory["best"] = torch.tensor(share, dtype=torch.float64)
        memory |= {f"best.{name}": p.detach().clone() for name, p in model.trained()}


class Teacher:
    """The target's probabilities over the vocabulary that `model` drafts; they sum to 1 less what lies outside it."""

    def __init__(self, model: SmallLM, target: Transformer) -> None:
        self.rows = model.rows.float()
        self.cap = target.config.logit_softcap

    @torch.no_grad()
    def __call__(self, batch: Sequence[Answer]) -> Tensor:
        """p [N, draft vocab] at all answer tokens of a batch, in order."""
        states = torch.cat([one.states for one in batch])
        logits = states @ self.rows.T
        if self.cap is not None:
            logits = self.cap * torch.tanh(logits / self.cap)
        return (logits - torch.cat([one.total for one in batch])[:, None]).exp_()


@torch.no_grad()
def measure(model: SmallLM, teacher: Teacher, answers: Sequence[Answer], tokens: int = 2048) -> float:
    """The mean of sum_x min(p, q) over all answer tokens: the chance that a sampled draft token is accepted."""
    return sum(share for share, _ in _batched(model, teacher, answers, tokens)) / _count(answers)


@torch.no_grad()
def measure_best(model: SmallLM, teacher: Teacher, answers: Sequence[Answer], tokens: int = 2048) -> float:
    """How often the draft's best token is the target's (of those it can draft)."""
    return sum(best for _, best in _batched(model, teacher, answers, tokens)) / _count(answers)


def _count(answers: Sequence[Answer]) -> int:
    return sum(len(one.total) for one in answers)


def _batched(model: SmallLM, teacher: Teacher, answers: Sequence[Answer], tokens: int) -> Iterator[tuple[float, float]]:
    batch: list[Answer] = []
    for i, one in enumerate(answers):
        batch.append(one)
        if i + 1 == len(answers) or sum(len(each.ids) for each in batch) >= tokens:
            p, logits = teacher(batch), model.draft_logits(_states(model, batch))
            yield float(acceptance(p, logits)) * len(p), float((p.argmax(-1) == logits.argmax(-1)).float().sum())
            batch = []


def _states(model: SmallLM, batch: Sequence[Answer]) -> Tensor:
    """The draft model's states [N, d] before all answer tokens of a batch, in order."""
    ids = torch.zeros(len(batch), max(len(one.ids) for one in batch) - 1, dtype=torch.int64)
    answered = torch.zeros(ids.shape, dtype=torch.bool)
    for i, one in enumerate(batch):
        ids[i, : len(one.ids) - 1] = one.ids[:-1]
        answered[i, one.start - 1 : len(one.ids) - 1] = True
    return model.dense(ids)[answered]


def _index(model: SmallLM) -> Tensor:
    """Target id -> column of the draft vocabulary, -100 (ignored by the loss) where there is none."""
    index = torch.full((model.capabilities.vocab_size,), -100)
    index[model.kept] = torch.arange(len(model.kept))
    return index


def _windows(sources: Sequence[Tensor], count: int, length: int, step: int, generator: torch.Generator) -> Tensor:
    """ids int64 [count, length + 1], from the sources in turn."""
    out = []
    for i in range(count):
        ids = sources[(step * count + i) % len(sources)]
        at = int(torch.randint(len(ids) - length, (1,), generator=generator))
        out.append(ids[at : at + length + 1].long())
    return torch.stack(out)


def _next_token(model: SmallLM, ids: Tensor, index: Tensor) -> Tensor:
    logits = model.draft_logits(model.dense(ids[:, :-1]))
    wanted = index[ids[:, 1:]].flatten()
    if not bool((wanted >= 0).any()):
        return logits.sum() * 0
    return F.cross_entropy(logits.flatten(0, 1), wanted)


def named(loss: str) -> Objective:
    """The objective of a recipe by its name: one of the losses, or "mixed", half TVD++ and half KLD."""
    if loss != "mixed" and loss not in LOSSES:
        raise out_of_range("train.loss", loss, "one of " + ", ".join((*LOSSES, "mixed")))
    return Objective(kld=0.5) if loss == "mixed" else Objective(loss)
