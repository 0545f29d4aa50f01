"""What drafters with a draft model share: how they come by it, and the chain it writes ahead."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from hasten.engine.contracts import EMPTY_DRAFT, NO_NEEDS, Draft, Draws, Feedback, MethodContext, Needs, RowView
from hasten.engine.sampling import choice_seed, draw, uniform
from hasten.errors import ConfigError
from hasten.models.assistant import Assistant, check_vocabularies
from hasten.models.load import load

_STREAM = 1 << 31  # seeds of the draft's draws, apart from those of acceptance and of plain sampling
_Chain = tuple[list[int], list[float], dict[int, Tensor]]


def open_assistant(slug: str, name: str, cache_mb: int, context: MethodContext) -> Assistant:
    """The draft model `name`, loaded in the target's precision and checked against its vocabulary.

    Raises ConfigError when no name is given, IncompatibleError naming the first token that differs, and as `load` does.
    """
    if not name:
        raise ConfigError(
            f"{slug}.model is empty; {slug}.model must name the draft model",
            hint=f"--method {slug}:model=NAME",
            field=f"{slug}.model",
        )
    dtype = str(getattr(context.backbone, "dtype", "auto")).removeprefix("torch.")
    loaded = load(name, dtype=dtype)
    size = context.capabilities.vocab_size
    check_vocabularies(context.tokenizer, loaded.tokenizer, size, loaded.model.capabilities.vocab_size, name)
    loaded.model.pack()
    return Assistant(loaded.model, size, cache_mb * 1_000_000)


class Chain:
    """Chains of at most `nodes` tokens from `assistant`; with `sample` they carry the distributions they were drawn from.

    `temperature` is the draft's (below 0: the request's). A chain of best tokens less likely than `floor` grows no
    further; a sampled one must not be cut by its tokens, and never is.
    """

    name = "chain"
    needs: Needs = NO_NEEDS
    scope: Literal["row", "shared"] = "row"

    def __init__(self, assistant: Assistant, nodes: int, sample: bool, temperature: float, floor: float = 0.0) -> None:
        self.assistant, self.nodes, self.sample = assistant, nodes, sample
        self.temperature, self.floor = temperature, floor
        self.draws: Draws = "swor" if sample else "point"

    def max_nodes(self, budget: int) -> int:
        """The configured length, or the budget if that is less."""
        return min(self.nodes, budget)

    def open(self, row: int, prompt: Sequence[int]) -> None:
        """The draft model follows the row."""
        self.assistant.open(row)

    def close(self, row: int) -> None:
        """The draft model forgets the row."""
        self.assistant.close(row)

    def observe(self, feedback: Sequence[Feedback]) -> None:
        """Nothing to learn: the draft model reads the committed text before the next draft."""

    def propose(self, rows: Sequence[RowView], budgets: Sequence[int]) -> Sequence[Draft]:
        """One chain per row; all rows advance together, one pass of the draft model per token."""
        lengths = [self.max_nodes(budget) for budget in budgets]
        asked = [i for i, length in enumerate(lengths) if length]
        chains: dict[int, _Chain] = {}
        growing: list[int] = []
        if asked:
            most = max(lengths)
            for i, logits in zip(asked, self.assistant.begin([rows[i] for i in asked], most, most), strict=True):
                if logits is not None:
                    chains[i] = ([], [], {})
                    if self._next(chains[i], logits, rows[i]):
                        growing.append(i)
            for step in range(1, most):
                growing = [i for i in growing if step < lengths[i]]
                if not growing:
                    break
                asks = [(rows[i].id, [chains[i][0][-1]], [step - 2]) for i in growing]
                answers = zip(growing, self.assistant.grow(asks), strict=True)
                growing = [i for i, logits in answers if self._next(chains[i], logits[0], rows[i])]
        drafts = []
        for i in range(len(rows)):
            tokens, scores, q = chains.get(i, ([], [], {}))
            parents = tuple(range(-1, len(tokens) - 1))
            # scores would let the engine cut a chain by its own tokens, which biases rejection sampling
            known = tuple(scores) if self.draws == "point" else None
            drafts.append(Draft(tuple(tokens), parents, q or None, scores=known) if tokens else EMPTY_DRAFT)
        return drafts

    def _next(self, chain: _Chain, logits: Tensor, row: RowView) -> bool:
        """One more token of a chain, from logits [vocab]; whether another may follow."""
        tokens, scores, q = chain
        temperature = row.temperature if self.temperature < 0 else self.temperature
        judged = self.sample and row.temperature > 0  # by rejection, which asks what the token was drawn from
        if judged and temperature > 0:
            share = (logits.float() / temperature).softmax(-1)
            token = draw(share, uniform(choice_seed(row.seed, _STREAM), len(row.tokens) + len(tokens)))
            q[len(tokens) - 1] = share
        else:
            share = logits.float().softmax(-1)
            token = int(share.argmax())
            if math.prod(scores) * float(share[token]) < self.floor:
                return False
            if judged:
                q[len(tokens) - 1] = torch.zeros_like(share).index_fill_(0, share.argmax(), 1.0)
        tokens.append(token)
        scores.append(min(1.0, float(share[token])))
        return True

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing is learnt."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to restore."""
