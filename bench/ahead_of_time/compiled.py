"""Compiles the cases of every kernel.py for every architecture and measures what came out."""

import ast
import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from alure.bench.ahead_of_time import sass

ARCHITECTURES = (80, 90, 100)
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block can have
ROOT = Path(__file__).resolve().parents[2]  # `bench` and `kernels` lie side by side, in the repository and installed


@dataclass(frozen=True)
class Compiled:
    """What one case needs on one architecture.

    measures: registers (a thread); spills (bytes of local memory a thread); shared_memory (bytes a block); tensor
    (instructions of the tensor cores); slow_products (tl.dot that did not become the architecture's own tensor core
    instruction); atomics; and for every loop of the case "NAME instructions" and "NAME mufu", each the number that a
    thread issues for one element: of all instructions, of those of the special function unit.
    """

    case: str
    architecture: int
    measures: dict[str, float] = field(default_factory=dict)
    error: str = ""


OPERATORS = {
    path.parent.name: f"alure.kernels.{path.parent.name}.kernel" for path in sorted(ROOT.glob("kernels/*/kernel.py"))
}


def compile_cases(
    modules: dict[str, str],
    only: Collection[str],
    slow: bool,
    architectures: Collection[int] = ARCHITECTURES,
    workers: int | None = None,
) -> tuple[list[Compiled], list[str]]:
    """(the cases of the operators `only` as compiled; the names of all cases of all operators).

    `modules`: operator → the module that lists its cases. Without `slow` only those in AHEAD_OF_TIME are compiled.
    Runs in fresh processes: what was imported under TRITON_INTERPRET=1 cannot be compiled.
    """
    with ProcessPoolExecutor(workers or os.cpu_count(), get_context("spawn"), _compile_for_real) as pool:
        listed = dict(zip(modules, pool.map(_names, modules.items())))
        names = [name for of_operator in listed.values() for cases in of_operator for name, _ in cases]
        if repeated := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two cases of one name: {sorted(repeated)}; give them different names in their facts")
        jobs = [
            ((operator, modules[operator]), position, architecture)
            for operator in only
            for position, (_, meant_for) in enumerate(listed[operator][0] + (listed[operator][1] if slow else []))
            for architecture in architectures
            if architecture in meant_for
        ]
        return list(pool.map(_compile, *zip(*jobs))), names


def _compile_for_real() -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    sys.path[:] = [
        folder for folder in sys.path if Path(folder or ".").resolve() != ROOT
    ]  # its `kernels` is not theirs


def _cases(operator: str, module: str) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
    """(quick, slow) cases without those that both lists name, with options and facts filled in."""
    quick, slow = (
        [(*case, {}, {})[:5] for case in getattr(importlib.import_module(module), name, ())]
        for name in ("AHEAD_OF_TIME", "AHEAD_OF_TIME_SLOW")
    )
    known = {_name(operator, case) for case in quick}
    return quick, [case for case in slow if _name(operator, case) not in known]


def _names(operator: tuple[str, str]) -> tuple[list[tuple[str, Collection[int]]], ...]:
    """(quick, slow) cases: the name and the architectures of each."""
    return tuple(
        [(_name(operator[0], case), case[4].get("architectures", ARCHITECTURES)) for case in cases]
        for cases in _cases(*operator)
    )


def _name(operator: str, case: tuple[Any, ...]) -> str:
    kernel, _, constexprs, options, facts = case
    values = " ".join(f"{name}={value}" for name, value in {**constexprs, **options}.items())
    return f"{operator}: {facts.get('name') or f'{kernel.fn.__name__} {values}'}"


