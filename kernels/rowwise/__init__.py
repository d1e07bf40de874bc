"""What a transformer layer does to the rows of its tokens, one by one."""

from alure.kernels.rowwise.ops import rms_norm, swiglu

__all__ = ["rms_norm", "swiglu"]
