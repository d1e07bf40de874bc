"""Jagged batches: `values` of all sequences end to end, and `offsets` [batch + 1] that say where each begins.

An offsets array is a memory-safety boundary: it is checked here before any kernel reads through it.
"""

from typing import Any

import torch
from torch import Tensor


def check_offsets(offsets: Tensor, total: int, name: str = "offsets", device: torch.device | None = None) -> None:
    """Raise unless `offsets` describes sequences that tile exactly `total` rows.

    offsets: int32 or int64, [batch + 1], first 0, never decreasing, last `total`, on `device` where one is given.
    On a GPU this waits for the device once.
    """
    if not isinstance(offsets, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(offsets).__name__}")
    if offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected int32 or int64, got {offsets.dtype}; call .to(torch.int64)")
    if offsets.dim() != 1 or offsets.numel() < 1:
        raise ValueError(f"{name}: expected shape [batch + 1], got {list(offsets.shape)}")
    if device is not None and offsets.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {offsets.device}; move it there")
    falls = offsets[1:] < offsets[:-1]  # compared: the difference of two offsets may overflow
    first, last, any_falls = torch.stack([offsets[0], offsets[-1], falls.any().to(offsets.dtype)]).tolist()
    if first != 0:
        raise ValueError(f"{name}: expected the first offset to be 0, got {first}")
    if any_falls:
        where = int(falls.nonzero()[0])
        raise ValueError(
            f"{name}: expected offsets that never decrease, got {name}[{where}] = {int(offsets[where])} > "
            f"{name}[{where + 1}] = {int(offsets[where + 1])}"
        )
    if last != total:
        raise ValueError(f"{name}: expected the last offset to equal the number of rows, {total}, got {last}")


def check_timestamps(timestamps: Tensor, offsets: Tensor, total: int, name: str = "timestamps") -> None:
    """Raise unless `timestamps` is int64 [total] and never decreases within a sequence. `offsets` must be checked."""
    if not isinstance(timestamps, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(timestamps).__name__}")
    if timestamps.dtype != torch.int64:
        raise TypeError(
            f"{name}: expected int64 unix seconds, got {timestamps.dtype}; "
            "float32 rounds seconds of this decade by up to 64 s, so keep times as integers"
        )
    if timestamps.shape != (total,):
        raise ValueError(f"{name}: expected shape [{total}], got {list(timestamps.shape)}")
    if timestamps.device != offsets.device:
        raise ValueError(f"{name}: expected a tensor on {offsets.device}, got one on {timestamps.device}")
    if total < 2:
        return
    begins = torch.zeros(total + 1, dtype=torch.bool, device=offsets.device)
    begins[offsets[:-1].to(torch.int64)] = True
    falls = (timestamps[1:] < timestamps[:-1]) & ~begins[1:total]  # a step from one sequence to the next may fall
    if bool(falls.any()):
        row = int(falls.nonzero()[0])
        raise ValueError(
            f"{name}: expected times that never decrease within a sequence, got {int(timestamps[row])} at row {row} "
            f"and {int(timestamps[row + 1])} after it; sort each sequence by time"
        )


def segment_ids(offsets: Tensor, total: int) -> Tensor:
    """The sequence each row belongs to, int64 [total]."""
    lengths = (offsets[1:] - offsets[:-1]).to(torch.int64)
    index = torch.arange(lengths.numel(), device=offsets.device)
    return torch.repeat_interleave(index, lengths, output_size=total)


def to_jagged(x: Any) -> tuple[Tensor, Tensor]:
    """(values, offsets) of a TorchRec KeyedJaggedTensor or JaggedTensor, a PyTorch jagged nested tensor, an Arrow list
    array (also chunked: a column of a table), or a (values, offsets) pair; recognised by their methods, so none of
    these packages is needed.

    values [total, …], offsets [batch + 1], of a KeyedJaggedTensor [keys · batch + 1], key after key. Arrow lists of
    numbers are copied, offsets are int64; the others share memory. Raises TypeError for anything else, ValueError for
    nulls and for offsets that do not tile the values.
    """
    if isinstance(x, tuple) and len(x) == 2:
        values, offsets = x
    elif callable(getattr(x, "values", None)) and callable(getattr(x, "offsets", None)):
        values, offsets = x.values(), x.offsets()
    elif hasattr(x, "combine_chunks") and hasattr(x, "type"):  # pyarrow.ChunkedArray
        return to_jagged(x.combine_chunks())
    elif hasattr(x, "flatten") and hasattr(x, "offsets") and hasattr(x, "type"):  # pyarrow.ListArray
        values, offsets = _of_arrow(x)
    else:
        raise TypeError(
            "expected a KeyedJaggedTensor, a jagged nested tensor, an Arrow list array or a (values, offsets) pair, "
            f"got {type(x).__name__}"
        )
    if not isinstance(values, Tensor):
        raise TypeError(f"values: expected a torch.Tensor, got {type(values).__name__}")
    check_offsets(offsets, values.shape[0])
    return values, offsets


def _of_arrow(lists: Any) -> tuple[Tensor, Tensor]:
    if not hasattr(lists.type, "value_type"):  # a map has offsets too
        raise TypeError(f"expected Arrow lists of numbers, got {lists.type}")
    flat = lists.flatten()
    if lists.null_count or flat.null_count:
        raise ValueError("expected Arrow lists without nulls; fill them with empty lists and values first")
    array = flat.to_numpy(zero_copy_only=False)
    if array.dtype.kind not in "iufb":
        raise TypeError(f"expected Arrow lists of numbers, got {lists.type}; cast the values, timestamps to int64")
    bounds = lists.offsets.to_numpy().astype("int64")
    return torch.from_numpy(array.copy()), torch.from_numpy(bounds - bounds[0])


def tile_list(offsets: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """(sequences, starts), int32 [tiles]: every sequence cut into tiles of `block` rows, the first row of each counted
    from its sequence's beginning. A kernel that runs one program a tile never pads and never crosses sequences.
    """
    lengths = (offsets[1:] - offsets[:-1]).to(torch.int64)
    counts = (lengths + block - 1) // block
    sequences = torch.repeat_interleave(torch.arange(lengths.numel(), device=offsets.device), counts)
    first = counts.cumsum(0) - counts
    starts = (torch.arange(sequences.numel(), device=offsets.device) - first[sequences]) * block
    return sequences.to(torch.int32), starts.to(torch.int32)