def _compile(operator: tuple[str, str], position: int, architecture: int) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    quick, slow = _cases(*operator)
    case = (quick + slow)[position]
    name = _name(operator[0], case)
    kernel, signature, constexprs, options, facts = case
    named = {argument: signature.get(argument, "constexpr") for argument in kernel.arg_names}
    unknown = [argument for argument in (*signature, *constexprs) if argument not in named]
    missing = [argument for argument in named if argument not in signature and argument not in constexprs]
    if unknown or missing:
        raise ValueError(f"{name}: unknown arguments {unknown}, missing arguments {missing}")
    aligned = [position for position, kind in enumerate(named.values()) if kind.endswith(":16")]
    source = ASTSource(
        fn=kernel,
        signature={argument: kind.removesuffix(":16") for argument, kind in named.items()},
        constexprs={(kernel.arg_names.index(argument),): value for argument, value in constexprs.items()},
        attrs={(position,): [["tt.divisibility", 16]] for position in aligned},
    )
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    except Exception as error:  # noqa: BLE001 - whatever the compiler says belongs in the verdict
        return Compiled(name, architecture, error=f"{type(error).__name__}: {error}")
    tools, code = triton.knobs.nvidia, compiled.asm["cubin"]
    instructions, labels = sass.parse(_run(tools.nvdisasm.path, code, "-c", "-gp"))
    usage = _run(tools.cuobjdump.path, code, "--dump-resource-usage")
    used = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    assert used is not None, usage
    measures: dict[str, float] = {
        "registers": int(used[1]),
        "spills": max(int(used[2]), int(used[3])),
        "shared_memory": compiled.metadata.shared,
        "tensor": sum(instruction.name in sass.TENSOR for instruction in instructions),
        "slow_products": slow_products(compiled.asm["ttgir"], architecture),
        "atomics": atomics(compiled.asm["ptx"]),
    }
    chains, regions = sass.call_chains(compiled.asm["ptx"]), _regions(operator[1])
    found = sass.named_loops(sass.loops(instructions, labels), chains, regions)
    threads = 32 * compiled.metadata.num_warps
    wanted = facts.get("loops", {})
    if unmarked := wanted.keys() - {region.name for region in regions}:
        return Compiled(name, architecture, measures, f"no comment `# loop: NAME` for {sorted(unmarked)}")
    for loop in [loop for loop in wanted if loop in found]:  # others are unrolled or flattened; the budget knows which
        measures[f"{loop} instructions"] = sum(found[loop].values()) * threads / wanted[loop]
        measures[f"{loop} mufu"] = found[loop].get("MUFU", 0) * threads / wanted[loop]
    return Compiled(name, architecture, measures)


def slow_products(ttgir: str, architecture: int) -> int:
    """How many products do not use the architecture's tensor core instruction, in Triton's GPU dialect.

    On sm_80 a product that uses tensor cores is a `tt.dot` whose result has an mma layout; later architectures have
    operations of their own, and any `tt.dot` that is left runs as mma.sync or as multiply-adds.
    """
    products = re.findall(r"= tt\.dot(?:_scaled)? .*-> tensor<[^#]*(#\w+)>", ttgir)
    if architecture >= 90:
        return len(products)
    mma = set(re.findall(r"^(#\w+) = #ttg\.nvidia_mma", ttgir, re.MULTILINE))
    return sum(layout not in mma for layout in products)


def atomics(ptx: str) -> int:
    """Read-modify-write operations on memory. The machine code can have more: they allocate tensor memory."""
    return len(re.findall(r"^\s*(?:@!?%p\d+\s+)?(?:atom|red|cp\.reduce)\.", ptx, re.MULTILINE))


def _run(program: str, cubin: bytes, *flags: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([program, *flags, file.name], capture_output=True, text=True, check=True).stdout


@cache
def _regions(module: str) -> list[sass.Region]:
    """Every comment `# loop: NAME` in the files beside the module's, with the lines of the statement it stands on."""
    folder = Path(str(importlib.import_module(module).__file__)).parent
    return [region for path in sorted(folder.glob("*.py")) for region in regions_of(path.name, path.read_text())]


def regions_of(file: str, text: str) -> Iterator[sass.Region]:
    statements = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.stmt)]
    for number, line in enumerate(text.splitlines(), 1):
        if marker := re.search(r"# loop: (.+)$", line):
            around = [node for node in statements if node.lineno <= number <= (node.end_lineno or node.lineno)]
            inner = min(around, key=lambda node: (node.end_lineno or node.lineno) - node.lineno)
            yield sass.Region(marker[1].strip(), file, inner.lineno, inner.end_lineno or inner.lineno)
