"""The model: the user half that the refresh runs, and the ad tower and heads that training adds to it."""

from alure.engine.model.catalog import Catalog
from alure.engine.model.checkpoint import model_digest, model_space
from alure.engine.model.schema import EventSchema
from alure.engine.model.towers import AlureModel
from alure.engine.model.user_model import UserModel, UserState

__all__ = ["AlureModel", "Catalog", "EventSchema", "UserModel", "UserState", "model_digest", "model_space"]
