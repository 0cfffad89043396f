"""Prints what EVODiff adds to a model call, in units of the time that moving 11 arrays of the state takes.

    uv run python benchmarks/overhead.py

The network is the identity, so all of the time is the solver's: 20 steps on a state of 256 x 32 x 32 x 3 float32. A
copy moves two arrays, one read and one written; the copies run in the same process, in turn with the runs, over as
many arrays as the solver keeps (the state and three outputs), so that both see the same caches.
"""

import os
import time

import jax
import jax.numpy as jnp
import numpy as np

import evodiff_jax as ed
from evodiff_jax.solvers import SOLVERS

SHAPE = (256, 32, 32, 3)
CALLS = 20
ROUNDS = 60
ARRAYS_MOVED = 11
ARRAYS_KEPT = 4


def seconds(fn) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def main() -> None:
    """Measures every solver against the copy bandwidth and prints a table."""
    schedule = ed.schedules.edm()
    times = ed.grids.log_snr(schedule, CALLS)
    x_T = schedule.t_max * jax.random.normal(jax.random.key(0), SHAPE, jnp.float32)
    arrays = [np.array(x_T) + i for i in range(ARRAYS_KEPT)]
    turn = 0

    def copy() -> None:
        nonlocal turn
        np.copyto(arrays[(turn + 1) % ARRAYS_KEPT], arrays[turn % ARRAYS_KEPT])
        turn += 1

    megabytes = x_T.nbytes / 1e6
    print(f"device {jax.devices()[0]}, {os.cpu_count()} CPU cores, jax {jax.__version__}")
    print(f"state {SHAPE} float32, {megabytes:.2f} MB; {CALLS} steps; medians of {ROUNDS} rounds")
    print("solver                ms/call  copy GB/s  11 arrays ms  ratio  temporary states")
    forms = [(name, make()) for name, make in SOLVERS.items()]
    forms.append(("evodiff, per sample", ed.solvers.evodiff(channel_axis=None)))
    for name, solver in forms:

        def run(x: jax.Array, solver: ed.Solver = solver) -> jax.Array:
            return ed.sample(lambda x, t: x, x, times, schedule, solver)

        calls = int(ed.plan(schedule, times, solver).calls)
        compiled = jax.jit(run).lower(x_T).compile()
        memory = compiled.memory_analysis()
        temporary = "" if memory is None else f"{memory.temp_size_in_bytes / x_T.nbytes:.2f}"
        runs, copies = [], []
        for _ in range(ROUNDS):
            runs.append(seconds(lambda: compiled(x_T).block_until_ready()))  # noqa: B023
            copies.append(seconds(lambda: [copy() for _ in range(CALLS)]))
        per_call, per_copy = np.median(runs) / calls, np.median(copies) / CALLS
        limit = per_copy * ARRAYS_MOVED / 2
        print(
            f"{name:20s} {per_call * 1e3:8.3f} {2 * x_T.nbytes / per_copy / 1e9:10.1f} {limit * 1e3:13.3f} "
            f"{per_call / limit:6.2f} {temporary:>17s}"
        )


if __name__ == "__main__":
    main()
