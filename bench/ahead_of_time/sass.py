"""GPU machine code as nvdisasm prints it: instructions, the loops they form, and the source lines they come from.

Loops are natural loops: a branch back to a block that every way to the branch passes. So the wait loops that the
assembler puts out of line do not pass for loops over tiles.
"""

import re
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass, field

_INSTRUCTION = re.compile(
    r"^\s+/\*[0-9a-f]{4,}\*/\s+(?P<guard>@!?U?P\w+\s+)?(?P<opcode>[A-Z][A-Z0-9_.]*)\s*(?P<operands>.*);"
)
_LABEL = re.compile(r"^(\.L_x_\d+):")
_PTX_LINE = re.compile(r'^\s*//## File ".nv_debug_ptx_txt", line (\d+)')
_LOCATION = re.compile(r"([\w.]+\.py):(\d+):\d+")

# First parts of opcodes, "HGMMA" of "HGMMA.64x32x16.F32.BF16".
TENSOR = {"HMMA", "IMMA", "HGMMA", "IGMMA", "QGMMA", "UTCHMMA", "UTCIMMA", "UTCQMMA", "UTCOMMA"}
_ONE_TO_ONE = TENSOR | {"MUFU", "LDG", "LDGSTS", "LDS", "LDSM", "STG", "STS"}


@dataclass(frozen=True)
class Instruction:
    """ptx_line: the line of the PTX that it was made from, 0 where nvdisasm does not say."""

    opcode: str
    operands: str
    target: str | None  # the label a branch jumps to
    guarded: bool  # runs or not by a predicate
    ptx_line: int

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]


@dataclass
class Loop:
    """`own`: the instructions of the loop that are in no loop within it; `latch`: the last branch back to its start."""

    own: list[Instruction]
    latch: Instruction
    nested: list["Loop"] = field(default_factory=list)

    def unrolled(self) -> int:
        """How many iterations of the PTX's loop one iteration holds: so often every PTX instruction is there.

        Counts those that as a rule become one machine instruction: memory, special function and tensor core operations.
        """
        lines = Counter(instruction.ptx_line for instruction in self.own if instruction.name in _ONE_TO_ONE)
        return min(lines.values(), default=1)


