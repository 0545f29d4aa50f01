"""What `hasten train` runs: from a model's name to a drafter's file, in stages that each resume where they were cut."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from hasten.draft._trigrams import Trigrams, fingerprint
from hasten.errors import IncompatibleError, out_of_range, unknown_name
from hasten.models.feature import FeatureModel, Kind, identity
from hasten.models.fetch import cache_dir
from hasten.models.heads import MedusaHeads
from hasten.models.native import as_transformer
from hasten.models.pseudo import Guesser, TrainedInputs, TransferMaps
from hasten.models.small import Shape, SmallLM
from hasten.models.stack import DecoderStack
from hasten.models.transformer import Transformer
from hasten.train import ahead
from hasten.train import align as aligning
from hasten.train import features as training
from hasten.train import parallel_filter as filtering
from hasten.train.self_text import Texts, prompts, write

if TYPE_CHECKING:
    from hasten.llm import LLM

RECIPES = {
    "eagle": "one decoder layer that continues the model's hidden states (EAGLE)",
    "fspad": "EAGLE's layer with feature sampling and partial alignment (FSPAD)",
    "medusa": "heads that guess the next tokens from the model's last state (Medusa)",
    "hidden-transfer": "maps of an inner state to those of the next tokens (hidden transfer)",
    "lud": "inputs and an adapter for tokens not known yet (lexical unit decoding)",
    "tvdpp": "a small draft model, pretrained and then aligned with the model by an acceptance loss (TVD++)",
    "aded": "statistics of three tokens in a row over the model's own answers (ADED); seconds, once these are written",
    "learn2pd": "a filter of confidences that says which predictions are final (Learn2PD), for masked models",
}
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Recipe:
    """Sizes of a training: `texts` answers of at most `answer` tokens, `vocab` ids drafted, `steps` of `tokens` tokens.

    `heads` is the number of Medusa's. `ahead` tokens are guessed by hidden transfer, from the layer at the share `entry` of
    the stack on, and by LUD, whose units hold while the model is sure by `alpha`.
    TVD++ takes half of the steps to pretrain and half to align by `loss` ("none": it is left as pretrained).
    Learn2PD fills canvases of `canvas` tokens for `prompts` prompts.
    """

    texts: int = 1600
    answer: int = 160
    vocab: int = 8192
    steps: int = 1200
    tokens: int = 2048
    held_out: int = 60
    heads: int = 4
    ahead: int = 3
    entry: float = 0.5
    alpha: float = 0.9
    seed: int = 0
    loss: str = "tvdpp"
    prompts: int = 120
    canvas: int = 128

    def __post_init__(self) -> None:
        for name, least in (
            ("texts", 8),
            ("answer", 4),
            ("vocab", 16),
            ("steps", 1),
            ("tokens", 64),
            ("held_out", 1),
            ("heads", 1),
            ("ahead", 1),
            ("prompts", 8),
            ("canvas", 8),
        ):
            if getattr(self, name) < least:
                raise out_of_range(f"train.{name}", getattr(self, name), f"at least {least}")
        if not 0 <= self.entry <= 1:
            raise out_of_range("train.entry", self.entry, "in [0, 1]")
        ahead.check_alpha(self.alpha)
        if self.held_out >= self.texts:
            raise out_of_range("train.held_out", self.held_out, f"below texts = {self.texts}")
        if self.loss != "none":
            aligning.named(self.loss)


def train(
    slug: str,
    llm: LLM,
    recipe: Recipe,
    *,
    out: Path | None = None,
    work: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train the drafter `slug` for `llm` and return facts about it: its file, bytes, held-out agreement, seconds.

    The layer is written to `out` (default: where the method looks for it; that of `tvdpp` by another loss beside it),
    everything that lets a cut run go on to `work`.
    Raises UnknownNameError for a recipe there is none of, IncompatibleError for a model it cannot train on.
    """
    if slug not in RECIPES:
        raise unknown_name("recipe", slug, RECIPES)
    if slug not in ("aded", "learn2pd") and not isinstance(llm.model, DecoderStack):
        raise IncompatibleError(
            f"recipe {slug!r} needs a model of hasten's own decoder stack; {llm.name!r} runs on {llm.model.name!r}",
            field="model",
        )
    show = progress or (lambda what, done, total: None)
    started = time.perf_counter()
    place = identity(llm.model, llm.name)
    work = work or cache_dir() / "train" / place
    work.mkdir(parents=True, exist_ok=True)
    other = slug == "tvdpp" and recipe.loss != "tvdpp"  # something to compare with: the method does not look for it
    name = f"{slug}-{recipe.loss}" if other else slug
    out = out or cache_dir() / "drafters" / place / f"{name}.safetensors"
    out.parent.mkdir(parents=True, exist_ok=True)
    if slug == "learn2pd":
        size = filtering.Config(recipe.canvas, llm.model.capabilities.block or 32, recipe.steps, seed=recipe.seed)
        given = filtering.tasks(llm, recipe.prompts, recipe.canvas, recipe.seed)
        return {**filtering.train(llm, given, size, out, show), "seconds": round(time.perf_counter() - started, 1)}
    texts = self_text(llm, recipe, work, show)
    learnt, held = texts.split(min(recipe.held_out, len(texts) - 1))  # some prompts are too long and left out
    if slug == "aded":
        return {**count(llm, recipe, learnt, out), "seconds": round(time.perf_counter() - started, 1)}
    target = cast(Transformer, as_transformer(llm.model))
    if slug == "tvdpp":
        facts = aligned(llm, target, recipe, learnt, held, out, work, show)
        return {**facts, "seconds": round(time.perf_counter() - started, 1)}
    kept = training.frequent(learnt, recipe.vocab, target.config.vocab_size)
    if slug in ("hidden-transfer", "lud"):
        facts = {"recipe": slug, "target": llm.name, "texts": len(learnt), "tokens": len(learnt.ids), "seed": recipe.seed}
        facts |= guess_ahead(slug, target, recipe, learnt, held, kept, work / f"{slug}.checkpoint", out, show)
        return {**facts, "seconds": round(time.perf_counter() - started, 1)}
    data = _states("reading texts", target, learnt, show)
    model: FeatureModel | MedusaHeads
    loss: Callable[..., Any]
    if slug == "medusa":
        model, loss = MedusaHeads(target, kept, recipe.heads, torch.float32), training.medusa_loss
    else:
        model, loss = FeatureModel(cast(Kind, slug), target, kept, dtype=torch.float32).reset(recipe.seed), training.loss
    config = training.Config(steps=recipe.steps, tokens=recipe.tokens, seed=recipe.seed)
    show("training", 0, recipe.steps)
    training.fit(
        model, target, data, config, loss=loss,
        checkpoint=work / f"{slug}.checkpoint",
        report=lambda step, value, agreement: show("training", step, recipe.steps),
    )  # fmt: skip
    agreement = held_out(model, target, held, loss)
    facts = {
        "recipe": slug,
        "target": llm.name,
        "texts": len(learnt),
        "tokens": len(learnt.ids),
        "steps": recipe.steps,
        "seed": recipe.seed,
        "draft_vocabulary": len(kept),
        "vocabulary_covers": round(float(torch.isin(held.ids.long(), kept).float().mean()), 4),
        "parameters": sum(p.numel() for _, p in model.trained()),
        "agreement_by_depth": [round(value, 4) for value in agreement],
    }
    model.save(out, place, dict(facts))
    return {**facts, "path": str(out), "bytes": out.stat().st_size, "seconds": round(time.perf_counter() - started, 1)}


