"""`evodiff-jax evaluate`: the FID of solvers on a checkpoint."""

from __future__ import annotations

import argparse
import platform
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from evodiff_jax import __version__
from evodiff_jax.cli.arguments import integer
from evodiff_jax.cli.models import Guided, add_model_arguments, class_number, load_guided
from evodiff_jax.cli.output import check_folder
from evodiff_jax.cli.plans import check_plans, facts_of, read_plans
from evodiff_jax.extras import require
from evodiff_jax.grids import GRIDS
from evodiff_jax.solvers import FORMS

if TYPE_CHECKING:
    from evodiff_jax.evaluation import Fid, Reference, Source
    from evodiff_jax.fitting import Fitted
    from evodiff_jax.pretrained import Model

_SOLVERS = ("variance_optimal", "evodiff", "dpm_solver_pp-3", "unipc-3", "ipndm-3")
_CALLS = (5, 6, 8, 10)
_MAX_CALLS = 1_000
_INCEPTION = "pt_inception-2015-12-05-6726825d.pth"
_INCEPTION_DIGEST = "6726825d"  # with which the SHA-256 of that file begins
_RUNS = "runs"  # the folder of them in DIR


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `evodiff-jax evaluate`."""
    add = parser.add_argument
    listed = "separated by commas or spaces"
    add_model_arguments(parser, "drawn at random")
    add(
        "--reference",
        type=Path,
        required=True,
        metavar="NPZ",
        help="statistics of the data: mu and sigma, features pool_3, or images arr_0, see docs/fid.md",
    )
    add(
        "--reference-images",
        action="store_true",
        help="use the images of the reference also where it has statistics: those of guided-diffusion's files are of "
        "another implementation of Inception",
    )
    add("--inception", type=Path, required=True, metavar="PTH", help=f"pytorch-fid's file {_INCEPTION}")
    add(
        "--solvers",
        nargs="+",
        default=_SOLVERS,
        metavar="SOLVER",
        help=f"of {', '.join(FORMS)}, {listed} (default: {', '.join(_SOLVERS)})",
    )
    add(
        "--calls",
        nargs="+",
        default=_CALLS,
        metavar="N",
        help=f"model calls a sample, {listed} (default: {', '.join(map(str, _CALLS))})",
    )
    add("--grid", nargs="+", default=("log_snr",), metavar="GRID", help=f"of {', '.join(GRIDS)} (default: log_snr)")
    add("--plans", nargs="+", default=(), metavar="FILE", help="fitted plans of the model to evaluate too")
    add("--num", type=integer(2, 10_000_000), default=50_000, help="samples of every run (default: %(default)s)")
    add("--batch", type=integer(1, 50_000), default=64, help="images at a time (default: %(default)s)")
    add(
        "--uint8",
        choices=("edm", "guided_diffusion", "diffusers"),
        help="how samples become bytes, see docs/fid.md (default: as the checkpoint's project does it)",
    )
    add(
        "--out",
        type=Path,
        default=Path("evodiff_fid"),
        metavar="DIR",
        help="folder of the tables and runs; a command that was stopped goes on there (default: %(default)s)",
    )


def run_evaluate(args: argparse.Namespace) -> None:
    """Runs `evodiff-jax evaluate`.

    Args:
      args: what `add_evaluate_arguments` parsed.

    Raises:
      ValueError: an argument is out of range or does not fit the model, a file is unusable, the folder's runs are
        others, or a batch does not fit in memory.
      OSError: a file cannot be read or written.
    """
    solvers = _listed("--solvers", args.solvers, _one_of(FORMS))
    grids = _listed("--grid", args.grid, _one_of(GRIDS))
    calls = sorted(_listed("--calls", args.calls, integer(1, _MAX_CALLS)))
    fitted = read_plans("--plans", args.plans)
    plans = {name: found.plan for name, found in fitted.items()}
    check_folder("--out", args.out)
    check_folder("--out", args.out / _RUNS if args.out.exists() else args.out)
    require("tqdm", extra="models")
    from evodiff_jax import evaluation
    from evodiff_jax.pretrained.inception import FEATURES

    try:
        reference = evaluation.read_reference(args.reference, args.reference_images)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"argument --reference: {error}") from error
    inception = _load_inception(args.inception)
    if reference.mean is not None and len(reference.mean) != FEATURES:
        raise ValueError(
            f"argument --reference: {args.reference} is of {len(reference.mean)} features, those of Inception are "
            f"{FEATURES}"
        )
    guided = load_guided(args)
    model, source = guided.model, _source(args, guided)
    check_plans("--plans", args.plans, model.schedule, model.digest, guided.settings)
    made = {name: FORMS[name].make for name in solvers}
    of_grids = {name: GRIDS[name] for name in grids}
    planned = evaluation.runs(source.schedule, of_grids, calls, made, args.denoise_to_zero, plans)
    without = evaluation.skipped(planned, grids, calls, solvers)
    if len(planned) == len(plans):
        raise ValueError(f"argument --calls: {', '.join(solvers)} have no runs of {', '.join(map(str, calls))} calls")

    uint8 = args.uint8 or model.network.uint8
    batch = min(args.batch, args.num)
    from tqdm import tqdm

    # disable=None: no bar unless stderr is a terminal.
    with tqdm(total=len(planned) * args.num, unit="image", leave=False, disable=None) as bar:

        def on_batch(run: str, count: int) -> None:
            bar.set_description(run)
            if run == "reference":
                bar.total += count
            bar.update(count)

        try:
            results = list(
                evaluation.evaluate(
                    source,
                    evaluation.inception_features(inception),
                    reference,
                    of_grids,
                    calls,
                    made,
                    args.num,
                    args.out / _RUNS,
                    features_name=f"Inception {inception.digest}",
                    uint8=uint8,
                    seed=args.seed,
                    batch=batch,
                    denoise_to_zero=args.denoise_to_zero,
                    plans=plans,
                    on_batch=on_batch,
                )
            )
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                raise ValueError(f"a batch of {batch} images does not fit in memory: use a smaller --batch") from error
            raise

    facts = _facts(args, guided, inception, reference, uint8, grids, fitted)
    remarks = _remarks(args, results, inception, FEATURES)
    remarks += [f"{s} has no run of exactly {n} model calls on the grid {g}: left out." for s, g, n in without]
    written = evaluation.write_fid_report(args.out, results, [f"{name} {text}" for name, text in facts], remarks)
    for name, text in facts:
        print(f"{name:<10}{text}")
    print(f"{'output':<10}{', '.join(map(str, written))}")
    for remark in remarks:
        print(f"{'note':<10}{remark}")
    print(f"\n{evaluation.aligned(evaluation.fid_table(results))}")


def _load_inception(path: Path) -> Model:
    from evodiff_jax import pretrained

    advice = f"it must be pytorch-fid's {_INCEPTION}"
    try:
        model = pretrained.load(path)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"argument --inception: {error}; {advice}") from error
    if model.network.prediction != "features":
        raise ValueError(f"argument --inception: {path} holds {model.cls}; {advice}")
    return model


def _source(args: argparse.Namespace, guided: Guided) -> Source:
    from evodiff_jax import evaluation

    label = None if args.label is None else class_number(args.label, guided.num_classes)
    source = evaluation.source_of(guided.model, decode=guided.decode)
    return source._replace(
        make_denoiser=guided.make_denoiser,
        params=guided.params,
        num_classes=guided.num_classes,
        label=label,
        settings={**source.settings, **guided.settings, "dtype": guided.dtype},
    )


def _facts(
    args: argparse.Namespace,
    guided: Guided,
    inception: Model,
    reference: Reference,
    uint8: str,
    grids: list[str],
    fitted: Mapping[str, Fitted],
) -> list[tuple[str, str]]:
    from evodiff_jax.evaluation import UINT8

    device = jax.devices()[0]
    model = guided.model
    classes = "unconditional"
    if guided.num_classes:
        classes = f"class {args.label}" if args.label is not None else f"{guided.num_classes} classes drawn at random"
    last = ", the last one at the last noise level" if args.denoise_to_zero else ""
    used = {"arr_0": "images arr_0, their features computed here", "pool_3": "features pool_3"}
    source = used.get(reference.source, reference.source)
    return [
        ("model", f"{model.name}, SHA-256 {model.digest or 'unknown'}, {guided.dtype}"),
        ("samples", f"{args.num:,} of every run, seed {args.seed}, {classes}{guided.words}"),
        ("solvers", f"on the grid {', '.join(grids)}; model calls a sample{last}"),
        *(("plan", fact) for fact in facts_of(fitted)),
        ("uint8", f"{uint8}: {UINT8[uint8]}"),
        ("inception", f"{args.inception.name}, SHA-256 {inception.digest}"),
        (
            "reference",
            f"{reference.path.name}, {source}, SHA-256 {reference.digest}",
        ),
        ("versions", f"evodiff_jax {__version__}, jax {jax.__version__}, python {platform.python_version()}"),
        ("device", f"{device.platform}, {device.device_kind}"),
    ]


def _remarks(args: argparse.Namespace, results: list[Fid], inception: Model, width: int) -> list[str]:
    remarks = [f"FID of {args.num:,} samples; it is biased upwards, the more the fewer there are."]
    if args.num <= width:
        remarks[0] += f" With no more samples than the {width} features, covariances lack rank: use many more."
    if not inception.digest.startswith(_INCEPTION_DIGEST):
        remarks.append(
            f"{args.inception.name} is not the released {_INCEPTION}, whose SHA-256 begins with {_INCEPTION_DIGEST}: "
            "these figures are not comparable with published FIDs."
        )
    remarks += [
        f"{r.solver}, {r.calls} calls, {r.grid}: {r.blown_up:,} of {r.samples:,} samples are not finite."
        for r in results
        if r.blown_up
    ]
    return remarks


def _listed(option: str, given: list[str] | tuple, parse: Callable[[str], object]) -> list:
    """The values of an option, separated by commas or spaces, each once."""
    texts = [text for value in given for text in re.split(r"[,\s]+", str(value)) if text]
    if not texts:
        raise ValueError(f"argument {option}: a value is needed")
    try:
        return list(dict.fromkeys(parse(text) for text in texts))
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"argument {option}: {error}") from error


def _one_of(known: dict) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"must be of {', '.join(known)}, got {text!r}")
        return text

    return parse
