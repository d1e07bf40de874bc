"""Triton kernels compiled for GPUs that are not here: registers, spills and shared memory of every shipped case.

A kernel.py lists what it ships in `AHEAD_OF_TIME`: tuples (kernel, signature, constexprs) or, with launch options,
(kernel, signature, constexprs, {"num_warps": 4, "num_stages": 2}). `signature` maps every argument that is not a
constexpr to its type: "*bf16", "*i64", "i32", "fp32"; ":16" after it says that the value (the address of a pointer) is
a multiple of 16, which is what the launcher sees for torch tensors.
What would take minutes goes into a second list, `AHEAD_OF_TIME_SLOW`, compiled by the tests marked slow.

`compile_cases(module)` runs in a fresh process, because kernels imported under TRITON_INTERPRET=1 cannot be compiled.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

ARCHITECTURES = (80, 90, 100)
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block can have


@dataclass(frozen=True)
class Compiled:
    """What a GPU needs for one case. spilled: bytes a thread keeps in local memory because registers ran out."""

    name: str
    architecture: int
    registers: int
    spilled: int
    shared_memory: int
    error: str = ""


def kernel_modules(root: Path) -> list[str]:
    """Import names of all kernels/*/kernel.py under the repository `root`."""
    return sorted(f"alure.kernels.{path.parent.name}.kernel" for path in root.glob("kernels/*/kernel.py"))


def compile_cases(module: str, cases: str = "AHEAD_OF_TIME") -> list[Compiled]:
    """Compiles every case in the list `cases` of `module` for every architecture."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, module, cases]
    with tempfile.TemporaryDirectory() as elsewhere:  # not the repository: its folder `kernels` would shadow others
        done = subprocess.run(command, env=environment, cwd=elsewhere, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"compiling {module} failed:\n{done.stdout}{done.stderr}")
    return [Compiled(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]


def _compile(module: str, cases: str, index: int, architecture: int) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, signature, constexprs, *rest = getattr(importlib.import_module(module), cases)[index]
    options = rest[0] if rest else {}
    values = " ".join(f"{name}={value}" for name, value in {**constexprs, **options}.items())
    name = f"{kernel.fn.__name__}[{values}]"
    named = {argument: signature.get(argument, "constexpr") for argument in kernel.arg_names}
    unknown = [argument for argument in (*signature, *constexprs) if argument not in named]
    missing = [argument for argument in named if argument not in signature and argument not in constexprs]
    if unknown or missing:
        raise ValueError(f"{name}: unknown arguments {unknown}, missing arguments {missing}")
    hints = {
        (position,): [["tt.divisibility", 16]] for position, kind in enumerate(named.values()) if kind.endswith(":16")
    }
    source = ASTSource(
        fn=kernel,
        signature={argument: kind.removesuffix(":16") for argument, kind in named.items()},
        constexprs={(kernel.arg_names.index(argument),): value for argument, value in constexprs.items()},
        attrs=hints,
    )
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    except Exception as error:  # noqa: BLE001 - whatever the compiler says belongs in the test's message
        return Compiled(name, architecture, 0, 0, 0, f"{type(error).__name__}: {error}")
    registers, spilled = _resources(compiled.asm["cubin"])
    return Compiled(name, architecture, registers, spilled, compiled.metadata.shared)


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of local memory) a thread of the kernel in `cubin` uses."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    used = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    assert used is not None, text
    return int(used[1]), max(int(used[2]), int(used[3]))


def _main() -> None:
    module, cases = sys.argv[1:]
    number = len(getattr(importlib.import_module(module), cases, ()))
    jobs = [(module, cases, index, architecture) for index in range(number) for architecture in ARCHITECTURES]
    with ProcessPoolExecutor(max_workers=os.cpu_count(), mp_context=get_context("fork")) as workers:
        for result in workers.map(_compile, *zip(*jobs)):
            sys.stdout.write(json.dumps(asdict(result)) + "\n")


if __name__ == "__main__":
    _main()
