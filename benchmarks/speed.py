"""Prints Markdown tables of what sampling costs beside the network: time, compilation and memory.

    uv run python benchmarks/speed.py
    uv run python benchmarks/speed.py --quick

1. Versions, device, and copy bandwidth, over as many arrays as EVODiff keeps.
2. What a solver adds to a model call, with the identity for a network, and the same in units of moving 11 arrays of
   the state at the copy bandwidth measured in the same rounds: on a CPU that of one thread, which more cores than one
   can exceed, and that of a thread a core. And what padding adds: a plan of 20 calls with max_calls=40.
3. The overhead of PyTorch peers, on a CPU and where torch and diffusers can be imported: the `step` of diffusers'
   schedulers, and EVODiff's own release, beside `evodiff, released`, where --released is its evodiff.py
   (code_demo/edm_cifar10/samplers in github.com/ShiguiLi/EVODiff, with utils.py beside it; the file is executed). The
   release takes states of four axes with the channels second: the same elements are given to it so. It divides 0 by 0
   for the identity, and NaN took it a third longer; so its predictions are three random arrays in turn, which cost
   nothing.
4. A U-Net: sampling in 10 calls over 10 calls of the jitted network alone; the packaged one on a CPU, one of 20
   million random weights at batch 16 and 128 on other devices.
5. Seconds to trace and compile, and the size of the program, against the number of steps.
6. Temporary memory of samplers and of gradients, in states.

`benchmarks/traffic.py` counts the arrays that each solver moves.

The peers need an environment of their own, and pip: other installers may choose a build of torch for another device.

    python3 -m venv ../torchenv
    ../torchenv/bin/pip install torch==2.13.0
    ../torchenv/bin/pip install diffusers -e .
    ../torchenv/bin/python benchmarks/speed.py --released ../EVODiff/code_demo/edm_cifar10/samplers/evodiff.py
"""

import argparse
import importlib
import itertools
import math
import os
import sys
import time
import types
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import evodiff_jax as ed
from evodiff_jax import pretrained, solvers

Turn = Callable[[], float]

ON_CPU = ((64, 32, 32, 3), (256, 32, 32, 3), (4, 64, 64, 4, 16))
ELSEWHERE = ((64, 256, 256, 3), (512, 32, 32, 3))
DTYPES = (jnp.float32, jnp.bfloat16)  # the second one is measured on other devices than a CPU
CALLS = 20
COPIES = 200
ARRAYS_MOVED = 11
ARRAYS_KEPT = 5
CORES = os.cpu_count() or 1
SCHEDULE = ed.schedules.edm()
SOLVERS = {
    "ddim": solvers.ddim(),
    "dpm_solver_pp-2": solvers.dpm_solver_pp(2),
    "unipc-2": solvers.unipc(2),
    "evodiff, released": solvers.evodiff(last_step="released"),
    "variance_optimal": solvers.variance_optimal(),
}


class Peer(NamedTuple):
    """A PyTorch sampler: what it is called, the solver here that does the same, and a run of CALLS calls from a state.

    The run returns its seconds.
    """

    name: str
    ours: str
    run: Callable[[Any], float]


