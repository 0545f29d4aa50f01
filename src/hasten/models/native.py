"""The native stack as a backbone: one call of the C++ library runs all layers for a ragged batch of query tokens.

It serves every visibility, ragged rows, caches in float32, bfloat16 or 8 bits, and taps on hidden states. What it does not
serve - hooks into the layer loop and placeholder positions - the torch stack does, which is then loaded from the same
source. Numbers: with activations "exact" float32 arithmetic on the stored weights, with "int8" the inputs of quantised
matrices are rounded to 8 bits, one scale per 32. Either way a query's numbers depend on the tokens it sees and on nothing
else: not on other rows, on how many queries share the pass, on where keys are stored, or on the number of threads.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import accumulate
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hasten.engine.cache import CacheLayout, CachePool, RowCache
from hasten.engine.contracts import NO_NEEDS, Needs, Pass, RowInput
from hasten.engine.masks import BlockCausal, Causal, Full, PerLayer, Tree, Visibility, at_layer, mask
from hasten.errors import HastenError, UnsupportedError, out_of_range
from hasten.kernels.library import ACTIVATIONS, KV_TYPES, PARTS, Layer, Model, PassInput, check, native
from hasten.models.config import ModelConfig
from hasten.models.packing import Weights, gap
from hasten.models.rope import RopeTable
from hasten.models.stack import DecoderStack, capabilities_of
from hasten.models.transformer import Transformer

_SIGHT = np.dtype([("lo", "<i4"), ("hi", "<i4"), ("extra_at", "<i4"), ("extra_count", "<i4")])
_FRAMED = 64  # queries of one row up to which the arrays of a pass are kept
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


class NativeStack(DecoderStack):
    """A decoder stack of `config` on the native library; implements the engine's Backbone contract as "native".

    `activations`: exact or int8. `cache`: float32, bfloat16 or int8 keys and values (the last two lossy). `oracle` loads
    the torch stack of the same weights when something needs it. Raises UnsupportedError without the library, and for a
    config that has a `gap`.
    """

    name = "native"
    dtype = torch.float32  # of hidden states

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        *,
        activations: str = "exact",
        cache: str = "float32",
        oracle: Callable[[], Transformer] | None = None,
    ) -> None:
        if activations not in ACTIVATIONS:
            raise out_of_range("activations", activations, " or ".join(ACTIVATIONS))
        if cache not in KV_TYPES:
            raise out_of_range("cache", cache, ", ".join(KV_TYPES))
        if lacking := gap(config):
            raise UnsupportedError(f"the native stack has no {lacking}", hint="use backbone='torch'", field="backbone")
        self.config, self.weights, self.activations, self.cache_type = config, weights, activations, cache
        self.ropes = [RopeTable(rope, config.head_dim) for rope in config.ropes]
        self._load_oracle = oracle
        self._oracle: Transformer | None = None
        self._handle: Any = None
        self._close: Callable[[], Any] = lambda: None
        self._rope_rows = 0
        self._open(256)
        windows = [layer.window for layer in config.layers]
        self._windows = tuple(dict.fromkeys(windows))
        self._kind_of_layer = np.array([self._windows.index(one) for one in windows], np.int32)
        self.part_seconds: NDArray[np.float64] | None = None
        self._frames: dict[int, _Frame] = {}
        self.capabilities = capabilities_of(config, hooks=oracle is not None and cache == "float32")

    # --- the model in the library ---

    def _open(self, positions: int) -> None:
        """Describe the model to the library, with rotary tables for so many positions."""
        c, w = self.config, self.weights
        keep: list[Any] = []

        def vector(name: str) -> int | None:
            found = w.vectors.get(name)
            return None if found is None else found.ctypes.data

        def pointers(arrays: Sequence[NDArray[Any]]) -> int:
            table = np.array([one.ctypes.data for one in arrays] or [0], np.uint64)
            keep.append((table, arrays))
            return table.ctypes.data

        norm = w.vectors["norm.weight"] * np.float32(c.logit_scale)  # before the head, which is linear
        layers = (Layer * len(c.layers))()
        for i, layer in enumerate(layers):
            for part in ("q", "k", "v", "out", "gate", "up", "down"):
                setattr(layer, part, w.matrices[f"layers.{i}.{part}"].ref())
            for part in ("attn_norm", "ffn_norm", "q_norm", "k_norm", "post_attn_norm", "post_ffn_norm"):
                setattr(layer, part, vector(f"layers.{i}.{part}.weight"))
            for part in ("qkv", "out", "gate_up", "down"):
                setattr(layer, f"{part}_bias", vector(f"layers.{i}.{part}.bias"))
            rope = c.layers[i].rope
            layer.rope = -1 if rope is None else rope
        rotated = np.array([2 * len(table.inverse) for table in self.ropes] or [0], np.int32)
        angles = [(torch.arange(positions).float()[:, None] * table.inverse[None]) for table in self.ropes]
        model = Model(
            c.vocab_size, c.hidden, c.heads, c.kv_heads, c.head_dim, c.ffn, len(c.layers), c.activation != "silu",
            KV_TYPES.index(self.cache_type), ACTIVATIONS.index(self.activations), c.norm_eps, c.embed_scale, c.attn_scale,
            c.attn_softcap or 0.0, c.logit_softcap or 0.0, layers, w.matrices["embed"].ref(), w.matrices["head"].ref(),
            norm.ctypes.data, len(self.ropes), positions, rotated.ctypes.data,
            pointers([one.cos().numpy() for one in angles]), pointers([one.sin().numpy() for one in angles]),
        )  # fmt: skip
        handle = native().hasten_open(ctypes.byref(model))
        if not handle:
            raise HastenError(
                f"the native stack refuses this model: {native().hasten_error().decode()}",
                hint="load it with backbone='torch'",
            )
        self._close()
        self._handle, self._rope_rows, self._kept = handle, positions, (keep, layers, rotated, norm, model)
        self._close = weakref.finalize(self, native().hasten_close, handle)

    def pack(self) -> NativeStack:
        """Nothing is left to do: weights are packed already."""
        return self

    @property
    def oracle(self) -> Transformer:
        """The torch stack of the same weights, loaded when first asked for; raises UnsupportedError where there is none."""
        if self._oracle is None:
            if self._load_oracle is None:
                raise UnsupportedError("this needs the torch stack, and these weights exist packed only", field="backbone")
            self._oracle = self._load_oracle()
        return self._oracle

    def pool(self, budget_bytes: int) -> CachePool:
        """A pool of row caches for this model; see CachePool. 8-bit entries end with their float32 scale."""
        return CachePool(self._layout, budget_bytes)

    @property
    def _layout(self) -> CacheLayout:
        c = self.config
        dim = c.head_dim + (4 if self.cache_type == "int8" else 0)
        return CacheLayout(len(c.layers), c.kv_heads, dim, _DTYPES[self.cache_type])

    def embed_rows(self, ids: Tensor) -> Tensor:
        """Rows [len(ids), hidden] of the input embedding as stored."""
        return torch.from_numpy(self.weights.matrices["embed"].unpack(ids.reshape(-1).numpy()))

    def output_rows(self, ids: Tensor) -> Tensor:
        """Rows [len(ids), hidden] of the output layer."""
        return torch.from_numpy(self.weights.matrices["head"].unpack(ids.reshape(-1).numpy()))

    def embeddings(self, ids: Tensor) -> Tensor:
        """Input embeddings [..., hidden] of token ids, scaled as the model scales them."""
        rows = self.embed_rows(ids)
        rows = rows if self.config.embed_scale == 1.0 else rows * self.config.embed_scale
        return rows.view(*ids.shape, -1)

    # --- passes ---

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keeps torch's threads out of the way of the native ones: they would spin after each of torch's operators."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)

    def serves(self, rows: Sequence[RowInput], needs: Needs) -> bool:
        """Everything, through the torch stack where the native one does not; not placeholder positions."""
        if self._native(rows, needs):
            return True
        return self._load_oracle is not None and self.cache_type == "float32" and self.oracle.serves(rows, needs)

    @staticmethod
    def _native(rows: Sequence[RowInput], needs: Needs) -> bool:
        return all(row.hooks is None and row.pseudo is None for row in rows)

    def run(self, rows: Sequence[RowInput], needs: Needs = NO_NEEDS) -> Pass:
        """One pass over ragged rows; see RowInput for where keys are written and which logits come back.

        Raises UnsupportedError for needs it does not serve, MemoryFitError when a row's cache is full.
        """
        if not self._native(rows, needs):
            if self.cache_type != "float32":
                raise UnsupportedError(
                    f"hooks need a float32 cache, this one is {self.cache_type}", hint="load with cache='float32'"
                )
            before = torch.get_num_threads()  # one, where the engine called under `alone`
            torch.set_num_threads(max(before, native().hasten_threads()))
            try:
                return self.oracle.run(rows, needs)
            finally:
                torch.set_num_threads(before)
        if any(row.queries == 0 for row in rows):
            raise out_of_range("queries", 0, "at least 1 per row")
        plain = not (needs.hidden or needs.final_hidden or needs.embeds)
        if len(rows) == 1 and plain and rows[0].cache is not None and rows[0].embeds is None:
            done = self._one_row(rows[0], rows[0].cache)
            if done is not None:
                return done
        c = self.config
        counts = [row.queries for row in rows]
        ends = list(accumulate(counts))
        total = ends[-1]
        caches = [row.cache if row.cache is not None else self._scratch(row.queries) for row in rows]
        starts = [0 if row.cache is None else row.cache.length if row.start is None else row.start for row in rows]
        visible = [cache.reserve(start, row.positions) for cache, start, row in zip(caches, starts, rows, strict=True)]
        single = len(rows) == 1
        positions = _ints([row.positions for row in rows])
        most = int(positions.max()) + 1
        if most > self._rope_rows:
            self._open(2 ** (most - 1).bit_length())
        slots = np.arange(starts[0], starts[0] + total, dtype=np.int32) if single else np.concatenate(
            [np.arange(start, start + n, dtype=np.int32) for start, n in zip(starts, counts, strict=True)]
        )  # fmt: skip
        row_of = np.zeros(total, np.int32) if single else np.repeat(np.arange(len(rows), dtype=np.int32), counts)
        embeds = None
        if any(row.embeds is not None for row in rows) or needs.embeds:
            parts = [self.embeddings(row.tokens) if row.embeds is None else row.embeds for row in rows]
            embeds = torch.cat([part.float() for part in parts]).contiguous()
        tokens = np.zeros(total, np.int32) if embeds is not None else _ints([row.tokens for row in rows])
        kinds, sight, extras = self._sight(rows, caches, starts, visible, positions)
        wanted = np.array(
            [end - n + j for row, n, end in zip(rows, counts, ends, strict=True) for j in row.wanted()], np.int32
        )
        logits = torch.empty(len(wanted), c.vocab_size)
        best, lse, sure = np.empty(len(wanted), np.int32), *np.empty((2, len(wanted)), np.float32)
        taps = {layer: torch.empty(total, c.hidden) for layer in needs.hidden}
        final = torch.empty(total, c.hidden) if needs.final_hidden else None
        tap_layers = np.array(list(taps), np.int32)
        tap_out = np.array([one.data_ptr() for one in taps.values()], np.uint64)
        slabs = np.array([cache.slab.data_ptr() for cache in caches], np.uint64)
        capacity = np.array([cache.capacity for cache in caches], np.int32)
        call = PassInput(
            len(rows), total, len(sight) // total, len(extras), len(wanted), len(taps), tokens.ctypes.data,
            None if embeds is None else embeds.data_ptr(), positions.ctypes.data, row_of.ctypes.data, slots.ctypes.data,
            slabs.ctypes.data, capacity.ctypes.data, kinds.ctypes.data, sight.ctypes.data, extras.ctypes.data,
            wanted.ctypes.data, logits.data_ptr(), best.ctypes.data, lse.ctypes.data, sure.ctypes.data,
            tap_layers.ctypes.data, tap_out.ctypes.data, None if final is None else final.data_ptr(),
            None if self.part_seconds is None else self.part_seconds.ctypes.data,
        )  # fmt: skip
        check(native().hasten_run(self._handle, ctypes.byref(call)))
        if final is not None and c.logit_scale != 1.0:
            final /= c.logit_scale
        spans = tuple((end - n, end) for n, end in zip(counts, ends, strict=True))
        offsets = [0, *accumulate(len(row.wanted()) for row in rows)][:-1]
        return Pass(
            logits, tuple(offsets), spans, taps, final, embeds if needs.embeds else None,
            best.tolist(), lse.tolist(), sure.tolist(), self.top, self.name,
        )  # fmt: skip

    def _one_row(self, row: RowInput, cache: RowCache) -> Pass | None:
        """The pass of one row that wants logits only, from arrays made once per number of queries; None: the long way.

        After a pass has gone through all weights nothing of Python is left in the processor's caches, so that every object
        touched here takes its time: this is a tenth of a token.
        """
        n = row.queries
        frame = self._frames.get(n)
        if frame is None:
            if n > _FRAMED:
                return None
            frame = self._frames[n] = _Frame(n, len(self._windows), self._kind_of_layer)
        start = cache.length if row.start is None else row.start
        frame.positions[:] = row.positions.numpy()
        extras: list[int] = []
        if frame.branched:  # else only upper bounds were written, which are now written anew
            frame.sight[:] = 0
        frame.branched = True
        for k, window in enumerate(self._windows):
            part = frame.sight[k * n : (k + 1) * n]
            visible = max(start + n, cache.length)
            if not _fast_sight(part, row.visibility, start, visible, window, frame.positions, extras, cache):
                return None
        frame.branched = bool(extras)
        cache.reserve(start, row.positions)
        most = int(frame.positions.max() if n > 1 else frame.positions[0]) + 1
        if most > self._rope_rows:
            self._open(2 ** (most - 1).bit_length())
        frame.tokens[:] = row.tokens.numpy()
        np.add(frame.steps, start, out=frame.slots)
        wanted = row.wanted()
        count = len(wanted)
        if count > n:
            return None
        frame.wanted[:count] = wanted
        logits = torch.empty(count, self.config.vocab_size)
        frame.slab[0], frame.capacity[0] = cache.slab.data_ptr(), cache.capacity
        call = frame.call
        more = np.array(extras, np.int32) if extras else None
        call.extra_total, call.extras = len(extras), None if more is None else more.ctypes.data
        call.wanted_total, call.logits = count, logits.data_ptr()
        call.part_seconds = None if self.part_seconds is None else self.part_seconds.ctypes.data
        check(native().hasten_run(self._handle, ctypes.byref(call)))
        lse, sure = frame.logs[:, :count].tolist()
        return Pass(logits, (0,), ((0, n),), {}, None, None, frame.best[:count].tolist(), lse, sure, self.top, self.name)

    @staticmethod
    def top(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """(ids int64, values float32) [n, k]: the k best of every row of logits [n, vocab], lower ids first if equal."""
        rows, vocab = logits.shape
        logits = logits.contiguous()
        k = min(k, vocab)
        ids, values = torch.empty(rows, k, dtype=torch.int32), torch.empty(rows, k)
        check(native().hasten_topk(logits.data_ptr(), rows, vocab, k, ids.data_ptr(), values.data_ptr()))
        return ids.long(), values

    def _scratch(self, slots: int) -> RowCache:
        """A cache for one pass of a row that has none."""
        return CachePool(self._layout, self._layout.nbytes(slots + 64)).open(slots)

    def _sight(
        self,
        rows: Sequence[RowInput],
        caches: Sequence[RowCache],
        starts: Sequence[int],
        visible: Sequence[int],
        positions: NDArray[np.int32],
    ) -> tuple[NDArray[np.int32], NDArray[Any], NDArray[np.int32]]:
        """(kind of every layer, what each query sees by kind [kinds * N], single slots)."""
        kinds: NDArray[np.int32] = self._kind_of_layer
        rules: list[tuple[list[Visibility], int | None]]
        if any(isinstance(row.visibility, PerLayer) for row in rows):
            keys: dict[tuple[Any, ...], int] = {}
            rules, kinds = [], kinds.copy()
            for i, layer in enumerate(self.config.layers):
                own = [at_layer(row.visibility, i) for row in rows]
                key = (*map(id, own), layer.window)
                if key not in keys:
                    keys[key] = len(rules)
                    rules.append((own, layer.window))
                kinds[i] = keys[key]
        else:
            rules = [([row.visibility for row in rows], window) for window in self._windows]
        sight = np.zeros(len(rules) * len(positions), _SIGHT)
        extras: list[int] = []
        at = 0
        for own, window in rules:
            begin = 0
            for visibility, cache, start, seen, row in zip(own, caches, starts, visible, rows, strict=True):
                end = begin + row.queries
                part = sight[at + begin : at + end]
                if not _fast_sight(part, visibility, start, seen, window, positions[begin:end], extras, cache):
                    _any_sight(part, mask(visibility, row.positions, cache.positions[:seen], start, window), seen, extras)
                begin = end
            at += len(positions)
        return kinds, sight, np.array(extras or [0], np.int32)

    @property
    def parts(self) -> dict[str, float]:
        """Seconds spent in each part of the passes since `part_seconds` was set to zeros."""
        return {} if self.part_seconds is None else dict(zip(PARTS, self.part_seconds.tolist(), strict=True))

    def measure_parts(self) -> None:
        """Add up the time of every part from now on."""
        self.part_seconds = np.zeros(len(PARTS))


class _Frame:
    """Arrays of a pass over `n` queries of one row, and the call that points to them."""

    def __init__(self, n: int, kinds: int, kind_of_layer: NDArray[np.int32]) -> None:
        self.steps = np.arange(n, dtype=np.int32)
        self.tokens, self.positions, self.slots, self.rows, self.wanted, self.best = (
            np.zeros(n, np.int32) for _ in range(6)
        )
        self.sight, self.logs = np.zeros(kinds * n, _SIGHT), np.zeros((2, n), np.float32)  # log-sum-exp, best's log-prob
        self.branched = False
        self.slab, self.capacity, self.kinds = np.zeros(1, np.uint64), np.zeros(1, np.int32), kind_of_layer
        self.call = PassInput(
            1, n, kinds, 0, 0, 0, self.tokens.ctypes.data, None, self.positions.ctypes.data, self.rows.ctypes.data,
            self.slots.ctypes.data, self.slab.ctypes.data, self.capacity.ctypes.data, self.kinds.ctypes.data,
            self.sight.ctypes.data, None, self.wanted.ctypes.data, None, self.best.ctypes.data, self.logs[0].ctypes.data,
            self.logs[1].ctypes.data,
        )  # fmt: skip


def _ints(parts: list[Tensor]) -> NDArray[np.int32]:
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).numpy().astype(np.int32)


@lru_cache(maxsize=256)
def _tree(parents: tuple[int, ...]) -> tuple[int, tuple[tuple[int, ...], ...]]:
    """(length of the leading chain, for every later query its ancestors outside that chain, itself last)."""
    chain = 0
    while chain < len(parents) and parents[chain] == chain - 1:
        chain += 1
    lines: list[tuple[int, ...]] = []
    for i in range(chain, len(parents)):
        up = parents[i]
        lines.append((*lines[up - chain], i) if up >= chain else (up, i))
    return chain, tuple(lines)


def _fast_sight(
    part: NDArray[Any],
    visibility: Visibility,
    start: int,
    visible: int,
    window: int | None,
    at: NDArray[np.int32],
    extras: list[int],
    cache: RowCache,
) -> bool:
    """Fill in what the queries of one row see, for the rules that need no mask; False for the others.

    A window cuts nothing as long as all positions lie below it. Blocks are runs of slots where slots are positions.
    """
    if window is not None and int(at.max()) >= window:
        return False
    n = len(part)
    if isinstance(visibility, Full):
        part["hi"] = visible
    elif isinstance(visibility, Causal):
        part["hi"] = np.arange(start + 1, start + n + 1)
    elif isinstance(visibility, Tree):
        chain, lines = _tree(visibility.parents)
        part["hi"][:chain] = np.arange(start + 1, start + chain + 1)
        for i, line in enumerate(lines):
            # a line begins where it leaves the chain: all of the chain up to there is one range
            part[chain + i] = (0, start + line[0] + 1, len(extras), len(line) - 1)
            extras += [start + node for node in line[1:]]
    elif isinstance(visibility, BlockCausal):
        keys = cache.positions[:visible].numpy().copy()
        if len(keys) < visible:
            return False
        keys[start : start + n] = at
        if (keys != np.arange(visible)).any():
            return False
        part["hi"] = np.minimum((at // visibility.block + 1) * visibility.block, visible)
    else:
        return False
    return True


def _any_sight(part: NDArray[Any], allowed: Tensor | None, visible: int, extras: list[int]) -> None:
    """Fill in what the queries of one row see, from a mask [T, visible]: its first run as a range, the rest one by one."""
    if allowed is None:
        part["hi"] = visible
        return
    seen = allowed.numpy()
    count, lo = seen.sum(1, dtype=np.int32), seen.argmax(1)
    if (count == seen.shape[1] - seen[:, ::-1].argmax(1) - lo)[count > 0].all():  # one run each: blocks, windows
        part["lo"], part["hi"] = lo, lo + count
        return
    for i, row in enumerate(seen):
        slots = np.flatnonzero(row)
        if not len(slots):
            continue
        lo = int(slots[0])
        run = int(np.argmax(np.append(slots != np.arange(lo, lo + len(slots)), True)))
        part[i] = (lo, lo + run, len(extras), len(slots) - run)
        extras += slots[run:].tolist()


def as_transformer(model: object) -> Transformer | None:
    """The torch stack behind a model of hasten's own, None for others."""
    if isinstance(model, NativeStack):
        return model.oracle
    return cast(Transformer, model) if isinstance(model, Transformer) else None
