"""Fitted plans as files: safetensors, with what is known of the fit as JSON in the metadata."""

import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from evodiff_jax.extras import require
from evodiff_jax.files import write_atomically
from evodiff_jax.fitting._fit import Figures, Fitted, Report
from evodiff_jax.fitting._offsets import Offsets, check_levels, is_variance_optimal
from evodiff_jax.fitting._packaged import available, locate
from evodiff_jax.numerics import is_integer
from evodiff_jax.schedules import NoiseSchedule, expect_schedule
from evodiff_jax.solvers import variance_optimal
from evodiff_jax.solvers._variance_optimal import Data
from evodiff_jax.tables import Plan, Table

KIND = "evodiff_jax fitted plan"
VERSION = 2
_DIGEST = "digest"  # the entry of the card that names the model
_MOST_HEADER = 2**20  # bytes of the header of a file that may be a plan; those of plans have some thousand


def save(path: str | os.PathLike[str], fitted: Fitted, **card: Any) -> None:
    """Writes a fitted plan to a file, float64 as it is.

    Args:
      path: of the file, by custom with the suffix .safetensors.
      fitted: from `fit`.
      **card: what else the file is to tell, as JSON can: of the model, the solver, the guidance. `digest`, a text that
        names the model's weights, is compared by `load`.

    Raises:
      TypeError: when fitted is something else, or the card is not JSON.
      OSError: when the file cannot be written.
    """
    if not isinstance(fitted, Fitted):
        raise TypeError(f"fitted must be a Fitted, from fitting.fit, got {type(fitted).__name__}")
    require("safetensors", extra="fit")
    from safetensors.numpy import save as to_bytes

    plan = fitted.plan
    if plan.rule is not None and not is_variance_optimal(plan.rule):
        raise ValueError("only the rule of variance_optimal can be written, by its name")
    rule = None if plan.rule is None else {"channel_axis": plan.rule.channel_axis, "per_leaf": plan.rule.per_leaf}
    arrays = {
        **{f"table.{name}": column for name, column in _columns(plan.table).items()},
        **{f"offsets.{name}": values for name, values in fitted.offsets._asdict().items()},
        "end": plan.end,
    }
    described = {
        "kind": KIND,
        "version": VERSION,
        "calls": int(plan.calls),
        "levels": plan.levels,
        "variance_optimal": rule,
        "report": {**fitted.report._asdict(), **{name: getattr(fitted.report, name)._asdict() for name in _FIGURES}},
        "card": {**fitted.card, **card},
    }
    try:
        text = json.dumps(described)
    except (TypeError, ValueError) as error:
        raise TypeError(f"the card must be JSON, of texts, numbers, lists and dicts: {error}") from error
    content = to_bytes(
        {name: np.asarray(a, np.float64, order="C") for name, a in arrays.items()}, {"evodiff_jax": text}
    )
    write_atomically(Path(path), lambda file: file.write(content))


def load(
    name_or_path: str | os.PathLike[str], schedule: NoiseSchedule | None = None, *, digest: str | None = None
) -> Fitted:
    """Reads a fitted plan; no code of the file is run.

    Args:
      name_or_path: the name of a packaged plan, see `available`, or the path of a file that `save` wrote.
      schedule: the schedule of the model, which the plan's must be; None to leave that unchecked here (`sample` then
        compares it with the denoiser's where it knows that).
      digest: what names the model's weights, as given to `save`; None to leave it unchecked.

    Returns:
      What was saved; `card` with what was added by `save`.

    Raises:
      OSError: when the file cannot be read.
      ValueError: when no packaged plan has this name, or the file is no fitted plan or a damaged one, or is of another
        schedule or model.
    """
    if schedule is not None:
        expect_schedule(schedule)
    require("safetensors", extra="fit")
    from safetensors import SafetensorError, safe_open

    path = locate(name_or_path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder, the file of a fitted plan is needed")
    try:
        with safe_open(os.fspath(path), framework="numpy") as file:
            text = (file.metadata() or {}).get("evodiff_jax")
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
        described = None if text is None else json.loads(text)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no fitted plan, or a damaged one: {error}") from error
    if not isinstance(described, dict) or described.get("kind") != KIND:
        raise ValueError(f"{path} is no fitted plan: fitting.save writes them")
    if described.get("version") != VERSION:
        raise ValueError(
            f"{path} is of version {described.get('version')} of such files, this library reads {VERSION}: update it"
        )
    try:
        fitted = _read(described, arrays)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is a damaged fitted plan: {type(error).__name__}: {error}") from error
    if schedule is not None:
        check_levels(f"the plan of {path}", fitted.plan.levels, schedule)
    known = fitted.card.get(_DIGEST)
    if digest is not None and digest != known:
        raise ValueError(f"{path} was fitted to another model: its digest is {known!r}, the model's {digest!r}")
    return fitted


def is_fitted(name_or_path: str | os.PathLike[str]) -> bool:
    """Returns whether this is a packaged plan's name, or a file that says it is a fitted plan; damaged ones do too."""
    if os.fspath(name_or_path) in available():
        return True
    try:
        with Path(name_or_path).open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size)) if size <= _MOST_HEADER else {}
        return json.loads(header["__metadata__"]["evodiff_jax"])["kind"] == KIND
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


_FIGURES = ("start", "fitted", "validation_start", "validation_fitted")


def _columns(table: Table) -> dict[str, Any]:
    """The arrays of a table by their names."""
    return {
        ".".join(str(getattr(part, "name", getattr(part, "idx", ""))) for part in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(table)
    }


def _read(described: dict[str, Any], arrays: dict[str, np.ndarray]) -> Fitted:
    columns = {name.removeprefix("table."): a for name, a in arrays.items() if name.startswith("table.")}
    history = [columns.pop(f"history.{k}") for k in (0, 1) if f"history.{k}" in columns]
    of_rule = described["variance_optimal"]
    data = {name.removeprefix("data."): columns.pop(name) for name in sorted(columns) if name.startswith("data.")}
    table = Table(
        time=columns["time"],
        transition=columns["transition"],
        predictor=columns["predictor"],
        corrector=columns["corrector"],
        history=(history[0], history[1]) if history else None,
        data=Data(**data) if of_rule is not None else (),
        predicts=columns.get("predicts"),
        corrects=columns.get("corrects"),
    )
    rows, calls = len(table.time), described["calls"]
    leaves = jax.tree.leaves(table)
    if not is_integer(calls) or not 1 <= calls <= rows or any(leaf.shape[:1] != (rows,) for leaf in leaves):
        raise ValueError(f"{rows} rows, {calls} calls and columns of {sorted({len(leaf) for leaf in leaves})} rows")
    if table.predictor.shape != table.corrector.shape or not all(np.isfinite(leaf).all() for leaf in leaves):
        raise ValueError("its table is inconsistent or not finite")
    levels = tuple((float(t), float(alpha), float(sigma)) for t, alpha, sigma in described["levels"])
    rule = None if of_rule is None else variance_optimal(of_rule["channel_axis"], of_rule["per_leaf"]).rule
    report = {**described["report"], **{name: Figures(**described["report"][name]) for name in _FIGURES}}
    return Fitted(
        plan=Plan(table, np.asarray(calls, np.int32), arrays["end"].reshape(()), rule, levels),
        report=Report(**{**report, "samples": tuple(report["samples"])}),
        offsets=Offsets(*(arrays[f"offsets.{name}"] for name in Offsets._fields)),
        card=dict(described["card"]),
    )
