"""Reading compiled programs: what the devices ask of each other."""

import re


def collectives(program):
    """(opcode, shapes of the results, whether it runs in a loop) of every collective of a compiled program."""
    bodies, called, found, computation = set(), {}, [], None
    for line in program.splitlines():
        if line.endswith("{") and ("->" in line or line.startswith("ENTRY")):
            computation = line.removeprefix("ENTRY ").split()[0].lstrip("%")
        if computation is None or " = " not in line:
            continue
        names = re.findall(r"(?:calls|to_apply|body|condition|branch_computations)=\{?%?([\w.-]+)", line)
        called.setdefault(computation, set()).update(names)
        bodies.update(re.findall(r"body=%?([\w.-]+)", line))
        result, opcode = re.match(r"\s*(?:ROOT )?%?[\w.-]+ = (\(.*?\)|\S+) ([\w-]+)\(", line).groups()
        if re.match("all-|reduce-scatter|collective-|send|recv|ragged", opcode) and not opcode.endswith("-done"):
            shapes = [tuple(map(int, filter(None, dims.split(",")))) for dims in re.findall(r"\w+\[([\d,]*)\]", result)]
            found.append((opcode, shapes, computation))
    looped = set()
    while bodies:
        computation = bodies.pop()
        if computation not in looped:
            looped.add(computation)
            bodies |= called.get(computation, set())
    return [(opcode, shapes, computation in looped) for opcode, shapes, computation in found]
