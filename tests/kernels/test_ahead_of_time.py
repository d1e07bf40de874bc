"""Every Triton kernel compiles for A100, H100 and B200 without a GPU, in registers and in shared memory."""

from pathlib import Path

import pytest
from support.ahead_of_time import SHARED_MEMORY, Compiled, compile_cases, kernel_modules

pytest.importorskip("triton")
MODULES = kernel_modules(Path(__file__).parents[2])


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.split(".")[2])
def test_compiles_without_spills(module: str) -> None:
    compiled = compile_cases(module)
    assert compiled, f"{module}.AHEAD_OF_TIME is empty"
    check(compiled)


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.split(".")[2])
def test_every_configuration_compiles_without_spills(module: str) -> None:
    check(compile_cases(module, "AHEAD_OF_TIME_SLOW"))


def check(compiled: list[Compiled]) -> None:
    faults = []
    for case in compiled:
        where = f"sm_{case.architecture} {case.name}"
        if case.error:
            faults.append(f"{where}: {case.error}")
        if case.spilled:
            faults.append(f"{where}: spills {case.spilled} bytes a thread ({case.registers} registers)")
        if case.shared_memory > SHARED_MEMORY[case.architecture]:
            faults.append(f"{where}: {case.shared_memory} bytes of shared memory")
    assert not faults, "\n".join(faults)
