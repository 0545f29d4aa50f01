"""KV memory: slabs preallocated per row, reused between requests, addressed by slot.

A slab is one tensor [layers, 2, kv_heads, capacity, head_dim] (keys after rotary embedding, then values); layer i's keys
of the first S slots are `slab[i, 0, :, :S]`, contiguous per head. Slot and position are different numbers: a draft node
sits in slot `length + index` at position `length - 1 + depth` until the accepted path is gathered to the front.
Layers that are not plain KV (recurrent states, static cross memory, sparse keys) hang their own `LayerCache` on the row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from hasten.errors import MemoryFitError, out_of_range

_STEP = 64  # slab capacities are multiples of this many slots, so that freed slabs fit again


class LayerCache(Protocol):
    """State of one layer that is not a plain KV slab: `kv_sparse`, `recurrent` or `cross`.

    `truncate` may raise UnsupportedError (recurrent state cannot be cut); such a layer must offer snapshot and restore.
    """

    kind: str

    def advance(self, tokens: int) -> None:
        """Commit the first `tokens` positions of the last pass."""

    def gather(self, base: int, slots: Sequence[int]) -> None:
        """Keep only these slots of the last pass, in this order."""

    def truncate(self, length: int) -> None:
        """Forget everything after `length` positions."""

    def fork(self) -> LayerCache:
        """An independent copy."""

    def snapshot(self) -> Any:
        """A value that `restore` takes back."""

    def restore(self, snapshot: Any) -> None:
        """Return to a snapshot."""

    def nbytes(self) -> int:
        """Memory held, in bytes."""


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """Shape of one row's slab: `layers` KV layers of `kv_heads` x `head_dim` numbers of `dtype`."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    def nbytes(self, slots: int) -> int:
        """Bytes of a slab with this many slots."""
        return 2 * self.layers * self.kv_heads * self.head_dim * slots * self.dtype.itemsize


class RowCache:
    """The cache of one row: `length` committed slots of `capacity`; positions of slots in `positions` int64 [capacity]."""

    __slots__ = ("_pool", "capacity", "layers", "length", "others", "positions", "slab")

    def __init__(self, pool: CachePool, slab: Tensor) -> None:
        self._pool: CachePool | None = pool
        self.slab = slab
        self.capacity = slab.shape[3]
        self.positions = torch.arange(self.capacity)
        self.length = 0
        self.layers = [(layer[0], layer[1]) for layer in slab]  # (keys, values), each [kv_heads, capacity, head_dim]
        self.others: Mapping[int, LayerCache] = {}

    def reserve(self, start: int, positions: Tensor) -> int:
        """Note the positions of a pass's queries in slots start..; return the number of slots then visible.

        Raises MemoryFitError when they do not fit: the engine admits no row that could need more.
        """
        end = start + len(positions)
        if end > self.capacity:
            raise MemoryFitError(f"cache row holds {self.capacity} slots, the pass needs {end}")
        self.positions.numpy()[start:end] = positions.numpy()
        return max(end, self.length)

    def advance(self, tokens: int) -> None:
        """Commit the next `tokens` slots as they were written."""
        if tokens < 0 or self.length + tokens > self.capacity:
            raise out_of_range("tokens", tokens, f"in [0, {self.capacity - self.length}]")
        self.length += tokens
        for layer in self.others.values():
            layer.advance(tokens)

    def gather(self, base: int, slots: Sequence[int]) -> None:
        """Commit slots base + slots[j] as slots base, base + 1, ...; everything after is dead.

        This is how an accepted path of a draft tree becomes the row's text; slots already in place are not copied.
        """
        keep = list(slots)
        skip = 0
        while skip < len(keep) and keep[skip] == skip:
            skip += 1
        if skip < len(keep):
            index = torch.tensor(keep[skip:]) + base
            target = slice(base + skip, base + len(keep))
            self.slab[:, :, :, target] = self.slab[:, :, :, index]
            self.positions[target] = self.positions[index]
        self.length = base + len(keep)
        for layer in self.others.values():
            layer.gather(base, keep)

    def truncate(self, length: int) -> None:
        """Forget every slot from `length` on."""
        if not 0 <= length <= self.length:
            raise out_of_range("length", length, f"in [0, {self.length}]")
        self.length = length
        for layer in self.others.values():
            layer.truncate(length)

    def copy_from(self, other: RowCache) -> None:
        """Take over the committed slots of `other` (same layout); this is how n choices share one reading of a prompt.

        Raises MemoryFitError when they do not fit.
        """
        n = other.length
        if n > self.capacity:
            raise MemoryFitError(f"cache row holds {self.capacity} slots, the row to copy has {n}")
        self.slab[:, :, :, :n] = other.slab[:, :, :, :n]
        self.positions[:n] = other.positions[:n]
        self.length = n
        self.others = {i: layer.fork() for i, layer in other.others.items()}

    def fork(self, capacity: int | None = None) -> RowCache:
        """An independent row holding the same committed slots, with room for `capacity` slots (default: as many)."""
        if self._pool is None:
            raise out_of_range("cache", "released", "a live row")
        twin = self._pool.open(max(capacity or self.capacity, self.length))
        twin.copy_from(self)
        return twin

    def scrub(self) -> None:
        """Zero the slab: after a pass that was not finite, so that nothing of it can be read through a mask."""
        self.slab.zero_()

    def nbytes(self) -> int:
        """Memory held by this row, in bytes."""
        return self.slab.nbytes + sum(layer.nbytes() for layer in self.others.values())

    def release(self) -> None:
        """Give the slab back to the pool; the row must not be used afterwards. Safe to call twice."""
        if self._pool is not None:
            pool, self._pool = self._pool, None
            pool.give_back(self.slab)