def seconds(fn: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call, until the arrays that it returns are there."""
    start = time.perf_counter()
    jax.block_until_ready(fn())
    return time.perf_counter() - start


def medians(turns: dict[str, Turn], rounds: int) -> dict[str, float]:
    """Median seconds of every turn, taken in rounds so that all see the same load of the machine."""
    found = {name: [] for name in turns}
    for _ in range(rounds):
        for name, turn in turns.items():
            turn()  # until the threads of the turn before no longer spin, and the caches hold this one's arrays
            found[name].append(turn())
    return {name: float(np.median(values)) for name, values in found.items()}


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """One Markdown table."""
    print(f"| {' | '.join(header)} |\n|{' --- |' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def title(shape: Sequence[int]) -> str:
    """A shape as 64x32x32x3."""
    return "x".join(map(str, shape))


def noise(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """The state that a run starts from."""
    return SCHEDULE.noise(jax.random.key(0), shape, dtype)


def states() -> list[jax.Array]:
    """What solvers are timed on."""
    if jax.default_backend() == "cpu":
        return [noise(shape) for shape in ON_CPU]
    return [noise(shape, dtype) for shape in ELSEWHERE for dtype in DTYPES]


def copying(x: jax.Array) -> dict[str, Turn]:
    """COPIES copies of the state, by who makes them."""
    if jax.default_backend() != "cpu":
        copies = jax.jit(lambda x: jax.lax.fori_loop(0, COPIES, lambda _, x: -x, x))
        return {"the device": lambda: seconds(lambda: copies(x))}

    def copy(arrays: list[np.ndarray]) -> None:
        for turn in range(COPIES):
            np.copyto(arrays[(turn + 1) % ARRAYS_KEPT], arrays[turn % ARRAYS_KEPT])

    def by(threads: int) -> Turn:
        parts = [[part + i for i in range(ARRAYS_KEPT)] for part in np.array_split(np.array(x).ravel(), threads)]
        pool = ThreadPoolExecutor(threads)
        return lambda: seconds(lambda: list(pool.map(copy, parts)))

    return {"1 thread": by(1), f"{CORES} threads": by(CORES)}


def identity_sampler(x: jax.Array, solver: ed.Solver, max_calls: int | None = None) -> Any:
    """The compiled run of CALLS steps with the identity for a network, with a padded plan where max_calls is given."""
    plan = ed.plan(SCHEDULE, ed.grids.log_snr(SCHEDULE, CALLS), solver, max_calls=max_calls)
    if max_calls is None:
        return jax.jit(lambda x: ed.sample(lambda x, t: x, x, plan)).lower(x).compile()
    plan = jax.device_put(jax.tree.map(lambda a: jnp.asarray(a), plan))
    compiled = jax.jit(lambda x, plan: ed.sample(lambda x, t: x, x, plan)).lower(x, plan).compile()
    return lambda x: compiled(x, plan)


def temporary(compiled: jax.stages.Compiled, state_bytes: int) -> str:
    """Peak temporary memory in states, where the backend tells it."""
    analysis = compiled.memory_analysis()
    return "n/a" if analysis is None else f"{analysis.temp_size_in_bytes / state_bytes:.2f}"


def print_machine(rounds: int) -> None:
    """Versions, the device and its copy bandwidth."""
    x = states()[1]
    found = medians(copying(x), rounds)
    rates = ", ".join(f"{2 * x.nbytes * COPIES / value / 1e9:.1f} GB/s by {who}" for who, value in found.items())
    print(
        f"jax {jax.__version__}, backend {jax.default_backend()}, {jax.devices()[0].device_kind}, {CORES} CPU cores\n"
    )
    print(f"copies of {x.nbytes / 1e6:.2f} MB, read and written: {rates}")


def print_overhead(rounds: int, peers: Sequence[Peer]) -> None:
    """Time that a solver adds to a model call, of the solvers here and of the peers."""
    ours, theirs, copiers = [], [], []
    for x in states():
        state = f"{title(x.shape)} {x.dtype}"
        copies = copying(x)
        turns = dict(copies)
        for name, solver in SOLVERS.items():
            for form, max_calls in ((name, None), (f"{name} padded", 2 * CALLS)):
                run = identity_sampler(x, solver, max_calls)
                turns[form] = lambda run=run, x=x: seconds(lambda: run(x))
        for peer in peers:
            turns[peer.name] = lambda peer=peer, x=x: peer.run(np.array(x))
        found = medians(turns, rounds)
        per_call = {name: value / (COPIES if name in copies else CALLS) for name, value in found.items()}
        copiers = [f"in units of {ARRAYS_MOVED} arrays by {who}" for who in copies]
        for name in SOLVERS:
            units = [f"{per_call[name] / (per_call[who] * ARRAYS_MOVED / 2):.2f}" for who in copies]
            padding = f"{(per_call[f'{name} padded'] - per_call[name]) * 1e3:.3f}"
            ours.append((state, f"`{name}`", f"{per_call[name] * 1e3:.3f}", padding, *units))
        for peer in peers:
            a, b = per_call[peer.name], per_call[peer.ours]
            theirs.append((state, peer.name, f"{a * 1e3:.3f}", f"`{peer.ours}`", f"{b * 1e3:.3f}", f"{a / b:.1f}"))
    print(f"\n### Solver overhead, identity network, {CALLS} calls\n")
    print_table(("state", "solver", "ms a call", "more if padded", *copiers), ours)
    if not peers:
        print("\nNo PyTorch peers: they are measured on a CPU, where torch and diffusers can be imported.")
    else:
        print(f"\n### PyTorch peers, {CALLS} calls, {CORES} threads\n")
        print_table(("state", "peer", "ms a call", "ours", "ms a call", "peer / ours"), theirs)


def diffusers_peers() -> list[Peer]:
    """The second-order schedulers of diffusers; none where it or torch cannot be imported."""
    try:
        import diffusers  # pyright: ignore[reportMissingImports]
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        return []
    torch.set_num_threads(CORES)

    def peer(name: str, ours: str, **settings: Any) -> Peer:
        scheduler = getattr(diffusers, name)(solver_order=2, prediction_type="sample", **settings)

        def run(state: np.ndarray) -> float:
            scheduler.set_timesteps(CALLS)  # which also forgets the run before
            times, x = list(scheduler.timesteps), torch.from_numpy(state)
            with torch.no_grad():
                start = time.perf_counter()
                for t in times:
                    x = scheduler.step(x, t, x, return_dict=False)[0]
                return time.perf_counter() - start

        return Peer(f"diffusers {diffusers.__version__} `{name}`", ours, run)

    return [
        peer("DPMSolverMultistepScheduler", "dpm_solver_pp-2", algorithm_type="dpmsolver++"),
        peer("UniPCMultistepScheduler", "unipc-2"),
    ]


def released_peer(path: Path) -> Peer:
    """EVODiff's release, from the file that its class is in."""
    import torch  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(CORES)
    package = types.ModuleType("released")  # its file imports from the one beside it, as of a package
    package.__path__ = [str(path.resolve().parent)]
    sys.modules["released"] = package
    schedule = importlib.import_module("released.utils").NoiseScheduleEDM()
    sampler = importlib.import_module(f"released.{path.stem}").EVODiff_edm(schedule)
    ends = {"t_start": SCHEDULE.t_max, "t_end": SCHEDULE.t_min, "skip_type": "logSNR"}

    def run(state: np.ndarray) -> float:
        x = torch.from_numpy(np.moveaxis(state, -1, 1).reshape(state.shape[0], state.shape[-1], state.shape[1], -1))
        predictions = itertools.cycle([torch.randn_like(x) for _ in range(3)])
        # In place of its model: the conversion from noise predictions is no part of the solver.
        sampler.data_prediction_fn = lambda x, t: next(predictions)
        return seconds(lambda: sampler.sample(None, x, steps=CALLS, **ends))

    return Peer("released EVODiff", "evodiff, released", run)


def network(batch: int) -> tuple[Any, jax.Array, Callable[..., jax.Array], str]:
    """Parameters, a state, denoise(params, x, t) for `batch` images, and what it is."""
    if jax.default_backend() == "cpu":
        model = pretrained.load("fashion_mnist")
        labels = jnp.arange(batch) % model.num_classes
        denoise = lambda params, x, t: model.denoiser(params, labels)(x, t)
        return model.params, noise((batch, *model.image_shape)), denoise, "the packaged U-Net"
    config = pretrained.UNetConfig(image_shape=(32, 32, 3), patch=1, widths=(128, 256, 384), blocks=(2, 2, 2), heads=6)
    x, labels = noise((batch, *config.image_shape)), jnp.arange(batch) % config.num_classes
    params = jax.jit(pretrained.UNet(config).init)(jax.random.key(0), x, jnp.zeros(batch), labels)["params"]
    denoise = lambda params, x, t: pretrained.apply_denoiser(config, 0.5, params, x, t, labels)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    return params, x, denoise, f"a U-Net of {size / 1e6:.1f} million random weights"


def print_end_to_end(rounds: int, batch: int, steps: int = 10) -> None:
    """Sampling with a U-Net against as many calls of the network alone."""
    params, x_T, denoise, words = network(batch)
    times = ed.grids.log_snr(SCHEDULE, steps)
    forward = jax.jit(denoise)

    def calls() -> jax.Array:
        x = x_T
        for t in np.asarray(times[:-1], np.float32):
            x = forward(params, x, t)
        return x

    sampler = jax.jit(lambda params, x_T, plan: ed.sample(lambda x, t: denoise(params, x, t), x_T, plan))
    turns: dict[str, Turn] = {"network": lambda: seconds(calls)}
    for name, solver in SOLVERS.items():
        plan = ed.plan(SCHEDULE, times, solver)
        turns[name] = lambda plan=plan: seconds(lambda: sampler(params, x_T, plan))
    found = medians(turns, rounds)
    alone = found.pop("network")
    print(f"\n### Sampling with {words}, {batch} images, {steps} steps\n")
    print(f"{steps} calls of the jitted network: {alone * 1e3:.1f} ms\n")
    rows = [(f"`{name}`", f"{value * 1e3:.1f}", f"{value / alone:.3f}") for name, value in found.items()]
    print_table(("solver", "ms", f"over {steps} network calls"), rows)


def print_compilation(step_counts: Sequence[int]) -> None:
    """Seconds to compile, size of the program and number of compilations against the number of steps."""
    params, x_T, denoise, words = network(16)

    def with_plan(params: Any, x_T: jax.Array, plan: ed.Plan) -> jax.Array:
        return ed.sample(lambda x, t: denoise(params, x, t), x_T, plan)

    def compile_with(steps: int, as_argument: bool) -> tuple[float, int]:
        plan = ed.plan(SCHEDULE, ed.grids.log_snr(SCHEDULE, steps), SOLVERS["variance_optimal"])
        jax.clear_caches()
        start = time.perf_counter()
        if as_argument:
            lowered = jax.jit(with_plan).lower(params, x_T, plan)
        else:
            lowered = jax.jit(lambda params, x_T: with_plan(params, x_T, plan)).lower(params, x_T)
        lowered.compile()
        return time.perf_counter() - start, len(lowered.as_text())

    compile_with(1, False)  # the first compilation of a process sets up more than itself
    rows = []
    for steps in step_counts:
        (constant, text), (argument, text_argument) = (compile_with(steps, form) for form in (False, True))
        rows.append((str(steps), f"{constant:.2f}", f"{argument:.2f}", f"{text:,}", f"{text_argument:,}"))
    print(f"\n### Compilation of `variance_optimal` with {words}\n")
    columns = ("s, constant plan", "s, plan as argument", "characters, constant plan", "characters, plan as argument")
    print_table(("steps", *columns), rows)

    compilations = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compilations.append(event) if event.endswith("backend_compile_duration") else None
    )
    run, sweep = jax.jit(with_plan), range(5, 21)
    for steps in sweep:
        times = ed.grids.log_snr(SCHEDULE, steps)
        run(params, x_T, ed.plan(SCHEDULE, times, SOLVERS["variance_optimal"], max_calls=sweep[-1]))
    counted = f"{len(compilations)} compilation(s)"
    print(f"\nPlans of {sweep[0]} to {sweep[-1]} steps as arguments, {len(sweep)} of them: {counted}")