def guess_ahead(
    slug: str,
    target: Transformer,
    recipe: Recipe,
    learnt: Texts,
    held: Texts,
    kept: Tensor,
    checkpoint: Path | None,
    out: Path,
    show: Progress,
) -> dict[str, Any]:
    """Train what fills placeholders, the maps of hidden transfer or the inputs of LUD, and write it to `out`.

    Every step runs the whole target, so that a third of the steps of other layers is taken with half of the tokens, for
    LUD, whose placeholders pass through every layer, a quarter.
    """
    guesser: Guesser
    if slug == "hidden-transfer":
        at = round(recipe.entry * len(target.layers))
        guesser = TransferMaps(target, kept, (at,) * recipe.ahead, torch.float32)
        config = ahead.Config(share=0.5, seed=recipe.seed, **_shorter(recipe, 3))
    else:
        fresh = TrainedInputs(target, kept, recipe.ahead, 8, 16, torch.float32)
        guesser = fresh.reset(target, recipe.seed)
        sizes = _shorter(recipe, 4)
        config = ahead.Config(lr=2e-3, share=0.25, outside=0.5, alpha=recipe.alpha, seed=recipe.seed, **sizes)
    data = ahead.Marked(learnt, target, guesser, config, marked=slug == "lud")
    last = ahead.Marked(held, target, guesser, config, marked=False)
    before = ahead.agreement(target, guesser, last)
    show("training", 0, config.steps)
    with ahead.trainable(target):
        ahead.fit(
            guesser, target, data, config, checkpoint=checkpoint,
            report=lambda step, value, agreement: show("training", step, config.steps),
        )  # fmt: skip
    facts = {
        "steps": config.steps,
        "draft_vocabulary": len(kept),
        "vocabulary_covers": round(float(torch.isin(held.ids.long(), kept).float().mean()), 4),
        "parameters": sum(p.numel() for _, p in guesser.trained()),
        "untrained_by_depth": [round(value, 4) for value in before],
        "agreement_by_depth": [round(value, 4) for value in ahead.agreement(target, guesser, last)],
    }
    guesser.save(out, identity(target, ""), dict(facts))
    return {**facts, "path": str(out), "bytes": out.stat().st_size}


