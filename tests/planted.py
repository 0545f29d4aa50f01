"""Methods planted in the registry for a test: a drafter that is believed unverified, and a slowed one."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from types import ModuleType

import pytest

from hasten import registry
from hasten.draft import prompt_lookup
from hasten.engine.contracts import EMPTY_DRAFT, Draft
from hasten.types import MethodCard


@dataclass(frozen=True)
class Config:
    """No settings."""


class Trusting(prompt_lookup.PromptLookup):
    """Drafts the token 9 and asks that it be believed."""

    law = "trust"

    def __init__(self, config, context) -> None:
        super().__init__(prompt_lookup.Config(), context)

    def propose(self, rows, budgets):
        return [Draft((9,), (-1,), scores=(0.99,)) if budget else EMPTY_DRAFT for budget in budgets]


class Slowed(prompt_lookup.PromptLookup):
    """Prompt lookup after a rest."""

    def __init__(self, config, context) -> None:
        super().__init__(prompt_lookup.Config(), context)

    def propose(self, rows, budgets):
        time.sleep(0.05)
        return super().propose(rows, budgets)


def plant(monkeypatch: pytest.MonkeyPatch, **methods: tuple[type, str]) -> None:
    """Make slug=(class, exactness) methods of the registry until the test ends."""
    found = dict(registry.modules())
    for slug, (cls, exactness) in methods.items():
        module = ModuleType(f"planted_{slug}")
        module.card = MethodCard(
            slug, slug, "", "2026-01", "draft", exactness, "It is planted.", "Ever.", needs=("causal",)
        )
        module.Config, module.method = Config, cls
        monkeypatch.setitem(sys.modules, module.__name__, module)
        found[slug] = module.__name__
    monkeypatch.setattr(registry, "modules", lambda: found)
