"""Event embedding and the complex feature enrichment encoder (CFEE) in one pass."""

from alure.kernels.encoding.arguments import CheckedColumns, EventColumns, EventEncoder
from alure.kernels.encoding.ops import encode_columns, encode_events

__all__ = ["CheckedColumns", "EventColumns", "EventEncoder", "encode_columns", "encode_events"]