def parse(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """(instructions, label → index of the instruction after it) of the kernel that `nvdisasm -c -gp` printed."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    ptx_line = 0
    for line in text.splitlines():
        if found := _PTX_LINE.match(line):
            ptx_line = int(found[1])
        elif found := _LABEL.match(line):
            labels[found[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            opcode, operands = found["opcode"], found["operands"]
            target = re.search(r"`\((\.L_x_\d+)\)", operands)
            guarded = bool(found["guard"]) or ".DIV" in opcode or re.match(r"!?U?P\d", operands) is not None
            instructions.append(Instruction(opcode, operands, target[1] if target else None, guarded, ptx_line))
    return instructions, labels


def loops(instructions: list[Instruction], labels: dict[str, int]) -> list[Loop]:
    """The outermost loops, in the order of their first instructions."""
    starts, successors = _blocks(instructions, labels)
    bodies = _natural_loops(successors)  # header → blocks
    ends = [*(start - 1 for start in starts[1:]), len(instructions) - 1]
    latches = {header: max(block for block in bodies[header] if header in successors[block]) for header in bodies}
    found = {header: Loop([], instructions[ends[latches[header]]]) for header in bodies}
    roots = []
    for header, body in sorted(bodies.items()):
        around = [other for other in bodies if other != header and header in bodies[other]]
        if around:
            found[min(around, key=lambda other: len(bodies[other]))].nested.append(found[header])
        else:
            roots.append(found[header])
        inside = {block for other in body & bodies.keys() if other != header for block in bodies[other]}
        for block in sorted(body - inside):
            found[header].own += instructions[starts[block] : ends[block] + 1]
    return roots


def _blocks(instructions: list[Instruction], labels: dict[str, int]) -> tuple[list[int], list[list[int]]]:
    """(first instruction of every basic block, the blocks that can follow it)."""
    jumps = {"BRA", "BSYNC", "EXIT", "RET"}
    starts = {0, *(at for at in labels.values() if at < len(instructions))}
    starts |= {at + 1 for at, this in enumerate(instructions[:-1]) if this.name in jumps}
    ordered = sorted(starts)
    successors = []
    for end in [*ordered[1:], len(instructions)]:
        last = end - 1
        this = instructions[last]
        after = [last + 1] if this.guarded or this.name not in {"BRA", "EXIT", "RET"} else []
        if this.name == "BRA" and this.target is not None:
            after.append(labels[this.target])
        if this.name == "BSYNC":  # continues where the BSSY before it said that the threads meet
            met = [other for other in instructions[:last] if other.name == "BSSY" and _barrier(other) == _barrier(this)]
            after += [labels[other.target] for other in met[-1:] if other.target is not None]
        successors.append(sorted({bisect_right(ordered, at) - 1 for at in after if at < len(instructions)}))
    return ordered, successors


def _barrier(instruction: Instruction) -> str:
    return instruction.operands.split(",")[0].strip()


def _natural_loops(successors: list[list[int]]) -> dict[int, set[int]]:
    reachable = {0}
    waiting = [0]
    while waiting:
        new = set(successors[waiting.pop()]) - reachable
        reachable |= new
        waiting += new
    before = {block: [other for other in sorted(reachable) if block in successors[other]] for block in reachable}
    dominators = {block: set(reachable) for block in reachable} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for block in sorted(reachable - {0}):
            new = {block} | set.intersection(*(dominators[other] for other in before[block]))
            changed |= new != dominators[block]
            dominators[block] = new
    bodies: dict[int, set[int]] = {}
    for block in sorted(reachable):
        for header in dominators[block].intersection(successors[block]):
            body = bodies.setdefault(header, {header})
            waiting = [block]
            while waiting:
                block_of_body = waiting.pop()
                if block_of_body not in body:
                    body.add(block_of_body)
                    waiting += before[block_of_body]
    return bodies


def call_chains(ptx: str) -> list[list[tuple[str, int]]]:
    """For each line of the PTX (from 1; 0 has none): (file, line) of the source, innermost function first."""
    chains: list[list[tuple[str, int]]] = [[]]
    current: list[tuple[str, int]] = []
    for line in ptx.splitlines():
        if line.lstrip().startswith(".loc"):
            current = [(file, int(number)) for file, number in _LOCATION.findall(line)]
        chains.append(current)
    return chains


@dataclass(frozen=True)
class Region:
    """Lines of a source file that make up the loop called `name`."""

    name: str
    file: str
    first: int
    last: int


def named_loops(
    loops: list[Loop], chains: list[list[tuple[str, int]]], regions: list[Region]
) -> dict[str, dict[str, float]]:
    """Name → opcode (its first part) → how many of them one iteration of the loop of that name issues.

    A loop is named after the region that its branch back comes from, through whatever was inlined: that is the line
    with `for`, or at least one of the loop's last. (Most instructions of a loop can be those that a pipeline set up for
    the loop within it.) A loop within it that has no other name belongs to it, and is taken to run once. Of several
    loops of one name the longest counts.
    """
    found: dict[str, dict[str, float]] = {}

    def visit(loop: Loop, around: str | None) -> dict[str, float]:
        waits = not {instruction.name for instruction in loop.own} - {"SYNCS", "BRA", "NANOSLEEP"}  # for a product
        name = around if waits else _region_of(chains[loop.latch.ptx_line], regions) or around
        counts: dict[str, float] = {
            opcode: number / loop.unrolled() for opcode, number in Counter(this.name for this in loop.own).items()
        }
        for inner in loop.nested:
            for opcode, number in visit(inner, name).items():
                counts[opcode] = counts.get(opcode, 0) + number
        if name is None or name == around:
            return counts
        if sum(counts.values()) > sum(found.get(name, {}).values()):
            found[name] = counts
        return {}

    for loop in loops:
        visit(loop, None)
    return found


def _region_of(chain: list[tuple[str, int]], regions: list[Region]) -> str | None:
    for file, line in chain:
        around = [region for region in regions if region.file == file and region.first <= line <= region.last]
        if around:
            return min(around, key=lambda region: region.last - region.first).name
    return None
