"""`evodiff-jax info` and `evodiff-jax convert`: what a file of weights or a plan holds, and weights as safetensors."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import platform
from collections import Counter
from importlib import resources
from pathlib import Path
from typing import Any

import jax

from evodiff_jax import __version__
from evodiff_jax.cli.arguments import add_checkpoint_arguments
from evodiff_jax.cli.output import check_output
from evodiff_jax.cli.plans import described


def add_info_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `evodiff-jax info`."""
    parser.add_argument(
        "file",
        nargs="?",
        metavar="FILE",
        help="file of weights, or a fitted plan (default: versions, devices, what is packaged)",
    )
    add_checkpoint_arguments(parser)


def run_info(args: argparse.Namespace) -> None:
    """Runs `evodiff-jax info`: runs nothing that the file carries, and computes nothing with it.

    Args:
      args: what `add_info_arguments` parsed.

    Raises:
      ValueError: the file is damaged, of an unknown format, or has globals that are not allowed; or an option is not
        for a fitted plan.
      OSError: it cannot be read.
    """
    if args.file is None:
        return _print_versions()
    from evodiff_jax import fitting, pretrained

    if fitting.is_fitted(args.file):
        for option, given in (("--config", args.config), ("--entry", args.entry)):
            if given is not None:
                raise ValueError(f"argument {option}: not with {args.file}, a fitted plan")
        for name, text in [("file", f"{args.file}, fitted plan"), *described(args.file)]:
            print(f"{name:<8} {text}")
        return None

    if Path(args.file).is_dir():
        return _print_folder(Path(args.file))
    found = pretrained.describe(args.file, config=args.config, entry=args.entry)
    numbers = sum(math.prod(shape) for shape, _ in found.arrays.values())
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in Counter(d for _, d in found.arrays.values()).items())
    print(f"file     {args.file}, {found.format}")
    if found.recognised is not None:
        print(f"class    {found.recognised.cls} (family {found.recognised.family})")
        print(f"config   {json.dumps(found.recognised.arguments)}")
    print(f"arrays   {len(found.arrays)} ({dtypes}), {numbers:,} numbers, {found.bytes:,} bytes")
    if found.licence:
        print(f"licence  {found.licence}")
    print(f"loads    {f'no: {found.problem}' if found.problem else 'no' if found.refused else 'yes'}")
    if found.refused:
        print(f"refused  {', '.join(found.refused)}")
        raise ValueError(
            f"{args.file}: refuses the global{'s' if len(found.refused) > 1 else ''} {', '.join(found.refused)}; a "
            "checkpoint of arrays does not need more than its arrays"
        )


def _print_folder(path: Path) -> None:
    """Prints what each network of a folder is, and whether it loads."""
    from evodiff_jax import pretrained
    from evodiff_jax.pretrained.folders import components

    known = components(path)
    found = pretrained.describe_folder(path)
    print(f"folder         {path}")
    for name, component in known.items():
        cls = component.cls
        if name not in found:
            print(f"{name:<14} {cls}{_of_other(name, component.config)}")
            continue
        numbers = sum(math.prod(shape) for shape, _ in found[name].arrays.values())
        loads = f"no: {found[name].problem}" if found[name].problem else "yes"
        size = f"{len(found[name].arrays)} arrays, {numbers:,} numbers"
        print(f"{name or 'network':<14} {cls}, {size}, {found[name].bytes:,} bytes, loads: {loads}")


def _of_other(name: str, config: dict[str, Any]) -> str:
    """What becomes of a component that is no network."""
    from evodiff_jax.pretrained.folders import read_scheduler

    if name.startswith("tokenizer"):
        return ""
    if name != "scheduler":
        return ", is not used"
    try:
        found = read_scheduler(config)
    except ValueError as error:
        return f", loads: no: {error}"
    ignored = f"; settings that are not used: {', '.join(found.ignored)}" if found.ignored else ""
    return f", prediction {found.prediction}, {found.schedule.num_timesteps} noise levels{ignored}"


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `evodiff-jax convert`."""
    parser.add_argument("file", metavar="FILE", help="file of weights")
    parser.add_argument("out", type=Path, metavar="OUT", help="file to write, ending in .safetensors")
    add_checkpoint_arguments(parser)


def run_convert(args: argparse.Namespace) -> None:
    """Runs `evodiff-jax convert`.

    Args:
      args: what `add_convert_arguments` parsed.

    Raises:
      ValueError: the output is none, or `pretrained.load` would refuse the file.
      OSError: a file cannot be read or written.
    """
    check_output("OUT", args.out, ".safetensors")
    from evodiff_jax import pretrained

    pretrained.convert(args.file, args.out, config=args.config, entry=args.entry)
    print(f"output   {args.out}, {args.out.stat().st_size:,} bytes")


def _print_versions() -> None:
    """Prints versions, devices, the packaged models with their cards, and the packaged plans."""
    from evodiff_jax import fitting, pretrained

    print(f"evodiff_jax {__version__}")
    for package in ("jax", "jaxlib", "flax", "numpy"):
        print(f"{package} {importlib.metadata.version(package)}")
    print(f"python {platform.python_version()}")
    for device in jax.devices():
        print(f"device {device.id}: {device.platform}, {device.device_kind}")
    weights = resources.files(pretrained) / "weights"
    for name in pretrained.available():
        model = pretrained.load(name)
        size = len((weights / f"{name}.safetensors").read_bytes())
        parameters = sum(leaf.size for leaf in jax.tree.leaves(model.params))
        print(f"model {name}: {parameters:,} parameters, {model.metadata['steps']:,} steps, {size / 1e6:.1f} MB\n")
        print((weights / f"{name}.md").read_text(encoding="utf-8"))
    for name in fitting.available():
        fitted = fitting.load(name)
        report = fitted.report
        print(
            f"plan {name}: {int(fitted.plan.calls)} model calls, median error {report.fitted.median:.3g}, its start's "
            f"{report.start.median:.3g}"
        )
