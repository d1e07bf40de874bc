"""Event embedding and the complex feature enrichment encoder (CFEE) in one pass."""

from alure.kernels.encoding.arguments import EventEncoder
from alure.kernels.encoding.ops import encode_events

__all__ = ["EventEncoder", "encode_events"]
