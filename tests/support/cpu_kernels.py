"""The kernels of a program that XLA's CPU backend compiled: read from the optimised program and from the LLVM IR."""

import pathlib
import re
from typing import NamedTuple

import jax


class Kernel(NamedTuple):
    """A fusion of the optimised program, which XLA compiles to a function of its own."""

    opcodes: frozenset[str]  # "gather", "reduce", …: the instructions that are fused
    in_conditional: bool  # whether a branch of a conditional calls it
    vectors: frozenset[str] | None  # LLVM's instructions on four floats or more: "load", "fmul", …; None: no IR found


def dump(folder: pathlib.Path, f, *shapes):
    """Compile `f`, and write into `folder` what `read` needs: the optimised program and the LLVM IR of its kernels."""
    options = {"xla_dump_to": str(folder)}
    if jax.__version_info__ >= (0, 11):
        options["xla_dump_emitter_re"] = ".*llvm.*"  # without it 0.11 and later dump no LLVM IR
    program = jax.jit(f).lower(*shapes).compile(compiler_options=options)
    (folder / "program.txt").write_text(program.as_text())


def read(folder: pathlib.Path) -> list[Kernel]:
    """The kernels of the program that `dump` wrote, without the fusions (`kCustom`) that XLA hands to a library."""
    program = (folder / "program.txt").read_text()
    computations = dict(re.findall(r"^(?:ENTRY )?%([\w.-]+) \(.*\{\n((?: .*\n)*)", program, re.MULTILINE))
    branches = {
        name
        for listed in re.findall(r" conditional\(.*(?:branch_computations=\{|true_computation=)(.*)", program)
        for name in re.findall(r"%([\w.-]+)", listed)
    }
    kernels = []
    for inside, lines in computations.items():
        for name, fused in re.findall(r"%([\w.-]+) = .* fusion\(.*kind=(?!kCustom)\w+, calls=%([\w.-]+)", lines):
            opcodes = frozenset(re.findall(r" = .*? ([a-z][a-z-]*)\(", computations[fused]))
            kernels.append(Kernel(opcodes, inside in branches, _vectors(folder, name)))
    return kernels


def _vectors(folder: pathlib.Path, name: str) -> frozenset[str] | None:
    for file in folder.glob(f"*.{name}_kernel_module.ir-with-opt.ll"):
        return frozenset(re.findall(r" = (\w+)\b.*? <(?!2 x)\d+ x float>", file.read_text()))
    return None
