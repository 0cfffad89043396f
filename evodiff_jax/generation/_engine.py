"""The samples of a run: made chunk by chunk on all local devices while the chunk before is written."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from evodiff_jax.generation import _manifest
from evodiff_jax.generation._hosts import Hosts
from evodiff_jax.generation._images import UINT8
from evodiff_jax.generation._lock import Lock
from evodiff_jax.generation._manifest import Layout, Marker
from evodiff_jax.generation._place import COMPLETE, MANIFEST, Place
from evodiff_jax.generation._program import Source
from evodiff_jax.generation._sampler import Sampler, ahead, dispatched
from evodiff_jax.tables import Plan

_MAX_NUM = 2**32  # numbers of samples are folded into keys as 32 bits


class Made(NamedTuple):
    """What a call of `generate` did in this process.

    Attributes:
      num: samples of the whole run.
      kept: chunks that were complete before.
      damaged: chunks that were complete before but did not agree with their checksums, and were made anew.
      made: samples made.
      not_finite: how many of them were not finite, which are mid-gray images.
      nbytes: bytes written.
      compile_seconds: time to compile.
      seconds: time to sample and write.
    """

    num: int
    kept: int
    damaged: tuple[int, ...]
    made: int
    not_finite: int
    nbytes: int
    compile_seconds: float
    seconds: float


class _Writer:
    """A thread that writes one chunk at a time, while the next one is made."""

    def __init__(self, place: Place, array: Any, layout: Layout, batch: int) -> None:
        self._place, self._array, self._layout = place, array, layout
        self._batch = batch
        self._device = jax.local_devices()[0].device_kind
        self._pool = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def put(self, number: int, images: np.ndarray, not_finite: int) -> None:
        """Has a chunk written, once the one before is.

        Raises:
          OSError: the one before could not be written.
        """
        self.wait()
        self._pending = self._pool.submit(self._write, number, images, not_finite)

    def wait(self) -> None:
        """Waits until all is written; errors as for `put`."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Ends the thread after the chunk that it writes."""
        self._pool.shutdown(wait=True)

    def _write(self, number: int, images: np.ndarray, not_finite: int) -> None:
        digest = _manifest.digest_of_images(images)
        self._place.write_images(self._array, number, self._layout.bounds(number)[0], images)
        marker = Marker(number, len(images), digest, not_finite, self._batch, self._device)
        self._place.write_json(_manifest.key_of(number), marker._asdict())


def generate(
    source: Source,
    laid_out: Plan,
    place: str,
    num: int,
    *,
    seed: int = 0,
    batch: int = 64,
    chunk: int | None = None,
    uint8: str = "diffusers",
    on_batch: Callable[[int, int], None] = lambda count, nbytes: None,
) -> Made:
    """Makes samples of a model and writes them to a place, chunk by chunk; goes on from those that are complete there.

    Sample k depends on the seed and k alone. Where `jax.distributed` is initialized all its processes call this, and
    each makes its part of the chunks on its own devices.

    Args:
      source: what is sampled. Its settings are to say all that determines samples beside the plan and the parameters.
      laid_out: the plan.
      place: a local folder, or a URL that TensorStore knows, such as "gs://bucket/folder"; new, empty, or of this run.
      num: the number of samples.
      seed: of all that is random.
      batch: samples at a time in this process, divided among its devices.
      chunk: samples that are written at a time, by default a batch.
      uint8: how samples become bytes, see `to_uint8`.
      on_batch: on_batch(count, nbytes) is called when `count` samples more are there, with the bytes of those made now,
        0 of those that were complete before, and (0, 0) while this waits. What it raises ends the run after the chunk
        that is being written.

    Returns:
      What was done.

    Raises:
      ValueError: an argument is out of range, the place holds something else or a run of another configuration, another
        process writes there, another host ended, or all samples of a batch are not finite.
      OSError: the place cannot be read or written; the chunks before are complete.
    """
    _check(num, batch, chunk, uint8)
    hosts, locks = Hosts(), []

    def step(count: int, nbytes: int) -> None:
        hosts.check()
        for lock in locks:
            lock.check()
        on_batch(count, nbytes)

    tick = lambda: step(0, 0)
    try:
        store = Place(place)
        sampler = Sampler(source, laid_out, seed, batch, uint8)
        layout = Layout((num, *sampler.image_shape), min(batch, num) if chunk is None else chunk)
        described = _manifest.configuration(source, laid_out, layout, seed, uint8)
        with contextlib.ExitStack() as stack:

            def prepare() -> np.ndarray:
                _check_place(store, described)
                locks.append(stack.enter_context(Lock(store)))
                if not _check_place(store, described):  # another run may have been here in between
                    store.write_json(MANIFEST, described)
                store.array(layout.shape, layout.chunk, create=True)
                return _manifest.marked(store, layout)

            marked = hosts.agree(described, prepare, tick)
            made = _make(sampler, store, layout, hosts, marked, step)

            def complete() -> None:
                missing = np.flatnonzero(~_manifest.marked(store, layout))
                if missing.size:
                    raise ValueError(f"{store.name!r}: chunk {missing[0]} disappeared: start the command again")
                store.write_json(COMPLETE, {"num": num, "chunks": layout.chunks})

            hosts.finish(complete, tick)
        return made
    except BaseException as error:
        hosts.fail(str(error) or type(error).__name__)
        raise


