"""`evodiff-jax verify`, `grid` and `export`: what `generate` wrote."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from evodiff_jax.cli.output import check_folder, check_output, make_picture, write_all
from evodiff_jax.extras import require

_MAX_SHOWN = 10_000
_NAMED = 5  # numbers of chunks in a message


def add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `evodiff-jax verify`."""
    _add_place(parser)


def run_verify(args: argparse.Namespace) -> None:
    """Runs `evodiff-jax verify`.

    Raises:
      ValueError: there is no run, it is not complete, or chunks are damaged.
      OSError: it cannot be read.
    """
    require("tqdm", extra="generate")
    from tqdm import tqdm

    from evodiff_jax import generation

    with tqdm(unit="image", desc="verifying", leave=False, disable=None) as bar:
        found = generation.verify(args.place, lambda count: _update(bar, count))
    layout = found.layout
    wrong = [
        f"{len(numbers):,} {word} ({', '.join(map(str, numbers[:_NAMED]))}{', ...' * (len(numbers) > _NAMED)})"
        for word, numbers in (("damaged", found.damaged), ("missing", found.missing))
        if numbers
    ]
    if wrong:
        raise ValueError(
            f"{args.place!r}: of {layout.chunks:,} chunks {' and '.join(wrong)}: start the command that made them again"
        )
    print(f"images   {layout.num:,} of {' x '.join(map(str, layout.shape[1:]))}, {found.intact:,} chunks intact")
    print(f"digest   {found.digest}")
    for name, value in found.manifest.items():
        print(f"{name:<8} {value}")
    if found.not_finite:
        print(f"note     {found.not_finite:,} samples were not finite; their images are gray")


def add_grid_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `evodiff-jax grid`."""
    _add_place(parser)
    add = parser.add_argument
    add(
        "--select", default="0:64", metavar="NUMBERS", help="such as 7, 0:64, -10: or 5,0:100:10 (default: %(default)s)"
    )
    add("--partial", action="store_true", help="also of a run that is not complete; what is missing is black")
    add("--out", type=Path, default=Path("evodiff_grid.png"), metavar="PNG", help="picture (default: %(default)s)")


def run_grid(args: argparse.Namespace) -> None:
    """Runs `evodiff-jax grid`.

    Raises:
      ValueError: there are no such images, or they are no pictures.
      OSError: a file cannot be read or written.
    """
    check_output("--out", args.out, ".png")
    require("PIL", extra="generate")
    from evodiff_jax import generation

    images = generation.open(args.place, partial=args.partial)
    if images.shape[-1] not in (1, 3):
        raise ValueError(f"{args.place!r}: images of {images.shape[-1]} channels, a PNG shows 1 or 3")
    numbers = selected(args.select, len(images))
    # Back in -1 .. 1, from where the drawing rounds to the same bytes.
    pixels = images[np.array(numbers)].astype(np.float32) / np.float32(127.5) - 1
    picture = make_picture(pixels, np.arange(len(numbers)))
    write_all({args.out: lambda file: picture.save(file, format="PNG")})
    print(f"images   {len(numbers):,} of {len(images):,}")
    print(f"output   {args.out}")


def selected(text: str, count: int) -> list[int]:
    """The numbers that are asked for, in order.

    Raises:
      ValueError: they are no numbers, none, too many, or beyond what there is.
    """
    numbers: list[int] = []
    for part in text.split(","):
        try:
            ends = [int(end) if end.strip() else None for end in part.split(":")]
            if len(ends) == 1:
                numbers.append(range(count)[ends[0] if ends[0] is not None else count])
            elif len(ends) <= 3:
                numbers.extend(range(*slice(*ends).indices(count)))
            else:
                raise ValueError
        except IndexError as error:
            raise ValueError(f"argument --select: there are {count} images, got {part!r}") from error
        except ValueError as error:
            raise ValueError(f"argument --select: must be such as 7, 0:64 or 5,0:100:10, got {part!r}") from error
    if not 1 <= len(numbers) <= _MAX_SHOWN:
        raise ValueError(f"argument --select: must be 1 to {_MAX_SHOWN} images, {text!r} are {len(numbers)} of {count}")
    return numbers


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `evodiff-jax export`."""
    _add_place(parser)
    parser.add_argument(
        "--out",
        required=True,
        metavar="PATH",
        help="a file .npz with arr_0 (uint8), a new or empty folder for PNG files, or a URL of TensorStore",
    )


def run_export(args: argparse.Namespace) -> None:
    """Runs `evodiff-jax export`.

    Raises:
      ValueError: the run is not complete or damaged, or the output is no good.
      OSError: a file cannot be read or written.
    """
    if args.out.endswith(".npz"):
        check_output("--out", Path(args.out), ".npz")
    elif "://" not in args.out:
        folder = Path(args.out)
        check_folder("--out", folder)
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"argument --out: {args.out!r} is not empty")
    require("tqdm", extra="generate")
    from tqdm import tqdm

    from evodiff_jax import generation

    count = len(generation.open(args.place))
    with tqdm(total=count, unit="image", desc="exporting", leave=False, disable=None) as bar:
        generation.export(args.place, args.out, lambda count: _update(bar, count))
    print(f"images   {count:,}")
    print(f"output   {args.out}")


def _update(bar: Any, count: int) -> None:
    bar.update(count)


def _add_place(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("place", metavar="DIR", help="what generate wrote: a folder, or a URL of TensorStore")