def deep(x: jax.Array, t: jax.Array) -> jax.Array:
    """A network whose activations are many times its input."""
    for _ in range(4):
        x = jnp.tanh(jnp.concatenate([x] * 16, axis=-1) + t).reshape(*x.shape, 16).mean(-1)
    return x


def print_memory(step_counts: Sequence[int]) -> None:
    """Peak temporary memory of the compiled sampler and of its gradient."""
    x = states()[1]
    rows = [(f"`{name}`", temporary(identity_sampler(x, solver), x.nbytes)) for name, solver in SOLVERS.items()]
    print(f"\n### Temporary memory in states, identity network, {title(x.shape)}, {CALLS} calls\n")
    print_table(("solver", "states"), rows)

    shape = (8, 16, 16, 3)

    def gradient(solver: ed.Solver, steps: int, remat: bool) -> str:
        times = ed.grids.log_snr(SCHEDULE, steps)
        plan = ed.plan(SCHEDULE, times, solver)
        loss = lambda x: jnp.sum(ed.sample(deep, x, plan, remat=remat) ** 2)
        compiled = jax.jit(jax.grad(loss)).lower(jax.ShapeDtypeStruct(shape, jnp.float32)).compile()
        return temporary(compiled, 4 * math.prod(shape))

    print(f"\n### Temporary memory of gradients in states, {title(shape)}, activations of 128 states a call\n")
    rows = (
        (f"`{name}`", str(remat), *(gradient(solver, steps, remat) for steps in step_counts))
        for name, solver in SOLVERS.items()
        for remat in (True, False)
    )
    print_table(("solver", "remat", *(f"{steps} steps" for steps in step_counts)), rows)


def main() -> None:
    """Measures and prints all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and step counts")
    parser.add_argument("--released", type=Path, metavar="PATH", help="evodiff.py of EVODiff's own release")
    args = parser.parse_args()

    jax.config.update("jax_enable_compilation_cache", False)
    rounds = 5 if args.quick else 30
    peers = diffusers_peers() if jax.default_backend() == "cpu" else []
    if args.released and jax.default_backend() == "cpu":
        peers.append(released_peer(args.released))
    print_machine(rounds)
    print_overhead(rounds, peers)
    for batch in (16,) if jax.default_backend() == "cpu" else (16, 128):
        print_end_to_end(3 if args.quick else 15, batch)
    print_compilation((5, 100) if args.quick else (5, 10, 20, 50, 100))
    print_memory((10, 100) if args.quick else (10, 30, 100))


if __name__ == "__main__":
    main()
