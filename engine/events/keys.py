"""Stable 64-bit keys of original ids: the same id gives the same key in any log, on any machine, in any version.

Keys are in [0, 2⁶³), so −1 stays free for "missing". They are hashed into embedding tables by the model; two kinds of
id that share one table need a salt of their own there.
"""

import hashlib

import numpy as np
import pyarrow as pa

KEY_MASK = np.uint64((1 << 63) - 1)


def splitmix64(x: np.ndarray) -> np.ndarray:
    """Steele, Lea and Flood's SplitMix64 (OOPSLA 2014), a bijection of 64 bits. uint64 [n] → uint64 [n]."""
    z = x.astype(np.uint64, copy=True)
    z += np.uint64(0x9E3779B97F4A7C15)
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def stable_keys(ids: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """int64 [n] keys of int64 ids (SplitMix64) or string ids (BLAKE2b-64 of the UTF-8, little-endian); null → −1."""
    if isinstance(ids, pa.ChunkedArray):
        ids = ids.combine_chunks()
    missing = np.asarray(ids.is_null())
    if pa.types.is_integer(ids.type):
        numbers = ids.cast(pa.int64()).fill_null(0).to_numpy(zero_copy_only=False)
        hashed = splitmix64(numbers.view(np.uint64))
    elif pa.types.is_string(ids.type) or pa.types.is_large_string(ids.type):
        digests = [hashlib.blake2b(text.encode(), digest_size=8).digest() for text in ids.fill_null("").to_pylist()]
        hashed = np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)
    elif pa.types.is_null(ids.type):
        hashed = np.zeros(len(ids), np.uint64)
    else:
        raise TypeError(f"ids: expected integers or strings, got {ids.type}")
    keys = (hashed & KEY_MASK).view(np.int64)
    keys[missing] = -1
    return keys
