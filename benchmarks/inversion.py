"""Prints how well images come back from noise that inversion found for them, for every deterministic solver.

    uv run python benchmarks/inversion.py

64 test images of Fashion-MNIST (without the data set, samples of the model), the packaged model with their labels, 50
model calls up to sigma = 80 and 50 back on the log-SNR grid: the root mean square error of the reconstruction in units
of the images (-1 to 1), and the mean and deviation of the noise, which would be 0 and 1 for noise.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import evodiff_jax as ed
from evodiff_jax import pretrained
from evodiff_jax.evaluation import DETERMINISTIC, times_of
from evodiff_jax.evaluation.data import load_fashion_mnist


def main() -> None:
    """Inverts, samples and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--calls", type=int, default=50)
    args = parser.parse_args()

    model = pretrained.load("fashion_mnist")
    schedule = model.schedule
    labels = jnp.arange(args.images) % model.num_classes

    try:
        test = load_fashion_mnist("test")
    except FileNotFoundError:
        x_T = schedule.noise(jax.random.key(0), (args.images, *model.image_shape))
        plan = ed.plan(schedule, ed.grids.log_snr(schedule, 100), ed.solvers.unipc(2))
        images = jax.jit(lambda params, x: ed.sample(model.denoiser(params, labels), x, plan))(model.params, x_T)
        print(f"{args.images} samples of the model")
    else:
        images, labels = jnp.asarray(test.images[: args.images]), jnp.asarray(test.labels[: args.images])
        print(f"{args.images} test images")
    print(f"{args.calls} model calls up, {args.calls} back, log-SNR grid\n")
    print(f"{'':20s}{'reconstruction':>16s}{'noise mean':>12s}{'deviation':>12s}")
    for name, make in DETERMINISTIC.items():
        solver = make()
        times = times_of(schedule, ed.grids.log_snr, solver, args.calls)
        if times is None:  # an odd number of calls for a solver of two a step
            continue

        @jax.jit
        def there_and_back(
            params: Any, images: jax.Array, labels: jax.Array, times: np.ndarray = times, solver: ed.Solver = solver
        ) -> tuple[jax.Array, jax.Array]:
            denoise = model.denoiser(params, labels)
            noise = ed.editing.invert(denoise, images, schedule, times, solver)
            return noise / schedule.t_max, ed.sample(denoise, noise, ed.plan(schedule, times, solver))

        noise, back = there_and_back(model.params, images, labels)
        error = float(jnp.sqrt(jnp.mean((back - images) ** 2)))
        print(f"{name:20s}{error:16.4f}{float(jnp.mean(noise)):12.3f}{float(jnp.std(noise)):12.3f}", flush=True)


if __name__ == "__main__":
    main()
