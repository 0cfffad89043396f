"""`evodiff-jax train`: trains the packaged models again."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `evodiff-jax train`."""
    parser.add_argument(
        "--what", choices=("diffusion", "classifier"), default="diffusion", help="what to train (default: %(default)s)"
    )
    parser.add_argument("--data", metavar="DIR", help="folder of the Fashion-MNIST IDX files")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder of the run")
    parser.add_argument("--steps", type=int, help="steps in all (default: 20000, classifier 3000)")
    parser.add_argument(
        "--cooldown", type=int, help="steps at the end over which the learning rate falls to 0 (default: 0)"
    )
    parser.add_argument("--batch", type=int, help="images a step (default: 64, classifier 128)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, batches and noise (default: 0)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")


def run_train(args: argparse.Namespace) -> None:
    """Runs `evodiff-jax train`.

    Args:
        args: what `add_train_arguments` parsed.

    Raises:
        ValueError: an argument is out of range, or the folder's run is another one.
        FileNotFoundError: the data, or the run to resume, are not there.
        OSError: the folder cannot be written.
    """
    from evodiff_jax.data import load_fashion_mnist
    from evodiff_jax.models.classifier import ClassifierConfig
    from evodiff_jax.training import TrainConfig, train

    if args.what == "diffusion":
        config = TrainConfig(steps=20_000, batch=64, seed=args.seed)
    else:
        config = TrainConfig(
            network=ClassifierConfig(), steps=3_000, batch=128, seed=args.seed, warmup=100, decay_start=500
        )
    given = {k: getattr(args, k) for k in ("steps", "cooldown", "batch") if getattr(args, k) is not None}
    config = dataclasses.replace(config, **given)
    command = shlex.join(["evodiff-jax", *sys.argv[1:]])
    path = train(config, load_fashion_mnist("train", args.data), args.out, resume=args.resume, command=command)
    print(path)
