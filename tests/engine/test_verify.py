"""Verification laws on a target whose distribution is known exactly, with a negative control that must fail."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from drafters import Sampled
from torch import Tensor

from hasten.engine.contracts import Draft, RowView
from hasten.engine.sampling import Sampler
from hasten.engine.verify import check_draft, check_law, depths, verify
from hasten.errors import ConfigError
from hasten.types import SamplingParams

V, TRIALS = 5, 6000
LOGITS = torch.randn(V, V, generator=torch.Generator().manual_seed(0)) * 1.2  # row = last token
Q = torch.randn(V, V, generator=torch.Generator().manual_seed(1)).softmax(-1)


def target(text: Sequence[int]) -> Tensor:
    return LOGITS[text[-1]]


def q(text: Sequence[int]) -> Tensor:
    return Q[text[-1]]


def pairs(law: str, draws: str, width: int, biased: bool = False) -> Counter[tuple[int, int]]:
    """Empirical counts of the first two emitted tokens over many independently seeded rows."""
    counts: Counter[tuple[int, int]] = Counter()
    drafter = Sampled(q, draws, width, 2, seed=5)
    for trial in range(TRIALS):
        sampler = Sampler(SamplingParams(temperature=1.0), trial, (2,), V)
        text = [2]
        while len(text) < 3:
            draft = drafter.draft(RowView(0, text, 9, 1.0, trial), 99)
            if biased:  # judged as if each child had been the only, certain proposal of a smaller q
                draft = Draft(draft.tokens, draft.parents, {k: v**2 / (v**2).sum() for k, v in draft.q.items()})
            rows = [target(text)]
            for i in range(len(draft)):
                chain, at = [], i
                while at >= 0:
                    chain.insert(0, draft.tokens[at])
                    at = draft.parents[at]
                rows.append(target([*text, *chain]))
            verdict = verify(law, torch.stack(rows), draft, sampler, len(text), draws)
            text += [*(draft.tokens[node] for node in verdict.path), verdict.next]
        counts[(text[1], text[2])] += 1
    return counts


def chi_square(counts: Counter[tuple[int, int]]) -> float:
    p = LOGITS.softmax(-1)
    expected = {(a, b): TRIALS * float(p[2, a] * p[a, b]) for a, b in itertools.product(range(V), repeat=2)}
    return sum((counts[key] - e) ** 2 / e for key, e in expected.items())


CRITICAL = 42.98  # chi-square, 24 degrees of freedom, 1 %


@pytest.mark.parametrize(("law", "draws", "width"), [
    ("rejection", "iid", 1), ("rejection", "iid", 3), ("rejection", "swor", 3), ("rejection", "swor", V),
    ("rejection", "point", 2), ("match", "point", 3),
])  # fmt: skip
def test_emitted_pairs_follow_the_target(law: str, draws: str, width: int) -> None:
    if draws == "point":
        torch.manual_seed(0)
    sampled = "swor" if draws == "point" else draws
    if draws != "point":
        assert chi_square(pairs(law, draws, width)) < CRITICAL
        return
    # deterministic children: the same `width` tokens under every node, judged as point masses or by matching
    counts: Counter[tuple[int, int]] = Counter()
    assert sampled
    for trial in range(TRIALS):
        sampler = Sampler(SamplingParams(temperature=1.0), trial, (2,), V)
        text = [2]
        while len(text) < 3:
            tokens = tuple(range(width))
            draft = Draft(tokens, (-1,) * width)
            rows = torch.stack([target(text), *(target([t]) for t in tokens)])
            verdict = verify(law, rows, draft, sampler, len(text), draws)
            text += [*(draft.tokens[node] for node in verdict.path), verdict.next]
        counts[(text[1], text[2])] += 1
    assert chi_square(counts) < CRITICAL


def test_a_biased_verifier_is_caught() -> None:
    assert chi_square(pairs("rejection", "iid", 2, biased=True)) > 2 * CRITICAL


def test_equal_distributions_are_always_accepted() -> None:
    draft = Draft((3,), (-1,), {-1: LOGITS[2].softmax(-1)})
    for seed in range(300):
        sampler = Sampler(SamplingParams(temperature=1.0), seed, (2,), V)
        assert verify("rejection", torch.stack((LOGITS[2], LOGITS[3])), draft, sampler, 1, "iid").path == (0,)


def test_two_tokens_without_replacement_always_accept() -> None:
    logits = torch.tensor([[0.3, -0.4]] * 3)
    for seed, order in itertools.product(range(300), ((0, 1), (1, 0))):
        draft = Draft(order, (-1, -1), {-1: torch.tensor([0.9, 0.1])})
        sampler = Sampler(SamplingParams(temperature=1.0), seed, (0,), 2)
        assert len(verify("rejection", logits, draft, sampler, 1, "swor").path) == 1


def test_permuting_siblings_does_not_change_greedy_output() -> None:
    sampler = Sampler(SamplingParams(), 0, (2,), V)
    best = int(LOGITS[2].argmax())
    for order in itertools.permutations(range(V)):
        rows = torch.stack([LOGITS[2], *(LOGITS[t] for t in order)])
        verdict = verify("greedy", rows, Draft(order, (-1,) * V), sampler, 1)
        assert order[verdict.path[0]] == best
        assert verdict.next == int(LOGITS[best].argmax())


def test_typical_keeps_the_deepest_plausible_path() -> None:
    flat, peaked = torch.zeros(V), torch.tensor([9.0, 0, 0, 0, 0])
    sampler = Sampler(SamplingParams(temperature=1.0, seed=1), 1, (2,), V)
    draft = Draft((1, 0, 2), (-1, 0, 1))
    verdict = verify("typical", torch.stack((flat, peaked, flat, peaked)), draft, sampler, 1)
    assert verdict.path == (0, 1, 2)
    verdict = verify("typical", torch.stack((peaked, flat, flat, flat)), draft, sampler, 1)
    assert verdict.path == ()  # token 1 is implausible after a peaked distribution


def test_bad_drafts_and_laws_are_named() -> None:
    with pytest.raises(ConfigError, match="budget of 1"):
        check_draft(Draft((1, 2), (-1, -1)), 1, V)
    with pytest.raises(ConfigError, match="vocabulary"):
        check_draft(Draft((V,), (-1,)), 4, V)
    with pytest.raises(ConfigError, match="parents come before"):
        check_draft(Draft((1,), (0,)), 4, V)
    with pytest.raises(ConfigError, match="2 tokens and 1 parents"):
        check_draft(Draft((1, 2), (-1,)), 4, V)
    with pytest.raises(ConfigError, match="distribution q"):
        check_law("rejection", "iid", Draft((1,), (-1,)))
    with pytest.raises(ConfigError, match="law"):
        check_law("sometimes", "point")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="shape"):
        sampler = Sampler(SamplingParams(temperature=1.0), 0, (2,), V)
        verify("rejection", LOGITS[:2], Draft((1,), (-1,), {-1: torch.ones(3)}), sampler, 1, "iid")
    assert depths((-1, 0, 0, 2)) == [1, 2, 2, 3]


def test_trust_takes_every_first_child_unseen_and_the_next_token_from_where_it_ends():
    sampler = Sampler(SamplingParams(), 0, (2,), V)
    best = LOGITS.argmax(-1).tolist()
    chain = Draft((0, 1, 4), (-1, 0, 1))
    rows = torch.stack([LOGITS[2], LOGITS[0], LOGITS[1], LOGITS[4]])
    verdict = verify("trust", rows, chain, sampler, 1)
    assert verdict.path == (0, 1, 2)
    assert verdict.next == best[4]
    tree = Draft((3, 0, 1), (-1, -1, 1))
    assert verify("trust", torch.stack([LOGITS[2], LOGITS[3], LOGITS[0], LOGITS[1]]), tree, sampler, 1).path == (0,)
    assert verify("trust", LOGITS[2][None], Draft(), sampler, 1).next == best[2]
    check_law("trust", "point", chain)
