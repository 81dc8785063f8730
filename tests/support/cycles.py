"""What a TPU's compiler estimates of its own program, read from its text.

The TPU's compiler writes `estimated_cycles` beside each instruction but gathers and scatters, whose rows are counted.
No time: it shows relayouts and passes over memory that nobody meant, and compares two forms of one program.
"""

import math
import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple


class Estimate(NamedTuple):
    """Of a whole program, loops included."""

    cycles: int
    gathered: int  # rows
    scattered: int


def estimate(program: str) -> Estimate:
    """What a program for a TPU takes, by its compiler."""
    computations = _computations(program)
    cycles = gathered = scattered = 0
    for times, line in _run(computations, _entry(program)):
        if found := re.search(r'"estimated_cycles":"(\d+)"', line):
            cycles += times * int(found[1])
        if " fusion(" not in line:
            continue
        inside = list(_fused(computations, line))
        rows = sum(_rows(line) for line in inside if " gather(" in line)
        if any(" scatter(" in line for line in inside):
            scattered += times * rows  # it gathers what it adds to
        else:
            gathered += times * rows
    return Estimate(cycles, gathered, scattered)


def bundles_in_loops(folder: pathlib.Path, name: str) -> list[int]:
    """How many bundles of instructions each loop of a TPU kernel has, by what its compiler dumped into `folder`.

    Bundles in no loop are the first; each loop within another begins where its own first bundle stands.
    """
    (file,) = (file for file in folder.glob("*-final_bundles.txt") if re.search(rf"-{name}[.\d]*-\d+-final", file.name))
    counts, depth = [0], 0
    for line in file.read_text().splitlines():
        if bundle := re.match(r"\s*(?:\d+:?)?\s*0x[0-9a-f]+\s+.*?: (>*) ?\{", line):
            if len(bundle[1]) != depth:
                depth = len(bundle[1])
                counts.append(0)
            counts[-1] += 1
    return counts


def _entry(program: str) -> str:
    return re.search(r"^ENTRY %([\w.-]+)", program, re.MULTILINE)[1]


def _computations(program: str) -> dict[str, list[str]]:
    """The instructions of every computation, by its name."""
    computations, lines = {}, []
    for line in program.splitlines():
        if head := re.match(r"(?:ENTRY )?%([\w.-]+) \(.*\{$", line):
            lines = computations[head[1]] = []
        elif line.startswith(" "):
            lines.append(line)
    return computations


def _run(computations: dict[str, list[str]], name: str, times: int = 1) -> Iterator[tuple[int, str]]:
    """Every instruction that is run, with how often."""
    for line in computations[name]:
        if loop := re.search(r" while\(.*condition=%([\w.-]+), body=%([\w.-]+)", line):
            # It runs while its counter is below the largest constant of its condition.
            bounds = re.findall(r"s32\[\]\S* constant\((\d+)\)", "\n".join(computations[loop[1]]))
            yield from _run(computations, loop[2], times * max(map(int, bounds)))
        elif " conditional(" in line or " call(" in line:
            for inner in re.findall(r"(?:to_apply|_computation)=%([\w.-]+)", line):
                yield from _run(computations, inner, times)
        else:
            yield times, line


def _fused(computations: dict[str, list[str]], line: str) -> Iterator[str]:
    """What a fusion is made of, fusions within it included."""
    if found := re.search(r" fusion\(.*calls=%([\w.-]+)", line):
        for inner in computations[found[1]]:
            yield inner
            yield from _fused(computations, inner)


def _rows(line: str) -> int:
    """All axes but the last of the result of an instruction."""
    sizes = re.search(r" = \w+\[([\d,]*)\]", line)[1].split(",")
    return math.prod(map(int, sizes[:-1]))
