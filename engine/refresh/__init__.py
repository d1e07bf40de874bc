"""Refresh: the whole user base through the user model, into a new generation of the store that appears all at once."""

from alure.engine.refresh.job import RefreshJob
from alure.engine.refresh.report import RefreshReport

__all__ = ["RefreshJob", "RefreshReport"]
