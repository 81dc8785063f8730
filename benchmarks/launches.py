"""How often a compiled program for a GPU launches something, by its text."""

import functools
import re

# What names or moves values without work of the device's
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "add-dependency"),
    *("opt-barrier", "partition-id", "replica-id"),
}
INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?[\w.-]+ = (?:\(.*?\)|\S+) ([\w-]+)\(")
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")


def count_launches(text: str) -> int:
    """Kernels, copies and calls of libraries in one run of a program, `compiled.as_text()`.

    A loop counts as often as XLA says it runs, once where it does not; of branches all count.
    """
    computations: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if found := COMPUTATION.match(line):
            name = found[2]
            computations[name] = []
            entry = name if found[1] else entry
        elif name:
            computations[name].append(line)

    @functools.cache
    def count(name: str) -> int:
        return sum(map(count_line, computations.get(name, ())))

    def count_line(line: str) -> int:
        found = INSTRUCTION.match(line)
        if not found or found[1] in FREE or found[1].endswith(("-done", "-update")):
            return 0
        if found[1] == "while":
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)
            # XLA runs a loop of known trips without its condition.
            parts = re.findall(r"body=%?([\w.-]+)" if trips else r"(?:condition|body)=%?([\w.-]+)", line)
            return (int(trips[1]) if trips else 1) * sum(map(count, parts))
        if found[1] == "conditional":
            branches = re.search(r"branch_computations=\{(.*?)\}", line)
            names = (
                branches[1].split(", ") if branches else re.findall(r"(?:true|false)_computation=(\S+?)(?:,|$)", line)
            )
            return sum(count(name.strip("% ")) for name in names)
        if found[1] == "call":
            return sum(map(count, re.findall(r"to_apply=%?([\w.-]+)", line)))
        return 1  # a fusion or a custom call, say; what it is made of is launched with it

    return count(entry)