def _make(
    sampler: Sampler,
    place: Place,
    layout: Layout,
    hosts: Hosts,
    marked: np.ndarray,
    on_batch: Callable[[int, int], None],
) -> Made:
    """Verifies this host's part of the complete chunks, and makes its part of the others."""
    array = place.array(layout.shape, layout.chunk)
    kept, damaged = 0, []
    for number, marker in _manifest.intact(place, layout, array, np.flatnonzero(marked)[hosts.index :: hosts.count]):
        if marker is None:
            place.write(COMPLETE, None)
            place.write(_manifest.key_of(number), None)
            damaged.append(int(number))
        else:
            kept += 1
        on_batch(0 if marker is None else marker.images, 0)
    numbers = sorted([*damaged, *map(int, np.flatnonzero(~marked)[hosts.index :: hosts.count])])
    if not numbers:
        return Made(layout.num, kept, (), 0, 0, 0, 0.0, 0.0)

    start = time.perf_counter()
    sampler.compile()
    compiled_at = time.perf_counter()
    made = not_finite = of_chunk = first = 0
    images = np.empty(0, np.uint8)
    writer = _Writer(place, array, layout, sampler.batch // len(jax.local_devices()))
    try:
        for part in ahead(dispatched(sampler, layout, numbers)):
            if part.rows.start == 0:
                first, end = layout.bounds(part.chunk)
                images, of_chunk = np.empty((end - first, *layout.shape[1:]), np.uint8), 0
            count = part.rows.stop - part.rows.start
            images[part.rows] = np.asarray(part.images)[:count]
            finite = int(np.count_nonzero(np.asarray(part.finite)[:count]))
            if not finite:
                raise ValueError(
                    f"samples {first + part.rows.start} to {first + part.rows.stop - 1} are not finite: the model is "
                    "unusable, or needs other settings"
                )
            of_chunk += count - finite
            made, not_finite = made + count, not_finite + count - finite
            on_batch(count, images[part.rows].nbytes)
            if part.rows.stop == len(images):
                writer.put(part.chunk, images, of_chunk)
        writer.wait()
    finally:
        writer.close()
    seconds = time.perf_counter() - compiled_at
    size = made * int(np.prod(layout.shape[1:]))
    return Made(layout.num, kept, tuple(damaged), made, not_finite, size, compiled_at - start, seconds)


def _check(num: int, batch: int, chunk: int | None, uint8: str) -> None:
    """Raises ValueError if an argument is out of range."""
    if not 1 <= num <= _MAX_NUM:
        raise ValueError(f"the number of samples must be in 1 .. {_MAX_NUM}, got {num}")
    if uint8 not in UINT8:
        raise ValueError(f"uint8 conversion must be one of {', '.join(UINT8)}, got {uint8!r}")
    devices = jax.local_device_count()
    if batch < 1 or batch % devices:
        nearest = max(1, round(batch / devices)) * devices
        raise ValueError(f"a batch of {batch} cannot be divided among {devices} devices; {nearest} can, the nearest")
    if chunk is None:
        return
    if not 1 <= chunk <= num:
        raise ValueError(f"a chunk must be of 1 to {num} samples, as many as there are, got {chunk}")
    if chunk % batch and chunk != num:
        nearest = max(1, round(chunk / batch)) * batch
        raise ValueError(f"a chunk of {chunk} is no multiple of the batch of {batch}; {nearest} is the nearest that is")


def check(place: str) -> None:
    """Raises an error if no run could begin or go on in a place, before anything is loaded for it.

    Args:
      place: as for `generate`.

    Raises:
      ValueError: TensorStore does not know the URL, or there is something else.
      OSError: it cannot be read or written to.
    """
    store = Place(place)
    if store.read(MANIFEST) is None:
        store.check_new()
    else:
        _manifest.read_manifest(store)


def _check_place(place: Place, described: dict[str, Any]) -> bool:
    """Whether this run was begun in a place.

    Raises:
      ValueError: there is another one, or something else.
    """
    if place.read(MANIFEST) is None:
        place.check_new()
        return False
    found, _ = _manifest.read_manifest(place)
    differing = _manifest.differences(found, described)
    if differing:
        raise ValueError(
            f"{place.name!r} holds a run of another configuration ({'; '.join(differing)}): give another place, or the "
            "same command"
        )
    return True
