"""The retrieval join: the items that a user's neighbours engaged with, de-duplicated, scored and capped."""

from alure.kernels.candidates.ops import Candidates, Engagements, ItemRules, NeighborLists, join_candidates

__all__ = ["Candidates", "Engagements", "ItemRules", "NeighborLists", "join_candidates"]
