"""What drafters with placeholders share: turning guesses for each depth into a draft."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from hasten.engine.contracts import EMPTY_DRAFT, Draft


def likeliest(ids: Sequence[Sequence[int]], chances: Sequence[Sequence[float]], budget: int, floor: float) -> Draft:
    """The `budget` likeliest paths over `ids[depth][rank]`, parents before children, each node with its chance as score.

    Depths are taken to be independent; paths less likely than `floor` are left out.
    """
    tokens: list[int] = []
    parents: list[int] = []
    scores: list[float] = []
    first = chances[0] if chances else ()
    heap = [(-chance, 0, rank, -1) for rank, chance in enumerate(first) if chance >= floor]
    heapq.heapify(heap)
    while heap and len(tokens) < budget:
        reach, depth, rank, parent = heapq.heappop(heap)
        tokens.append(ids[depth][rank])
        parents.append(parent)
        scores.append(chances[depth][rank])
        for following, chance in enumerate(chances[depth + 1] if depth + 1 < len(chances) else ()):
            if -reach * chance >= floor:
                heapq.heappush(heap, (reach * chance, depth + 1, following, len(tokens) - 1))
    return Draft(tuple(tokens), tuple(parents), scores=tuple(scores)) if tokens else EMPTY_DRAFT
