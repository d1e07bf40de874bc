"""The kernels import and run where Triton and the engine's packages are absent, and import nothing of the engine."""

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


BLOCK = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.split(".")[0] in {names} else real(name, package)
"""


def test_without_triton() -> None:
    printed = run(
        BLOCK.format(names={"triton"})
        + textwrap.dedent("""
        import torch
        import alure.kernels as kernels

        x = torch.randn(3, 2, 4, requires_grad=True)
        kernels.jagged_attention(x, x, x, torch.tensor([0, 1, 3]), backend="reference").sum().backward()
        try:
            kernels.jagged_attention(x, x, x, torch.tensor([0, 1, 3]), backend="triton")
        except ValueError as error:
            print(error)
        """)
    )
    assert "'triton' needs the package triton" in printed


def test_triton_is_imported_lazily() -> None:
    printed = run("""
        import sys
        import alure.kernels
        print([name for name in sys.modules if name.endswith(".kernel") and name.startswith("alure")])
    """)
    assert printed.strip() == "[]"


def test_kernels_know_nothing_of_the_engine() -> None:
    printed = run("""
        import sys
        import alure.kernels
        engine = {"pydantic", "pyarrow", "duckdb", "deltalake", "typer"}
        print(sorted({name.split(".")[0] for name in sys.modules} & engine))
        print([name for name in sys.modules if name.startswith("alure.engine")])
    """)
    assert printed.split("\n")[:2] == ["[]", "[]"]


def test_public_names() -> None:
    import alure.kernels

    for name in (
        "jagged_attention",
        "encode_events",
        "compress",
        "assign_clusters",
        "grouped_topk",
        "residual_quantize",
        "join_candidates",
        "personalized_pagerank",
        "TimeBias",
        "PositionBias",
    ):
        assert callable(getattr(alure.kernels, name)), name


@pytest.mark.parametrize("package", ["kernels", "engine"])
def test_packages_export_what_they_import(package: str) -> None:
    """mypy --strict and Pyright hold a name that is imported and not in __all__ for private."""
    inits = sorted((Path(__file__).parents[2] / package).glob("**/__init__.py"))
    assert len(inits) > 5
    for init in inits:
        body = ast.parse(init.read_text(encoding="utf-8")).body
        imported = {alias.name for node in body if isinstance(node, ast.ImportFrom) for alias in node.names}
        named = [node.value for node in body if isinstance(node, ast.Assign) and "__all__" in ast.unparse(node.targets)]
        exported = {name for value in named if isinstance(value, ast.List) for name in ast.literal_eval(value)}
        assert imported - {"TYPE_CHECKING", "Any"} <= exported, init
