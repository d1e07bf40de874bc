"""Operators of torch.library: how the kernels become known to autograd, fake tensors and torch.compile."""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

_LIBRARY = torch.library.Library("alure", "FRAGMENT")


class operator:
    """`@operator("name")` registers a function of tensors as torch.ops.alure.name, for every device.

    As torch.library.custom_op, with the same `register_fake` and `register_autograd`; but that one imports
    torch._dynamo on its first call, 2 s of every command. The schema comes from the function's annotations. It must
    change none of its arguments and return none of them. Until `register_autograd`, a derivative of it raises; torch
    alone would warn once and take it for 0, as in the second derivative of an operator whose backward is another one.
    So does a forward-mode derivative, which torch takes for 0 without a word.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, implementation: Callable[..., Any]) -> "RegisteredOperator":
        _LIBRARY.define(self._name + torch.library.infer_schema(implementation, mutates_args=()))
        _LIBRARY.impl(self._name, implementation, "CompositeExplicitAutograd")
        return RegisteredOperator(self._name, implementation)


class RegisteredOperator:
    """A callable that goes through torch's dispatcher. Under autocast it computes in the dtypes it is given."""

    def __init__(self, name: str, implementation: Callable[..., Any]) -> None:
        self._qualified_name = f"alure::{name}"
        self.overload, self.implementation = getattr(torch.ops.alure, name).default, implementation
        self._backward: Callable[..., Any] = self._no_backward
        self._setup_context: Callable[..., None] = lambda ctx, inputs, output: None
        torch.library.register_autograd(
            self._qualified_name,
            lambda ctx, *gradients: self._backward(ctx, *gradients),
            setup_context=lambda ctx, inputs, output: self._setup_context(ctx, inputs, output),
            lib=_LIBRARY,
        )

    def __call__(self, *arguments: Any) -> Any:
        if forward_ad._current_level >= 0 and any(map(_has_tangent, arguments)):
            raise RuntimeError(f"{self._qualified_name}: it has no forward-mode derivative; use torch.autograd.grad")
        if torch._C._is_any_autocast_enabled():
            with torch._C._DisableAutocast():
                return self.overload(*arguments)
        return self.overload(*arguments)

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """Decorates a function of the same arguments that makes results of the right shapes and reads no values."""
        torch.library.register_fake(self._qualified_name, fake, lib=_LIBRARY)
        return fake

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., Any]) -> None:
        """backward(ctx, *gradients) gives a gradient or None for each argument; setup_context saves what it needs."""
        self._backward, self._setup_context = backward, setup_context

    def _no_backward(self, ctx: Any, *gradients: Any) -> Any:
        differentiated = self._qualified_name.removesuffix("_backward")
        if differentiated == self._qualified_name:
            raise RuntimeError(f"{self._qualified_name}: it has no derivative; detach what goes into it")
        raise RuntimeError(
            f"{differentiated}: it has no second derivative; leave out create_graph=True, or detach its gradients"
        )


def _has_tangent(argument: Any) -> bool:
    return isinstance(argument, torch.Tensor) and forward_ad.unpack_dual(argument).tangent is not None
