"""Every launch that Triton's interpreter runs is looked at for races and for accesses outside of tensors."""

from collections.abc import Iterator

import pytest

from alure.kernels.backend import has_triton, triton_interprets

collect_ignore = [] if has_triton() else ["test_sanitizer.py"]


@pytest.fixture(autouse=True)
def launches_are_sanitized() -> Iterator[None]:
    if not triton_interprets():
        yield
        return
    from support.sanitizer import sanitized

    with sanitized():
        yield
