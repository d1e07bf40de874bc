"""Several graphs' candidates as one list a user.

A graph's scores have a scale of their own (cosines, follows, visit probabilities), so each user's are divided by that
user's best in that graph; then score = Σ_g weight_g · normalised_g. Each graph brings its best to the blend, as many as
its quota: quotas that sum to the cap keep a place for every graph.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from alure.engine.errors import InputError
from alure.kernels import Candidates, Engagements, ItemRules, NeighborLists, join_candidates

REASON_BITS = 2  # below them in a candidate's byte; above, a bit a graph
MAX_GRAPHS = 8 - REASON_BITS


def check_graphs(names: Sequence[str]) -> None:
    if not 1 <= len(names) <= MAX_GRAPHS or len(set(names)) != len(names):
        raise InputError(f"graphs: expected 1 to {MAX_GRAPHS} different graphs, got {', '.join(names) or 'none'}")


def blend(
    found: Sequence[Candidates], weights: Sequence[float], cap: int, num_items: int, rules: ItemRules
) -> Candidates:
    """found: one a graph, over the same rows and under `rules` → the best `cap` of each row under them; bit
    REASON_BITS + g of `reasons` is graph g.

    The blend is a join too: row r's "neighbours" are its lists in each graph, and their similarities the weights.
    """
    if len(found) == 1 and weights[0] > 0:  # nothing to add up
        alone = found[0]
        return Candidates(alone.offsets, alone.items, normalised(alone) * weights[0], alone.reasons | 1 << REASON_BITS)
    rows, graphs = len(found[0].offsets) - 1, len(found)
    lists = Engagements(
        offsets=torch.cat([torch.zeros(1, dtype=torch.int64), *_shifted([c.offsets for c in found])]),
        items=torch.cat([c.items for c in found]),
        weights=torch.cat([normalised(c) for c in found]),
        reasons=torch.cat([c.reasons | (1 << (REASON_BITS + g)) for g, c in enumerate(found)]),
    )
    neighbors = NeighborLists(
        offsets=torch.arange(rows + 1) * graphs,
        ids=(torch.arange(rows)[:, None] + torch.arange(graphs) * rows).to(torch.int32).reshape(-1),
        similarities=torch.tensor(weights, dtype=torch.float32).repeat(rows),
    )
    return join_candidates(neighbors, lists, cap, num_items=num_items, rules=rules)


def normalised(found: Candidates) -> Tensor:
    """Scores divided by the row's best, which is its first: float32 [candidates], in (0, 1]."""
    starts = found.offsets.numpy()
    sizes = np.diff(starts)
    best = np.repeat(starts[:-1], sizes)
    return found.scores / found.scores[torch.from_numpy(best)]


def _shifted(offsets: Sequence[Tensor]) -> list[Tensor]:
    """Offsets of matrices stacked one below the other, without the leading 0."""
    shifted, total = [], 0
    for part in offsets:
        shifted.append(part[1:] + total)
        total += int(part[-1])
    return shifted
