"""Trains the packaged models again, on Fashion-MNIST.

    uv run python benchmarks/train.py --out runs/diffusion
    uv run python benchmarks/train.py --what classifier --out runs/classifier

A run that was stopped goes on with --resume.
"""

import argparse
import dataclasses
import shlex
import sys

import training

from evodiff_jax.evaluation.data import load_fashion_mnist
from evodiff_jax.pretrained import ClassifierConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the program's arguments."""
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


def run(args: argparse.Namespace) -> None:
    """Trains.

    Args:
      args: what `add_arguments` parsed.

    Raises:
      ValueError: an argument is out of range, or the folder's run is another one.
      FileNotFoundError: the data, or the run to resume, are not there.
      OSError: the folder cannot be written.
    """
    if args.what == "diffusion":
        config = training.TrainConfig(steps=20_000, batch=64, seed=args.seed)
    else:
        config = training.TrainConfig(
            network=ClassifierConfig(), steps=3_000, batch=128, seed=args.seed, warmup=100, decay_start=500
        )
    given = {k: getattr(args, k) for k in ("steps", "cooldown", "batch") if getattr(args, k) is not None}
    config = dataclasses.replace(config, **given)
    command = shlex.join(["benchmarks/train.py", *sys.argv[1:]])
    path = training.train(config, load_fashion_mnist("train", args.data), args.out, resume=args.resume, command=command)
    print(path)


def main() -> None:
    """Reads the arguments and trains; what went wrong is one line on stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    try:
        run(parser.parse_args())
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"train: error: {error}")


if __name__ == "__main__":
    main()
