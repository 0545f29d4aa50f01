"""Keys of texts read before, for requests that begin alike: whole blocks of tokens, found through a chain of SHA-256.

A block's name hashes the name of the block before it and its own tokens; the first one follows a root made of the model,
the layout and type of its cache, and the tenant. Equal names are therefore equal texts of one tenant on one model, and no
request finds what another tenant left. Blocks are copies and never written to. They live on memory that rows leave over:
a row that needs it gets it at once, so that what is kept makes no request wait or fail.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import takewhile

import numpy as np
from torch import Tensor

from hasten.engine.cache import CachePool, RowCache

BLOCK = 32  # tokens; a text is kept and found in whole blocks


class PrefixStore:
    """Blocks of keys and values within `budget_bytes` of a pool, the least lately used given up first.

    `identity` names the model and everything that changes its numbers (rounding of weights and inputs).
    """

    def __init__(self, pool: CachePool, budget_bytes: int, identity: str) -> None:
        self._pool, self._identity = pool, identity
        self._block_bytes = pool.layout.nbytes(BLOCK)
        self._most = budget_bytes // self._block_bytes
        self._blocks: OrderedDict[bytes, Tensor] = OrderedDict()  # least lately used first, each before the ones it follows
        pool.reclaim = self.give_up

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return len(self._blocks) * self._block_bytes

    def names(self, tokens: Sequence[int], tenant: str) -> Iterator[bytes]:
        """The names of the whole blocks of a text, in order."""
        layout = self._pool.layout
        facts = [self._identity, layout.layers, layout.kv_heads, layout.head_dim, str(layout.dtype), BLOCK, tenant]
        name = hashlib.sha256(json.dumps(facts).encode()).digest()
        ids = np.asarray(tokens[: len(tokens) // BLOCK * BLOCK], "<i8")
        for block in ids.reshape(-1, BLOCK):
            name = hashlib.sha256(name + block.tobytes()).digest()
            yield name

    def fill(self, cache: RowCache, prompt: Sequence[int], tenant: str) -> int:
        """Start an empty row with the longest kept beginning of `prompt`; how many tokens that are.

        The last token of the prompt is left out: its logits are wanted.
        """
        found = list(takewhile(self._blocks.__contains__, self.names(prompt[:-1], tenant)))
        for i, name in enumerate(found):
            cache.slab[:, :, :, i * BLOCK : (i + 1) * BLOCK] = self._blocks[name]
        cache.advance(len(found) * BLOCK)
        self._touch(found)
        return len(found) * BLOCK

    def keep(self, cache: RowCache, tokens: Sequence[int], tenant: str) -> None:
        """Keep the whole blocks of a row whose committed slots hold the keys of `tokens`, as far as memory allows.

        Blocks with a number that is not finite are not kept, nor what follows them.
        """
        names = list(self.names(tokens[: cache.length], tenant))[: self._most]
        at = sum(1 for _ in takewhile(self._blocks.__contains__, names))
        self._touch(names[:at])
        own = set(names)
        while at < len(names) and self._room(own):
            block = cache.slab[:, :, :, at * BLOCK : (at + 1) * BLOCK].clone()
            if block.is_floating_point() and not bool(block.isfinite().all()):
                break
            self._pool.lend(self._block_bytes)
            self._blocks[names[at]] = block
            at += 1
        self._touch(names[:at])

    def _room(self, own: set[bytes]) -> bool:
        """Make room for one more block, at the cost of blocks that are not in `own`; whether there is."""
        while len(self._blocks) >= self._most or self._pool.used_bytes + self._block_bytes > self._pool.budget_bytes:
            if not self._blocks or next(iter(self._blocks)) in own:
                return False
            self.give_up(1)
        return True

    def _touch(self, names: Sequence[bytes]) -> None:
        """These blocks of one chain were used now, the first of them last: it is given up after those that follow it."""
        for name in reversed(names):
            self._blocks.move_to_end(name)

    def give_up(self, nbytes: int) -> None:
        """Free at least so many bytes, or all there are."""
        freed = 0
        while self._blocks and freed < nbytes:
            self._blocks.popitem(last=False)
            self._pool.lend(-self._block_bytes)
            freed += self._block_bytes
