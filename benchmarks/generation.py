"""Throughput of `evodiff_jax.generation` with and without writing, on 1 to 8 CPU devices, beside its cost model.

    python benchmarks/generation.py [--repeats 9] [--devices 1 2 4 8]

A number of devices is a process of its own, in which runs that write alternate with the same program alone; the loss
is the median over pairs of them. The network is of elementwise operations, of which XLA runs those of one device on one
core, so that the cores are what there is to share.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

SHAPE = (64, 64, 3)
BATCH = 8  # a device
CHUNKS = 8
WORK = 12  # repetitions of the network's layer: a chunk of one device takes some tenths of a second


def measure(repeats: int) -> dict:
    """Seconds of one process: of the program alone, of whole runs, and of their parts."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import evodiff_jax as ed
    from evodiff_jax import generation
    from evodiff_jax.generation import _engine, _manifest
    from evodiff_jax.generation._place import Place
    from evodiff_jax.generation._sampler import Sampler

    schedule = ed.schedules.edm()

    def make_denoiser(params, _):
        def denoise(x, t):
            h, _ = jax.lax.scan(lambda h, _: (jnp.sin(h * params + t), None), x, None, WORK)
            return x / (1 + t**2) + 1e-3 * h

        return denoise

    source = generation.Source(make_denoiser, np.float32(1.1), schedule, SHAPE)
    plan = ed.plan(schedule, ed.grids.log_snr(schedule, 10), ed.solvers.ddim())
    batch = BATCH * jax.local_device_count()
    num = CHUNKS * batch

    sampler = Sampler(source, plan, 0, batch, "diffusers")
    start = time.perf_counter()
    sampler.compile()
    compiling = time.perf_counter() - start
    _engine.Sampler = lambda *_: sampler  # compiled once for all runs
    alone, whole = [], []
    folder = tempfile.mkdtemp()
    for repeat in range(repeats + 1):
        start = time.perf_counter()
        waiting = [sampler(0)]
        for chunk in range(1, CHUNKS + 1):  # as `generate`: one batch more is on its way
            if chunk < CHUNKS:
                waiting.append(sampler(chunk * batch))
            jax.block_until_ready(waiting.pop(0))
        alone.append(time.perf_counter() - start)
        made = generation.generate(source, plan, f"{folder}/{repeat}", num, batch=batch)
        whole.append(made.seconds)

    images = np.random.default_rng(0).integers(0, 256, (batch, *SHAPE), np.uint8)
    place = Place(f"{folder}/written")
    array = place.array((50 * batch, *SHAPE), batch, create=True)
    start = time.perf_counter()
    for number in range(50):
        _manifest.digest_of_images(images)
        place.write_images(array, number, number * batch, images)
        place.write_json(_manifest.key_of(number), {"chunk": number})
    writing = (time.perf_counter() - start) / 50
    start = time.perf_counter()
    for number in range(50):
        _manifest.digest_of_images(array[number * batch : (number + 1) * batch].read().result())
    verifying = (time.perf_counter() - start) / 50
    shutil.rmtree(folder)
    return {
        "devices": jax.local_device_count(),
        "num": num,
        "chunk_bytes": images.nbytes,
        "alone": alone[1:],  # the first one warms up
        "whole": whole[1:],
        "writing": writing,
        "verifying": verifying,
        "compiling": compiling,
    }


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.repeats)))
        return
    cores = len(os.sched_getaffinity(0))
    rows = []
    for devices in args.devices:
        environment = dict(os.environ, JAX_PLATFORMS="cpu")
        flags = f"--xla_force_host_platform_device_count={devices}"
        environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
        command = [sys.executable, __file__, "--measure", "--repeats", str(args.repeats)]
        found = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(found.stdout))
    print(f"{cores} cores, {rows[0]['num']} images of {'x'.join(map(str, SHAPE))} a device in {CHUNKS} chunks")
    print("| devices | chunk, s | alone, images/s | written, images/s | loss, % (range) | model, images/s |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    of_one = rows[0]["num"] / statistics.median(rows[0]["alone"]) / min(rows[0]["devices"], cores)
    for row in rows:
        alone, whole = statistics.median(row["alone"]), statistics.median(row["whole"])
        losses = sorted(100 * (1 - a / w) for a, w in zip(row["alone"], row["whole"], strict=True))
        # The slower of the two: the devices, as many as have a core, and the thread that writes.
        chunk = row["num"] / CHUNKS
        model = min(of_one * min(row["devices"], cores), chunk / row["writing"])
        print(
            f"| {row['devices']} | {alone / CHUNKS:.2f} | {row['num'] / alone:.1f} | {row['num'] / whole:.1f} | "
            f"{statistics.median(losses):.1f} ({losses[0]:.1f} to {losses[-1]:.1f}) | {model:.1f} |"
        )
    for row in rows:
        size = row["chunk_bytes"] / 1e6
        print(
            f"{row['devices']} devices: a chunk of {size:.2f} MB written in {1e3 * row['writing']:.1f} ms "
            f"({size / row['writing']:.0f} MB/s), verified in {1e3 * row['verifying']:.1f} ms "
            f"({size / row['verifying']:.0f} MB/s); compiled in {row['compiling']:.1f} s"
        )


if __name__ == "__main__":
    main()
