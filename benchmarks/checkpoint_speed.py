"""Speed and memory of sampling with the full-size CIFAR-10 network of EDM (DDPM++), with parameters drawn at random.

    uv run python benchmarks/checkpoint_speed.py --batch 256 --calls 10

For float32 and bfloat16 and two solvers it prints images a second, the time of a run over that of as many calls of the
jitted network, the time to compile, and the device's peak memory where the device tells it. Times are medians.
"""

import argparse
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import evodiff_jax as ed
from evodiff_jax import pretrained
from evodiff_jax.pretrained.model import DTYPES, build
from evodiff_jax.pretrained.states import original_shapes

CONFIGURATION = {
    "img_resolution": 32,
    "img_channels": 3,
    "label_dim": 10,
    "augment_dim": 9,
    "model_type": "SongUNet",
    "model_channels": 128,
    "channel_mult": [2, 2, 2],
}
SOLVERS = {"evodiff": ed.solvers.evodiff(), "dpm_solver_pp-2": ed.solvers.dpm_solver_pp(2)}


def main() -> None:
    """Prints one line a dtype and solver."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--calls", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    device = jax.devices()[0]
    print(f"{device.platform}, {device.device_kind}, jax {jax.__version__}; batch {args.batch}, {args.calls} calls")
    print("dtype     solver            images/s   over the calls   s a call   compile s   peak GiB")
    for dtype in DTYPES:
        measure(dtype, args.batch, args.calls, args.repeats)


def measure(dtype: str, batch: int, calls: int, repeats: int) -> None:
    """Prints the lines of one dtype."""
    model = drawn(dtype)
    x_T = model.schedule.noise(jax.random.key(0), (batch, *model.image_shape))
    labels = jnp.arange(batch) % model.num_classes
    call = jax.jit(lambda params, x: model.denoiser(params, labels)(x, jnp.float32(1.0)))
    one = median(lambda: call(model.params, x_T), repeats)
    run = jax.jit(lambda params, x_T, plan: ed.sample(model.denoiser(params, labels), x_T, plan))
    for name, solver in SOLVERS.items():
        plan = ed.plan(model.schedule, ed.grids.log_snr(model.schedule, calls), solver)
        start = time.perf_counter()
        compiled = run.lower(model.params, x_T, plan).compile()
        compile_time = time.perf_counter() - start
        whole = median(functools.partial(compiled, model.params, x_T, plan), repeats)
        peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", float("nan")) / 2**30
        print(
            f"{dtype:9} {name:16} {batch / whole:9.2f} {whole / (int(plan.calls) * one):16.3f} {one:10.4f}"
            f" {compile_time:11.1f} {peak:10.2f}"
        )


def drawn(dtype: str) -> pretrained.Model:
    """The network with parameters of the size that training starts from."""
    random = np.random.default_rng(0)
    arrays = {}
    for name, shape in original_shapes(build("edm", "EDMPrecond", CONFIGURATION)).items():
        scale = np.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.1
        offset = 1.0 if len(shape) == 1 and name.endswith("weight") else 0.0
        arrays[name] = offset + scale * random.standard_normal(shape, np.float32)
    return pretrained.from_state("edm", "EDMPrecond", CONFIGURATION, arrays, dtype=dtype)


def median(run: Callable[[], jax.Array], repeats: int) -> float:
    """Seconds of a run, the first of which is not counted."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return float(np.median(times[1:]))


if __name__ == "__main__":
    main()
