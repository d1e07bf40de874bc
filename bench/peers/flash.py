"""FlashAttention on jagged sequences, without a bias: the package where it is installed, and PyTorch's own."""

import importlib.util
from typing import Any

import torch
from torch import Tensor

from alure.bench.histories import Histories
from alure.bench.peers import Peer
from alure.bench.race import LeftOut


def package(histories: Histories) -> Peer:
    """flash_attn_varlen_func of FlashAttention 3 (flash_attn_interface), else of 2 (flash_attn)."""
    offsets, longest = _jagged(histories)
    if importlib.util.find_spec("flash_attn_interface"):
        from flash_attn_interface import flash_attn_varlen_func
    elif importlib.util.find_spec("flash_attn"):
        from flash_attn import flash_attn_varlen_func
    else:
        raise LeftOut("flash_attn is not installed")
    return Peer(lambda q, k, v, _: _output(flash_attn_varlen_func(q, k, v, offsets, offsets, longest, longest)), None)


def pytorch(histories: Histories) -> Peer:
    """torch.nn.attention.varlen."""
    offsets, longest = _jagged(histories)
    from torch.nn.attention.varlen import varlen_attn

    return Peer(lambda q, k, v, _: _output(varlen_attn(q, k, v, offsets, offsets, longest, longest)), None)


def _jagged(histories: Histories) -> tuple[Tensor, int]:
    """(cu_seqlens int32, max_seqlen)"""
    if histories.device.type != "cuda":
        raise LeftOut("needs a GPU")
    if histories.dtype not in (torch.float16, torch.bfloat16):
        raise LeftOut("takes float16 and bfloat16")
    return histories.offsets.int(), max(histories.lengths)


def _output(found: Any) -> Tensor:
    """Some releases return (output, log-sum-exp)."""
    return found[0] if isinstance(found, tuple) else found
