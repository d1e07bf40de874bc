"""AdamW for the dense parameters, row-wise Adagrad for the hashed table, and the learning rate over time."""

import math

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

WARM_UP = 0.05  # share of the steps
LAST_RATE = 0.05  # of the learning rate, at the end of the cosine
CLIP = 1.0  # norm of the dense gradient
TABLE_RATE = 50  # × the learning rate, for the table; Recall@10 in the synthetic world: .15 at 3, .17 at 10, .20 at 30;
#                  on a small catalogue that every batch reads whole (ml-1m), 400 is better than 50


class RowwiseAdagrad(Optimizer):
    """Adagrad with one accumulator a row, touching only the rows of a sparse gradient (as in FBGEMM's tables).

    A step costs the rows of the batch, not of the table, and the state is 1/d_e of the table.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, eps: float = 1e-8) -> None:
        super().__init__(params, {"lr": lr, "eps": eps})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                grad = parameter.grad.coalesce()
                rows, values = grad.indices()[0], grad.values()
                state = self.state[parameter]
                if not state:
                    state["sum"] = torch.zeros(parameter.shape[0], device=parameter.device)
                total = state["sum"][rows] + values.square().mean(dim=1)
                state["sum"][rows] = total
                scale = group["lr"] / (total.sqrt() + group["eps"])
                parameter[rows] = parameter[rows] - scale[:, None] * values


class Optimization:
    """Both optimizers and their schedule: linear warm-up, then a cosine."""

    def __init__(
        self,
        model: nn.Module,
        table: nn.Parameter,
        learning_rate: float,
        weight_decay: float,
        steps: int,
        table_learning_rate: float | None = None,
    ) -> None:
        self.parameters = dict(model.named_parameters())
        dense = {name: p for name, p in self.parameters.items() if p is not table}
        decayed = [p for name, p in dense.items() if name.endswith(".weight") and p.dim() == 2]
        decayed_ids = {id(p) for p in decayed}
        others = [p for p in dense.values() if id(p) not in decayed_ids]
        self.dense = list(dense.values())
        self.table = table
        self.steps = steps
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        table_rate = TABLE_RATE * learning_rate if table_learning_rate is None else table_learning_rate
        self.optimizers: list[Optimizer] = [
            torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), fused=True),
            RowwiseAdagrad([table], lr=table_rate),
        ]
        self.rates = [learning_rate, table_rate]

    def step(self, number: int) -> bool:
        """Apply the gradients of step `number`, from 0. False, and nothing applied, where they are not finite."""
        norm = nn.utils.clip_grad_norm_(self.dense, CLIP)
        finite = bool(torch.isfinite(norm)) and (self.table.grad is None or _finite(self.table.grad))
        if finite:
            factor = schedule(number, self.steps)
            for optimizer, rate in zip(self.optimizers, self.rates):
                for group in optimizer.param_groups:
                    group["lr"] = rate * factor
                optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        return finite

    def state(self) -> dict[str, Tensor]:
        """What the optimizers remember, `parameter.key`; load_state takes it back."""
        return {
            f"{name}.{key}": value
            for name, p in self.parameters.items()
            for key, value in self.optimizers[p is self.table].state[p].items()
        }

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            owner, _, key = name.rpartition(".")
            p = self.parameters[owner]
            self.optimizers[p is self.table].state[p][key] = tensor.to(p.device)


def schedule(step: int, steps: int) -> float:
    """Factor of the learning rate at `step` of `steps`."""
    warm_up = max(1, round(steps * WARM_UP))
    if step < warm_up:
        return (step + 1) / warm_up
    share = (step - warm_up) / max(1, steps - warm_up)
    return LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * share))


def _finite(grad: Tensor) -> bool:
    values = grad._values() if grad.is_sparse else grad
    return bool(torch.isfinite(values).all())
