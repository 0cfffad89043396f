"""Counts the arrays of the state's size that a compiled sampler moves for each model call, from the optimised program.

    uv run python benchmarks/traffic.py

A sampler is bound by memory: what it costs beside the network is the arrays that it reads and writes. The count adds
the operands and results of every instruction of the loop's body, and what the instructions of its subroutines move. A
slice of an array counts as the slice, an update in place as the update. Instructions that move less than 0.4 states are
left out. The network is the identity with a factor, so that its read and write are among the counted.

Prints for solvers of the registry: arrays a call and instructions that move them, forward and in the gradient of a sum
of squares; temporary memory of the gradient in states; CPU seconds to trace and compile. A padded plan is the same with
a plan of 10 calls and max_calls=16 as argument.
"""

import argparse
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import evodiff_jax as ed
from evodiff_jax.solvers import FORMS

_BYTES = {"f64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1, "s8": 1, "u8": 1}
_MOVES_NOTHING = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while", "conditional", "call"}
_CALLS = "body|to_apply|true_computation|false_computation|branch_computations"
_SMALL = 0.4  # states
SOLVERS = ("ddim", "dpm_solver_pp-2", "unipc-2", "ipndm-4", "evodiff", "variance_optimal")


class Instruction(NamedTuple):
    """One instruction of a program in XLA's text form: `name = shape operation(operands), attributes`."""

    name: str
    shape: str
    operation: str
    operands: list[str]
    inner: str  # the text between the parentheses
    attributes: str
    is_root: bool


Program = dict[str, list[Instruction]]


def size_of(shape: str) -> int:
    """Bytes of a shape such as f32[64,32]{1,0}, or of all parts of a tuple of shapes."""
    found = re.findall(r"(\w+)\[([\d,]*)\]", shape)
    return sum(_BYTES.get(dtype, 0) * int(np.prod([int(n) for n in dims.split(",") if n])) for dtype, dims in found)


def parse(text: str) -> tuple[Program, str]:
    """The computations of an optimised program by name, and the name of the one that it starts with."""
    program: Program = {}
    entry, current = "", ""
    for line in text.splitlines():
        if head := re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$", line):
            current = head[2]
            program[current] = []
            entry = current if head[1] else entry
        elif found := re.match(r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$", line):
            depth, end = 1, 0
            while depth and end < len(found[5]):
                depth += {"(": 1, ")": -1}.get(found[5][end], 0)
                end += 1
            inner = found[5][: end - 1]
            operands = re.findall(r"%([\w.\-]+)", inner)
            instruction = Instruction(found[2], found[3], found[4], operands, inner, found[5][end:], bool(found[1]))
            program[current].append(instruction)
    return program, entry


def arrays_moved(compiled: jax.stages.Compiled, state_bytes: int) -> tuple[float, int]:
    """Arrays of the state's size that one pass through the program's loops moves, and by how many instructions.

    Args:
      compiled: the program.
      state_bytes: the size of the state.

    Returns:
      The sum over the bodies of all loops (a gradient has one forward and one backward), and the instructions.
    """
    program, entry = parse(compiled.as_text() or "")
    moved = [bytes_ / state_bytes for bytes_ in _moved(program, entry, False, set())]
    large = [arrays for arrays in moved if arrays >= _SMALL]
    return sum(large), len(large)


def _moved(program: Program, name: str, in_loop: bool, seen: set[tuple[str, bool]]) -> Iterator[int]:
    """Bytes that each instruction of a computation moves, and those of the computations that it calls."""
    if (name, in_loop) in seen:
        return
    seen.add((name, in_loop))
    shapes = {instruction.name: instruction.shape for instruction in program[name]}
    for instruction in program[name]:
        operation = instruction.operation
        if operation in ("while", "call", "conditional"):
            for part in re.findall(rf"(?:{_CALLS})=\{{?([^}},]*(?:, ?%[^}},]*)*)", instruction.attributes):
                for called in re.findall(r"[\w.\-]+", part):
                    if called in program:
                        yield from _moved(program, called, in_loop or operation == "while", seen)
        if not in_loop or operation in _MOVES_NOTHING:
            continue
        sizes = [size_of(shapes.get(operand, "")) for operand in instruction.operands]
        if operation == "fusion":
            called = re.search(r"calls=%?([\w.\-]+)", instruction.attributes)
            assert called is not None
            yield _moved_by_fusion(program[called[1]], sizes)
        elif operation == "dynamic-update-slice":
            yield 2 * sizes[1]
        elif operation == "dynamic-slice":
            yield 2 * size_of(instruction.shape)
        else:
            yield sum(sizes) + size_of(instruction.shape)


def _moved_by_fusion(body: Sequence[Instruction], sizes: Sequence[int]) -> int:
    """Bytes that a fusion reads of its operands and writes."""
    by_name = {instruction.name: instruction for instruction in body}
    number = {i.name: int(i.inner) for i in body if i.operation == "parameter"}
    for instruction in body:
        if instruction.operation == "bitcast" and instruction.operands[0] in number:
            number[instruction.name] = number[instruction.operands[0]]
    read = dict.fromkeys(number.values(), 0)
    for instruction in body:
        for position, operand in enumerate(instruction.operands):
            if operand not in number or instruction.operation == "bitcast":
                continue
            whole = sizes[number[operand]]
            if position == 0 and instruction.operation == "dynamic-slice":
                whole = size_of(instruction.shape)
            elif position == 0 and instruction.operation == "dynamic-update-slice":
                whole = 0
            read[number[operand]] += whole
    (root,) = (instruction for instruction in body if instruction.is_root)
    written = 0
    for result in [by_name[name] for name in root.operands] if root.operation == "tuple" else [root]:
        while result.operation == "bitcast":
            result = by_name[result.operands[0]]
        if result.operation == "dynamic-update-slice":
            result = by_name[result.operands[1]]
        written += size_of(result.shape)
    return written + sum(min(total, sizes[i]) for i, total in read.items())


class Cost(NamedTuple):
    """What a compiled program moves a call, its temporary memory in states, and the CPU seconds to make it."""

    arrays: float
    instructions: int
    temporaries: float
    seconds: float


def cost(fn: Callable[..., Any], x: jax.ShapeDtypeStruct, *args: Any) -> Cost:
    """Compiles a function of a state, and counts."""
    state_bytes = int(np.prod(x.shape)) * x.dtype.itemsize
    start = time.process_time()
    compiled = jax.jit(fn).lower(x, *args).compile()
    seconds = time.process_time() - start
    analysis = compiled.memory_analysis()
    temporaries = float("nan") if analysis is None else analysis.temp_size_in_bytes / state_bytes
    return Cost(*arrays_moved(compiled, state_bytes), temporaries, seconds)


def sampler(plan: ed.Plan | None = None) -> Callable[..., jax.Array]:
    """A run with the identity with a factor for a network; without `plan` it is the second argument."""
    denoise = lambda x, t: x * (1 / (1 + t**2))
    return lambda x, *plans: ed.sample(denoise, x, *plans, *([] if plan is None else [plan]))


def gradient_of(fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The gradient of the sum of the squares of a run's result."""
    return jax.grad(lambda x, *args: jnp.sum(fn(x, *args) ** 2))


def main() -> None:
    """Prints a row for each solver."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--solvers", nargs="+", choices=FORMS, default=SOLVERS)
    parser.add_argument("--shape", nargs="+", type=int, default=(128, 32, 32, 3))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()

    jax.config.update("jax_enable_compilation_cache", False)
    schedule = ed.schedules.edm()
    x, times = jax.ShapeDtypeStruct(tuple(args.shape), args.dtype), ed.grids.log_snr(schedule, 10)
    size = "x".join(map(str, args.shape))
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, state {args.dtype} {size}\n")
    print("| solver | plan | forward: arrays | instructions | s | gradient: arrays | temporaries | s |")
    print(f"|---|---|{'---:|' * 6}")
    cost(sampler(ed.plan(schedule, times, ed.solvers.ddim())), x)  # the first compilation sets up more than itself
    for name in args.solvers:
        solver = FORMS[name].make()
        exact, padded = ed.plan(schedule, times, solver), ed.plan(schedule, times, solver, max_calls=16)
        for form, fn, plans in (("exact", sampler(exact), ()), ("padded", sampler(), (padded,))):
            forward, backward = cost(fn, x, *plans), cost(gradient_of(fn), x, *plans)
            counted = f"{forward.arrays:.1f} | {forward.instructions} | {forward.seconds:.2f} | {backward.arrays:.1f}"
            print(f"| {name} | {form} | {counted} | {backward.temporaries:.1f} | {backward.seconds:.2f} |", flush=True)


if __name__ == "__main__":
    main()
