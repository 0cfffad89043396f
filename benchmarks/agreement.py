"""Prints how often a classifier sees the class that was asked for in samples of the packaged model.

    uv run python benchmarks/agreement.py

1,000 class-conditional samples of the packaged Fashion-MNIST model for every solver, 10 model calls each on the
log-SNR grid, without guidance, judged by the packaged classifier; and the classifier's accuracy on the test images.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import evodiff_jax as ed
from evodiff_jax import pretrained
from evodiff_jax.evaluation import DETERMINISTIC, times_of
from evodiff_jax.evaluation.data import CLASS_NAMES, load_fashion_mnist

BATCH = 200


def main() -> None:
    """Samples, classifies and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="fashion_mnist", help="packaged model or model file")
    parser.add_argument("--samples", type=int, default=1000, help="a multiple of 200")
    parser.add_argument("--calls", type=int, default=10)
    args = parser.parse_args()

    model, classifier = pretrained.load(args.model), pretrained.load_classifier("fashion_mnist")
    schedule = model.schedule
    labels = np.arange(args.samples) % model.num_classes
    predict = jax.jit(lambda params, x: jnp.argmax(classifier.predict(params, x).logits, -1))
    print(f"{model.name}, {model.metadata['steps']:,} training steps; {args.samples} samples, {args.calls} calls")
    try:
        test = load_fashion_mnist("test")
    except FileNotFoundError as error:
        print(f"(no test images: {error})")
    else:
        right = [predict(classifier.params, x) for x in np.split(test.images, 50)]
        print(f"classifier on the test images: {100 * np.mean(np.concatenate(right) == test.labels):.1f} %")
    print(f"{'':20s}{'all':>6s}" + "".join(f"{name.split('/')[0][:9]:>11s}" for name in CLASS_NAMES))
    for name, make in DETERMINISTIC.items():
        times = times_of(schedule, ed.grids.log_snr, make(), args.calls)
        if times is None:  # an odd number of calls for a solver of two a step
            continue
        plan = ed.plan(schedule, times, make())

        @jax.jit
        def sample(params: Any, key: jax.Array, labels: jax.Array, plan: ed.Plan = plan) -> jax.Array:
            x_T = schedule.noise(key, (BATCH, *model.image_shape))
            return ed.sample(model.denoiser(params, labels), x_T, plan)

        seen = [
            predict(classifier.params, sample(model.params, jax.random.fold_in(jax.random.key(0), i), part))
            for i, part in enumerate(labels.reshape(-1, BATCH))
        ]
        agrees = np.concatenate(seen) == labels
        by_class = "".join(f"{100 * agrees[labels == c].mean():11.1f}" for c in range(model.num_classes))
        print(f"{name:20s}{100 * agrees.mean():6.1f}{by_class}", flush=True)


if __name__ == "__main__":
    main()
