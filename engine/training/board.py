"""A training's figures as TensorBoard shows them."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from alure.engine.errors import InputError


class Board:
    """Event files in `folder`; without one nothing is written. A context manager, as the files are to be closed.

    start: steps that were done already; what a killed run wrote after them is not shown any more.
    """

    def __init__(self, folder: Path | None, start: int = 0) -> None:
        self.writer = None
        if folder is None:
            return
        check_installed()
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=start + 1)

    def __enter__(self) -> "Board":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.writer is not None:
            self.writer.close()

    def add(self, step: int, values: Mapping[str, float]) -> None:
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def flush(self) -> None:
        if self.writer is not None:
            self.writer.flush()


def check_installed() -> None:
    """InputError where the package tensorboard is missing."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"training.tensorboard: needs the package tensorboard, which cannot be imported ({error}); "
            "pip install 'alure[tensorboard]', or leave the option out"
        ) from None
