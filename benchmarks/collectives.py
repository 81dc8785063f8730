"""What one run of a compiled program moves, by its text: between devices, and through the memory of one."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.launches import FREE

OPCODES = re.compile(
    r"((?:all|reduce|collective|ragged)-(?:reduce|gather|scatter|to-all|permute|broadcast|all-to-all)|send|recv)(-start|-done)?$"
)
INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)(.*)")
COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) .*\{$")
CALLED = re.compile(r"(?:calls|to_apply|body|condition|branch_computations)=\{?(%?[\w.-]+(?:, %[\w.-]+)*)")
CONTROL = {"while", "conditional", "call", "async-start"}  # what they call is made of instructions, not of one kernel
TYPE = re.compile(r"(pred|[a-z]+?(\d+)\w*)\[([\d,]*)\]")


class Collective(NamedTuple):
    """A collective of a program."""

    opcode: str  # "all-reduce", …
    shapes: list[tuple[int, ...]]  # of its results; one that is started and awaited may list its operands first
    nbytes: int  # of what a device puts in, each time
    devices: int  # that exchange with each other; 0 where the text does not say
    runs: int  # in one run of the program; in a loop of unknown length, of one turn of the loop
    in_loop: bool

    @property
    def sent(self) -> float:
        """Bytes that a device sends in one run of the program, if the exchange goes around a ring.

        A sum goes around twice: once to add up the parts, once to hand out the sums. A gather
        sends what a device puts in to all others; a permutation sends it to one.
        """
        n = max(self.devices, 1)
        match self.opcode:
            case "all-reduce":
                times = 2 * (n - 1) / n
            case "all-gather":
                times = n - 1
            case "reduce-scatter" | "all-to-all":
                times = (n - 1) / n
            case _:
                times = 1
        return self.runs * times * self.nbytes


def read_collectives(text: str) -> list[Collective]:
    """The collectives of a program, `compiled.as_text()`, each once however many parts it is carried out in."""
    computations = _computations(text)
    runs = _runs(computations)
    found: dict[str, Collective] = {}
    for name, lines in computations.items():
        sizes = {line[1]: _bytes(line[2]) for line in lines}
        for line in lines:
            kind = OPCODES.match(line[3])
            if not kind or kind[2] == "-done":
                continue
            one = Collective(
                kind[1],
                [_shape(dims) for _, _, dims in TYPE.findall(line[2])],
                _operand_bytes(line, sizes),
                _devices(line[5]),
                runs[name].times,
                runs[name].in_loop,
            )
            # A TPU's compiler fuses the start, the middle and the end of one collective with kernels on its way.
            parts = re.search(r"channel_id=\d+", line[5]) if not runs[name].scheduled else None
            found.setdefault(f"{one.opcode} {parts[0]}" if parts else f"{name} {line[1]}", one)
    return list(found.values())


def memory_traffic(text: str) -> int:
    """Bytes that the kernels of a program read and write, if each reads its operands and writes its results once.

    A kernel that reads a part of an operand counts the whole. One that reads it several times, as
    the four corners of bilinear samples do, counts it once.
    """
    computations = _computations(text)
    total = 0
    for name, run in _runs(computations).items():
        if run.scheduled:
            lines = computations[name]
            sizes = {line[1]: _bytes(line[2]) for line in lines}
            total += run.times * sum(
                _operand_bytes(line, sizes) + sizes[line[1]]
                for line in lines
                if line[3] not in FREE | CONTROL and not OPCODES.match(line[3])
            )
    return total


class _Run(NamedTuple):
    """How a computation runs."""

    times: int
    in_loop: bool
    scheduled: bool  # its instructions are kernels, not parts of one


def _computations(text: str) -> dict[str, list[re.Match]]:
    """The instructions of each computation; "ENTRY" is the program."""
    computations: dict[str, list[re.Match]] = {}
    lines: list[re.Match] = []
    for line in text.splitlines():
        if (found := COMPUTATION.match(line)) and (found[1] or "->" in line):
            lines = computations["ENTRY" if found[1] else found[2]] = []
        elif found := INSTRUCTION.match(line):
            lines.append(found)
    return computations


def _runs(computations: dict[str, list[re.Match]]) -> dict[str, _Run]:
    """How each computation runs."""
    runs = dict.fromkeys(computations, _Run(0, False, False))
    calls = {name: list(_calls(computations, name)) for name in computations}

    def visit(name: str, run: _Run) -> None:
        times, in_loop, scheduled = runs[name]
        runs[name] = _Run(times + run.times, in_loop or run.in_loop, scheduled or run.scheduled)
        for callee, turns, opcode in calls[name]:
            loop = run.in_loop or opcode == "while"
            visit(callee, _Run(run.times * turns, loop, run.scheduled and opcode in CONTROL))

    if "ENTRY" in computations:
        visit("ENTRY", _Run(1, False, True))
    return runs


def _calls(computations: dict[str, list[re.Match]], name: str) -> Iterator[tuple[str, int, str]]:
    """What a computation calls: the callee, how often at a time, and the instruction that calls it."""
    for line in computations[name]:
        turns = _turns(computations, line) if line[3] == "while" else 1
        for callees in CALLED.findall(line[5]):
            for callee in callees.replace("%", "").split(", "):
                if callee in computations:
                    yield callee, turns, line[3]


def _turns(computations: dict[str, list[re.Match]], loop: re.Match) -> int:
    """How often a loop's body runs: what XLA says, or else the one number that its condition compares with; 1 if unknown."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop[5]):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.-]+)", loop[5])
    bounds = [line[4] for line in computations.get(condition[1] if condition else "", ()) if line[3] == "constant"]
    return int(bounds[0]) if len(bounds) == 1 and bounds[0].isdigit() else 1


def _operand_bytes(line: re.Match, sizes: dict[str, int]) -> int:
    return sum(sizes.get(operand, 0) for operand in re.findall(r"%?([\w.-]+)(?:,|$)", line[4]))


def _devices(attributes: str) -> int:
    """The devices of a group, from `{{0,1},{2,3}}`, `[2,4]<=[8]` or `mesh['a'=2,'b'=4] {'b'}`."""
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(found[1])
    if found := re.search(r"replica_groups=@?\w*mesh\w*\[(.*?)\][^{]*\{(.*?)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        return math.prod(sizes[axis] for axis in re.findall(r"'(\w+)'", found[2]))
    return 0


def _shape(dims: str) -> tuple[int, ...]:
    return tuple(map(int, filter(None, dims.split(","))))


def _bytes(result: str) -> int:
    """The bytes of a result's arrays."""
    return sum(math.prod(_shape(dims)) * (int(bits) if bits else 8) for _, bits, dims in TYPE.findall(result)) // 8
