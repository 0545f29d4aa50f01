"""A sparse table of the tokens that follow pairs of tokens, counted over texts; sorted arrays, searched by key."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hasten.errors import ConfigError, FormatError, out_of_range

_BITS = 21  # of one token id in a packed key


def fingerprint(tokenizer: Any, vocab_size: int) -> str:
    """Identifies a vocabulary: a hash of its token strings, or of its size where there is no tokenizer."""
    strings = [str(vocab_size)] if tokenizer is None else tokenizer.token_strings()
    return hashlib.sha256("\0".join(strings).encode()).hexdigest()


class Trigrams:
    """P(c | a, b) of the most frequent followers of every pair: `keys` int64 [K] ascending, `offsets` int64 [K + 1],
    `ids` int32 [N] and `chances` float16 [N], most probable first within a key."""

    def __init__(self, keys: Tensor, offsets: Tensor, ids: Tensor, chances: Tensor) -> None:
        self.state = {"keys": keys, "offsets": offsets, "ids": ids, "chances": chances}
        self._keys: NDArray[np.int64] = keys.numpy()
        self._offsets: NDArray[np.int64] = offsets.numpy()

    def __len__(self) -> int:
        return len(self._keys)

    def followers(self, a: int, b: int) -> list[tuple[int, float]]:
        """(token, chance) of what follows `a`, `b`, most probable first; empty when the pair is unknown."""
        key = a << _BITS | b
        at = int(np.searchsorted(self._keys, key))
        if at == len(self._keys) or self._keys[at] != key:
            return []
        part = slice(int(self._offsets[at]), int(self._offsets[at + 1]))
        return list(zip(self.state["ids"][part].tolist(), self.state["chances"][part].tolist(), strict=True))

    @classmethod
    def build(cls, texts: Iterable[NDArray[np.int64]], vocab_size: int, followers: int = 12, least: int = 1) -> Trigrams:
        """Count every three tokens in a row; keep the best `followers` of a pair seen at least `least` times.

        Raises ConfigError for token ids that are negative, outside the vocabulary or beyond 21 bits.
        """
        packed = [np.empty(0, np.int64)]
        for text in texts:
            if len(text) and (int(text.min()) < 0 or int(text.max()) >= min(vocab_size, 1 << _BITS)):
                wrong = int(text.max()) if int(text.min()) >= 0 else int(text.min())
                raise out_of_range("texts", wrong, f"ids below {min(vocab_size, 1 << _BITS)}")
            if len(text) >= 3:
                t = text.astype(np.int64)
                packed.append(t[:-2] << 2 * _BITS | t[1:-1] << _BITS | t[2:])
        grams, counts = np.unique(np.concatenate(packed), return_counts=True)
        pairs, ids = grams >> _BITS, grams & ((1 << _BITS) - 1)
        keys, first, sizes = np.unique(pairs, return_index=True, return_counts=True)
        totals = np.add.reduceat(counts, first) if len(keys) else np.empty(0, np.int64)
        which = np.repeat(np.arange(len(keys)), sizes)
        order = np.lexsort((ids, -counts, which))
        rank = np.arange(len(grams)) - np.repeat(first, sizes)
        keep = (rank < followers) & (totals[which] >= least)  # `which` is ascending, so ranks are places within a key
        chosen = order[keep]
        kept, lengths = np.unique(which[chosen], return_counts=True)
        offsets = np.concatenate((np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)))
        chances = counts[chosen] / np.maximum(totals[which[chosen]], 1)
        return cls(
            torch.from_numpy(keys[kept]),
            torch.from_numpy(offsets),
            torch.from_numpy(ids[chosen].astype(np.int32)),
            torch.from_numpy(chances.astype(np.float16)),
        )

    def save(self, path: Path, vocabulary: str) -> None:
        """Write a safetensors file; `vocabulary` is the fingerprint of the ids' meaning."""
        save_file(self.state, path, {"hasten": "trigrams", "vocabulary": vocabulary})

    @classmethod
    def load(cls, path: str | Path, vocabulary: str, vocab_size: int) -> Trigrams:
        """Read what `save` wrote; raises FormatError naming the file, ConfigError for another vocabulary."""
        try:
            with safe_open(path, "pt") as file:
                facts = file.metadata() or {}
                state = {name: file.get_tensor(name) for name in ("keys", "offsets", "ids", "chances")}
        except (SafetensorError, OSError) as error:
            raise FormatError(f"{path} cannot be read as a table ({error})", hint="build it again", field="table") from None
        if facts.get("vocabulary") != vocabulary:
            raise ConfigError(
                f"{path} was built with another tokenizer", hint="build it for this model: hasten train aded", field="table"
            )
        keys, offsets, ids, chances = state.values()
        shapes = len(offsets) == len(keys) + 1 and len(ids) == len(chances) and all(t.ndim == 1 for t in state.values())
        kinds = [t.dtype for t in state.values()] == [torch.int64, torch.int64, torch.int32, torch.float16]
        sound = (
            kinds
            and shapes
            and int(offsets[0]) == 0
            and int(offsets[-1]) == len(ids)
            and bool((offsets.diff() > 0).all())
            and bool((keys.diff() > 0).all())
            and (not len(ids) or (int(ids.min()) >= 0 and int(ids.max()) < vocab_size))
            and bool(((chances >= 0) & (chances <= 1)).all())
        )
        if not sound:
            raise FormatError(f"{path}: keys, offsets, ids and chances do not agree", hint="build it again", field="table")
        return cls(keys, offsets, ids, chances)