@dataclass(frozen=True, slots=True)
class Past:
    """The keys of a row, for drafters to hand to a backbone that looks ahead; they read and change nothing themselves.

    A backbone reads the committed slots and may use the free ones as scratch.
    """

    cache: RowCache

    @property
    def length(self) -> int:
        """Committed slots."""
        return self.cache.length

    @property
    def room(self) -> int:
        """Free slots."""
        return self.cache.capacity - self.cache.length


class CachePool:
    """Slabs of one layout within `budget_bytes`; freed slabs are kept and handed out again.

    Admission asks `fits` (now) and `could_ever_fit`; `open` never exceeds the budget. Slab memory is touched only as
    rows grow, so a large window reserved is not a large window used. Of `used_bytes`, `lent_bytes` are with whoever
    borrows what rows leave over (`lend`); `reclaim(nbytes)` gets them back, and a row never waits for them.
    """

    def __init__(self, layout: CacheLayout, budget_bytes: int) -> None:
        if budget_bytes < layout.nbytes(_STEP):
            raise MemoryFitError(
                f"cache_bytes = {budget_bytes} is below one slab of {layout.nbytes(_STEP)} bytes ({_STEP} tokens)",
                hint="give the cache more memory",
                field="cache_bytes",
            )
        self.layout = layout
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self.lent_bytes = 0
        self.reclaim: Callable[[int], None] | None = None
        self._free: list[Tensor] = []

    @staticmethod
    def _capacity(slots: int) -> int:
        return max(_STEP, -(-slots // _STEP) * _STEP)

    def row_bytes(self, slots: int) -> int:
        """Bytes of a row with room for `slots` tokens."""
        return self.layout.nbytes(self._capacity(slots))

    @property
    def held_bytes(self) -> int:
        """Bytes in use plus bytes kept for reuse."""
        return self.used_bytes + sum(slab.nbytes for slab in self._free)

    @property
    def left_bytes(self) -> int:
        """Bytes that rows may still take: what is lent comes back when they do."""
        return self.budget_bytes - self.used_bytes + self.lent_bytes

    def could_ever_fit(self, slots: int, rows: int = 1) -> bool:
        """Whether so many rows of `slots` each would fit into an empty pool."""
        return rows * self.row_bytes(slots) <= self.budget_bytes

    def fits(self, slots: int, rows: int = 1) -> bool:
        """Whether so many rows of `slots` each can be opened now."""
        return rows * self.row_bytes(slots) <= self.left_bytes

    def _pick(self, slots: int, more: int) -> int | None:
        """Index of the smallest free slab that holds `slots`, wastes no more than half of itself and leaves enough."""
        want, most = self._capacity(slots), self.left_bytes - more * self.row_bytes(slots)
        fitting = [
            (slab.shape[3], i)
            for i, slab in enumerate(self._free)
            if want <= slab.shape[3] <= 2 * want and slab.nbytes <= most
        ]
        return min(fitting, default=(0, None))[1]

    def open(self, slots: int, more: int = 0) -> RowCache:
        """A row with room for at least `slots` tokens; raises MemoryFitError with the numbers when it does not fit.

        `more`: so many further rows of that size are opened next, and memory is left for them where there is enough.
        """
        index, need = self._pick(slots, more), self.row_bytes(slots)
        if need > self.left_bytes:
            raise MemoryFitError(
                f"a cache row of {slots} tokens needs {need} bytes; {self.left_bytes} of {self.budget_bytes} are free",
                hint="ask for fewer tokens, or give the cache more memory",
                field="max_tokens",
            )
        slab = None if index is None else self._free.pop(index)
        self._make_room(need if slab is None else slab.nbytes)
        if slab is None:
            shape = (self.layout.layers, 2, self.layout.kv_heads, self._capacity(slots), self.layout.head_dim)
            slab = torch.zeros(shape, dtype=self.layout.dtype)  # masked slots are read, so they must be finite
        self.used_bytes += slab.nbytes
        return RowCache(self, slab)

    def _make_room(self, nbytes: int) -> None:
        """Give up freed slabs, then what is lent, until so many bytes are within the budget."""
        while self._free and self.held_bytes + nbytes > self.budget_bytes:
            self._free.pop(0)
        if self.reclaim is not None and self.used_bytes + nbytes > self.budget_bytes:
            self.reclaim(self.used_bytes + nbytes - self.budget_bytes)

    def give_back(self, slab: Tensor) -> None:
        """Take a slab back for reuse (rows call this from `release`)."""
        self.used_bytes -= slab.nbytes
        self._free.append(slab)

    def lend(self, nbytes: int) -> None:
        """Lend so many bytes, which must be free, until they are returned (a negative number)."""
        while self._free and self.held_bytes + nbytes > self.budget_bytes:
            self._free.pop(0)
        self.used_bytes += nbytes
        self.lent_bytes += nbytes

    def idle(self) -> int:
        """Bytes of freed slabs and of what is lent: memory that this process holds and rows may have at once."""
        return self.held_bytes - self.used_bytes + self.lent_bytes

    def shrink(self) -> int:
        """Return all idle memory to the system; how many bytes that were."""
        freed = self.idle()
        self._free.clear()
        if self.reclaim is not None and self.lent_bytes:
            self.reclaim(self.lent_bytes)
        return freed
