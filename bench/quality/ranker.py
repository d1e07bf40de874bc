"""A small DLRM (Naumov et al. 2019): hashed ids, counts, dot interactions, an MLP."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

HASH_ROWS = 1 << 14
WIDTH = 8
HIDDEN = 64
BATCH = 256
MOST_EPOCHS = 60
PATIENCE = 4  # epochs without a better loss before training stops
STOP_SHARE = 0.15  # newest part of the training window, which chooses the number of epochs


@dataclass(frozen=True)
class Examples:
    """Exposures, one row each."""

    ids: np.ndarray  # int64 [n, 4], −1 where there is none
    counts: np.ndarray  # float32 [n, c]
    users: Tensor  # float32 [n, k·d], of the newest snapshot before the request
    ads: Tensor  # float32 [n, k·d]
    labels: np.ndarray  # float32 [n]
    times: np.ndarray  # int64 [n], seconds


class Ranker(nn.Module):
    """Vectors of the ids and of the numbers, their dot products, and an MLP on both."""

    def __init__(self, num_ids: int, num_counts: int, embedding: int | None) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(HASH_ROWS, WIDTH) for _ in range(num_ids))
        for table in self.tables:
            nn.init.normal_(table.weight, std=0.05)  # type: ignore[arg-type]
        self.extra = nn.ModuleList(nn.Linear(embedding, WIDTH) for _ in range(2)) if embedding else None
        numbers = num_counts + (1 if embedding else 0)
        self.bottom = nn.Sequential(nn.Linear(numbers, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH))
        vectors = num_ids + 1 + (2 if embedding else 0)
        self.top = nn.Sequential(
            nn.Linear(vectors * (vectors - 1) // 2 + numbers, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1)
        )

    def forward(self, ids: Tensor, numbers: Tensor, users: Tensor, ads: Tensor) -> Tensor:
        """Logits [n]."""
        vectors = [table(ids[:, i]) for i, table in enumerate(self.tables)]
        if self.extra is not None:
            vectors += [layer(x) for layer, x in zip(self.extra, (users, ads))]
            numbers = torch.cat([numbers, F.cosine_similarity(users, ads)[:, None]], dim=1)
        stacked = torch.stack([*vectors, self.bottom(numbers)], dim=1)  # [n, vectors, WIDTH]
        pairs = torch.triu_indices(stacked.shape[1], stacked.shape[1], 1)
        dots = (stacked @ stacked.transpose(1, 2))[:, pairs[0], pairs[1]]
        return self.top(torch.cat([dots, numbers], dim=1))[:, 0]


def fit_and_score(examples: Examples, tested: np.ndarray, with_embeddings: bool, seed: int) -> np.ndarray:
    """Probabilities of the `tested` rows (bool [n]) by a ranker trained on the others: float64.

    The number of epochs is the best one on the newest STOP_SHARE of the others.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        old = np.flatnonzero(~tested)
        border = np.quantile(examples.times[old], 1 - STOP_SHARE)
        learn, choose = old[examples.times[old] <= border], old[examples.times[old] > border]
        inputs = tensors(examples, old)
        labels = torch.from_numpy(examples.labels)
        model = Ranker(
            examples.ids.shape[1], examples.counts.shape[1] + 2, examples.ads.shape[1] * with_embeddings or None
        )
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, weight_decay=1e-5)
        best, kept, waited = float("inf"), {}, 0
        for _ in range(MOST_EPOCHS):
            for rows in torch.from_numpy(learn)[torch.randperm(len(learn))].split(BATCH):
                loss = F.binary_cross_entropy_with_logits(model(*(x[rows] for x in inputs)), labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            with torch.no_grad():
                rows = torch.from_numpy(choose)
                loss = F.binary_cross_entropy_with_logits(model(*(x[rows] for x in inputs)), labels[rows])
            if float(loss) < best:
                best, kept = float(loss), {name: value.clone() for name, value in model.state_dict().items()}
                waited = 0
            else:
                waited += 1
            if waited == PATIENCE:
                break
        model.load_state_dict(kept)
        with torch.no_grad():
            rows = torch.from_numpy(np.flatnonzero(tested))
            return model(*(x[rows] for x in inputs)).double().sigmoid().numpy()


def tensors(examples: Examples, old: np.ndarray) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hashed ids; counts and the hour, standardised by the rows `old`; embeddings scaled to channels of variance 1."""
    hour = 2 * np.pi * (examples.times % 86_400) / 86_400
    numbers = np.concatenate([examples.counts, np.stack([np.sin(hour), np.cos(hour)], axis=1)], axis=1)
    numbers = (numbers - numbers[old].mean(0)) / np.maximum(numbers[old].std(0), 1e-6)
    hashed = (examples.ids + 1) * 2_654_435_761 % (1 << 32) % HASH_ROWS
    scale = examples.ads.shape[1] ** 0.5
    return (
        torch.from_numpy(hashed),
        torch.from_numpy(numbers.astype(np.float32)),
        examples.users * scale,
        examples.ads * scale,
    )
