"""Digests of what determines samples."""

import ast
import hashlib
import inspect
import sys
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from evodiff_jax.tables import Plan


def digest_of_plan(plan: Plan) -> str:
    """A digest of a plan's table and of its rule's code, so that samples of a solver that has changed are not read.

    Of the code count the modules of the rule's functions, without comments and docstrings.
    """
    digest = hashlib.sha256(f"{jax.tree.structure(plan.table)}".encode())
    digest.update(digest_of_arrays(jax.tree.leaves((plan.table, plan.calls, plan.end))).encode())
    if plan.rule is not None:
        functions = (plan.rule.terms, plan.rule.choose, plan.rule.init)
        for name in sorted({fn.__module__ for fn in functions}):
            tree = ast.parse(inspect.getsource(sys.modules[name]))
            for node in ast.walk(tree):
                body = getattr(node, "body", None)
                if not (isinstance(body, list) and body):
                    continue
                if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
                    body.pop(0)
            digest.update(ast.dump(tree).encode())
        digest.update(f"{plan.rule.channel_axis} {plan.rule.per_leaf}".encode())
    return digest.hexdigest()[:12]


def digest_of_params(params: Any) -> str:
    """SHA-256 of a tree of arrays, in hexadecimal."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def digest_of_arrays(arrays: Iterable[np.ndarray]) -> str:
    """The start of the SHA-256 of arrays with their dtypes and shapes."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:32]
