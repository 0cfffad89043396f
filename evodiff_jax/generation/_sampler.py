"""The compiled program of a run on all local devices, and its batches as they are given to them."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from evodiff_jax.generation._manifest import Layout
from evodiff_jax.generation._program import Source, images_from_key
from evodiff_jax.tables import Plan

_AHEAD = 2  # batches on the devices at a time: one more keeps them busy while the first is copied


class Batch(NamedTuple):
    """Samples that are being made.

    Attributes:
      chunk: the number of their chunk.
      rows: their place in it.
      images: (B, H, W, C) on the devices, of which the first ones are meant.
      finite: (B,).
    """

    chunk: int
    rows: slice
    images: jax.Array
    finite: jax.Array


class Sampler:
    """The compiled program of a run on all local devices, each of which makes its part of a batch by itself."""

    def __init__(self, source: Source, laid_out: Plan, seed: int, batch: int, uint8: str) -> None:
        """Traces the program, which compiles nothing."""
        mesh = Mesh(np.array(jax.local_devices()), ("batch",))
        split, whole = PartitionSpec("batch"), PartitionSpec()
        program = _mapped(images_from_key(source, uint8), mesh, (whole, whole, split, split, whole), split)
        self.batch = batch
        self._source = source
        self._split, self._whole = (NamedSharding(mesh, spec) for spec in (split, whole))
        self._given = jax.device_put((source.params, jax.random.key(seed), laid_out), self._whole)
        self._lowered = jax.jit(program).lower(*self._arguments(0))
        self.image_shape = tuple(self._lowered.out_info[0].shape[1:])
        self._compiled: Any = None

    def compile(self) -> None:
        """Compiles the program."""
        self._compiled = self._compiled or self._lowered.compile()

    def __call__(self, first: int) -> tuple[jax.Array, jax.Array]:
        """The samples first, ..., first + batch - 1 as bytes, and whether each is finite; does not wait for them."""
        images, finite = self._compiled(*self._arguments(first))
        images.copy_to_host_async()
        return images, finite

    def _arguments(self, first: int) -> tuple[Any, ...]:
        params, key, laid_out = self._given
        # Beyond the last sample the numbers may leave 32 bits: what is made there is thrown away.
        indices = np.arange(first, first + self.batch).astype(np.uint32)
        conditions = self._source.conditions
        condition = None if conditions is None else conditions(indices)
        return params, key, *jax.device_put((indices, condition), self._split), laid_out


def _mapped(program: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """The program of one device on all of a mesh; loops in users' networks need not say what varies among devices."""
    if hasattr(jax, "shard_map"):
        return jax.shard_map(program, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    from jax.experimental.shard_map import shard_map  # JAX 0.6.0

    return shard_map(program, mesh, in_specs, out_specs, check_rep=False)


def dispatched(sampler: Sampler, layout: Layout, numbers: list[int]) -> Iterator[Batch]:
    """The batches of chunks, as they are given to the devices; the last one of a chunk is filled up."""
    for number in numbers:
        first, end = layout.bounds(number)
        for start in range(first, end, sampler.batch):
            images, finite = sampler(start)
            rows = slice(start - first, min(start + sampler.batch, end) - first)
            yield Batch(number, rows, images, finite)


def ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches, each given when so many after it are on their way."""
    waiting: collections.deque[Batch] = collections.deque()
    for batch in batches:
        waiting.append(batch)
        if len(waiting) == _AHEAD:
            yield waiting.popleft()
    yield from waiting
