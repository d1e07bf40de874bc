"""CFEE of one source: hashed attributes, content vectors, position, frequency, decay and cycles become tokens."""

import torch
from torch import Tensor, nn

from alure.engine.config import ModelConfig
from alure.kernels.encoding import CheckedColumns, EventColumns, EventEncoder, encode_columns

TAU = 3_600.0  # seconds, unit of age and gap inside the logarithm
FREQUENCY_ROWS = 16  # log2 buckets of occurrences: the last one starts at 2^15


class SourceEncoder(nn.Module):
    """The parameters of `alure.kernels.encode_events` for one source; the embedding table is shared and passed in."""

    periods: Tensor
    position_table: Tensor
    frequency_table: Tensor
    time_mask: Tensor

    def __init__(self, config: ModelConfig, num_attributes: int, dense_dim: int) -> None:
        super().__init__()
        width, num_periods = config.width, len(config.periods)
        # table rows have length ~1, so the attributes' sum has variance ~1 a channel
        self.id_weight = nn.Parameter(torch.randn(num_attributes, config.attribute_width, width) * num_attributes**-0.5)
        self.dense_weight = nn.Parameter(torch.randn(dense_dim, width) * dense_dim**-0.5) if dense_dim else None
        self.time_weight = nn.Parameter(torch.randn(2 + 2 * num_periods, width) * 0.05)
        self.bias = nn.Parameter(torch.zeros(width))
        self.phases = nn.Parameter(torch.zeros(num_periods))
        self.dropout = nn.Dropout(config.dropout)
        # what is switched off reads zeros, which are not learned
        for name, encoder, rows in (
            ("position_table", "position", config.max_position),
            ("frequency_table", "frequency", FREQUENCY_ROWS),
        ):
            if encoder in config.encoders:
                self.register_parameter(name, nn.Parameter(torch.randn(rows, width) * 0.05))
            else:
                self.register_buffer(name, torch.zeros(1, width), persistent=False)
        on = [float(name in config.encoders) for name in ("age", "gap", *["cyclic"] * (2 * num_periods))]
        self.register_buffer("time_mask", torch.tensor(on)[:, None], persistent=False)
        self.host_periods = torch.tensor(config.periods, dtype=torch.int64)  # stay where batches are prepared
        self.register_buffer("periods", self.host_periods.clone(), persistent=False)

    def periods_on(self, device: torch.device) -> Tensor:
        return self.periods if self.periods.device == device else self.host_periods

    def forward(self, events: EventColumns, table: Tensor, dense: Tensor | None) -> Tensor:
        """events: their ids are rows of `table`; dense [n, dense_dim] → tokens [n, width]."""
        encoder = EventEncoder(
            id_weight=self.id_weight,
            dense_weight=self.dense_weight,
            time_weight=self.time_weight * self.time_mask,
            bias=self.bias,
            position_table=self.position_table,
            frequency_table=self.frequency_table,
            periods=events.periods if isinstance(events, CheckedColumns) else self.periods,
            phases=self.phases,
            tau=TAU,
        )
        return self.dropout(encode_columns(events, table, encoder, dense=dense))