def _shorter(recipe: Recipe, by: int) -> dict[str, int]:
    return {"steps": max(1, recipe.steps // by), "tokens": max(64, recipe.tokens // 2), "warmup": 20}


def count(llm: LLM, recipe: Recipe, texts: Texts, out: Path) -> dict[str, Any]:
    """Count the statistics of `aded` over the texts and write them to `out`."""
    vocab = llm.model.capabilities.vocab_size
    table = Trigrams.build((ids.numpy() for ids, _ in texts.each()), vocab)
    table.save(out, fingerprint(llm.tokenizer, vocab))
    facts = {"recipe": "aded", "target": llm.name, "texts": len(texts), "tokens": len(texts.ids), "seed": recipe.seed}
    return {**facts, "pairs": len(table), "path": str(out), "bytes": out.stat().st_size}


def aligned(
    llm: LLM, target: Transformer, recipe: Recipe, learnt: Texts, held: Texts, out: Path, work: Path, show: Progress
) -> dict[str, Any]:
    """Pretrain a small draft model for `target`, align it, and write it to `out`; facts about it.

    One half of the held-out texts chooses the checkpoint, the other half measures it.
    """
    show("reading sources", 0, 1)
    text = aligning.corpus(llm.encode)
    kept = aligning.vocabulary(learnt, text, recipe.vocab, target.config.vocab_size)
    shape = Shape(hidden=min(Shape().hidden, target.config.hidden))
    model = SmallLM(target, kept, shape, torch.float32).reset(recipe.seed)
    half = max(1, recipe.steps // 2)
    config = aligning.Config(half, half, recipe.tokens, seed=recipe.seed)
    sources = (learnt.ids, text)
    aligning.pretrain(
        model, sources, config, work / f"tvdpp-pretrain-{recipe.seed}.checkpoint",
        lambda step, value: show("pretraining", step, config.pretrain),
    )  # fmt: skip
    choose, test = held.split(max(1, len(held) // 2)) if len(held) > 1 else (held, held)
    choosing, testing = ([one for batch in aligning.read(target, part) for one in batch] for part in (choose, test))
    teacher = aligning.Teacher(model, target)
    before = aligning.measure(model, teacher, testing)
    chosen = before
    if recipe.loss != "none":
        answers = _read(target, learnt, work / f"tvdpp-states-{len(learnt)}.safetensors", show)
        chosen = aligning.align(
            model, target, answers, choosing, sources, config, aligning.named(recipe.loss),
            work / f"tvdpp-{recipe.loss}-{recipe.seed}.checkpoint",
            lambda step, value, best: show("aligning", step, config.align),
        )  # fmt: skip
    facts = {
        "recipe": "tvdpp",
        "loss": recipe.loss,
        "target": llm.name,
        "texts": len(learnt),
        "tokens": len(learnt.ids) + len(text),
        "steps": [config.pretrain, config.align if recipe.loss != "none" else 0],
        "seed": recipe.seed,
        "draft_vocabulary": len(kept),
        "vocabulary_covers": round(float(torch.isin(held.ids.long(), kept).float().mean()), 4),
        "parameters": sum(p.numel() for _, p in model.trained()),
        "pretrained_acceptance": round(before, 4),
        "chosen_at_acceptance": round(chosen, 4),
        "acceptance": round(aligning.measure(model, teacher, testing), 4),
        "agreement_by_depth": [round(aligning.measure_best(model, teacher, testing), 4)],
    }
    model.save(out, identity(target, llm.name), dict(facts))
    return {**facts, "path": str(out), "bytes": out.stat().st_size}


def _read(target: Transformer, texts: Texts, path: Path, show: Progress) -> list[aligning.Answer]:
    """The target's states at the answers learnt from, kept in `path`."""
    if not path.exists():
        answers: list[aligning.Answer] = []
        for batch in aligning.read(target, texts, fast=True):
            answers += batch
            show("reading texts", len(answers), len(texts))
        aligning.save_answers(path, answers)
    return aligning.load_answers(path)


def self_text(llm: LLM, recipe: Recipe, work: Path, show: Progress) -> Texts:
    """The model's own answers, kept in `work` and continued there; shared by all recipes of a model."""
    path = work / f"texts-{recipe.texts}-{recipe.answer}-{recipe.seed}.safetensors"
    messages = prompts(recipe.texts, recipe.seed)
    texts = None
    show("writing texts", 0, len(messages))
    for texts in write(llm, messages, max_tokens=recipe.answer, path=path, seed=recipe.seed):
        show("writing texts", len(texts), len(messages))
    return texts if texts is not None else Texts.load(path)


def _states(what: str, target: Transformer, texts: Texts, show: Progress) -> list[tuple[torch.Tensor, torch.Tensor, int]]:
    data: list[tuple[torch.Tensor, torch.Tensor, int]] = []
    for batch in training.features(target, texts, fast=True):
        data += batch
        show(what, len(data), len(texts))
    return data


def held_out(
    model: FeatureModel | MedusaHeads, target: Transformer, texts: Texts, loss: Callable[..., Any], depth: int = 4
) -> list[float]:
    """How often the drafter's best token is the target's, one value per token ahead, a layer's own features fed back."""
    data = [one for batch in training.features(target, texts) for one in batch]
    config = training.Config(unroll=depth)
    sums, weight = [0.0] * (model.count if isinstance(model, MedusaHeads) else depth), 0.0
    with torch.no_grad():
        for start in range(0, len(data), 8):
            ids, states, mask = training.pad(data[start : start + 8])
            count = float(mask[:, 2:].sum())
            agreement = loss(model, target, ids, states, mask, config, None)[1]
            sums = [total + count * value for total, value in zip(sums, agreement, strict=True)]
            weight += count
    return [total / max(weight, 1.0) for total in sums]
