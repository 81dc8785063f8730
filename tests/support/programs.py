"""Reading compiled programs: what the devices ask of each other."""

from benchmarks.collectives import read_collectives


def collectives(program):
    """(opcode, shapes of the results, whether it runs in a loop) of every collective of a compiled program."""
    return [(found.opcode, found.shapes, found.in_loop) for found in read_collectives(program)]
