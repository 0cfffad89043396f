"""Throughput of `evodiff_jax.generation` with and without writing, on 1 to 8 CPU devices, beside its cost model.

    python benchmarks/generation.py [--repeats 9] [--devices 1 2 4 8]

A number of devices is a process of its own, in which runs that write alternate with the same program alone. Two losses
are told: of the time between one chunk and the next, of the lower quartile, and of the seconds that processors worked
for the process, on which others' work on the machine has less influence. The network is of elementwise operations, of
which XLA runs those of one device on one core, so that the cores are what there is to share.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np

SHAPE = (64, 64, 3)
BATCH = 8  # a device
CHUNKS = 6
WORK = 18  # repetitions of the network's layer: a chunk of one device takes some tenths of a second


def measure(repeats: int) -> dict:
    """Seconds of one process: of the program alone, of whole runs, and of their parts."""
    import jax
    import jax.numpy as jnp

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
    alone, whole, processor = [], [], [0.0, 0.0]
    folder = tempfile.mkdtemp()
    for repeat in range(repeats + 1):
        ends, worked = [], time.process_time()
        waiting = [sampler(0)]
        for chunk in range(1, CHUNKS + 1):  # as `generate`: one batch more is on its way
            if chunk < CHUNKS:
                waiting.append(sampler(chunk * batch))
            jax.block_until_ready(waiting.pop(0))
            ends.append(time.perf_counter())
        worked_alone = time.process_time() - worked
        stamps, worked = [], time.process_time()
        on_batch = lambda count, nbytes, stamps=stamps: stamps.append(time.perf_counter()) if nbytes else None
        generation.generate(source, plan, f"{folder}/{repeat}", num, batch=batch, on_batch=on_batch)
        if repeat:  # the first one warms up
            alone.extend(np.diff(ends).tolist())
            whole.extend(np.diff(stamps).tolist())
            processor[0] += worked_alone
            processor[1] += time.process_time() - worked

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
        "alone": alone,
        "whole": whole,
        "processor": processor,
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
    print(f"{cores} cores, images of {'x'.join(map(str, SHAPE))}, {BATCH} a device and chunk, {CHUNKS} chunks")
    print("| devices | chunk, s | alone, images/s | written, images/s | loss, % | more work, % | model, images/s |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    of_one, remarks = None, []
    for devices in args.devices:
        environment = dict(os.environ, JAX_PLATFORMS="cpu")
        flags = f"--xla_force_host_platform_device_count={devices}"
        environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
        command = [sys.executable, __file__, "--measure", "--repeats", str(args.repeats)]
        found = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        row = json.loads(found.stdout)
        chunk = row["num"] / CHUNKS
        alone, whole = (chunk / np.quantile(row[name], 0.25) for name in ("alone", "whole"))
        worked = 100 * (row["processor"][1] / row["processor"][0] - 1)
        # The slower of the two: the devices, as many as have a core, and the thread that writes.
        of_one = of_one or alone / min(devices, cores)
        model = min(of_one * min(devices, cores), chunk / row["writing"])
        print(
            f"| {devices} | {chunk / alone:.2f} | {alone:.1f} | {whole:.1f} | {100 * (1 - whole / alone):.1f} "
            f"| {worked:.1f} | {model:.1f} |",
            flush=True,
        )
        size = row["chunk_bytes"] / 1e6
        remarks.append(
            f"{devices} devices: a chunk of {size:.2f} MB written in {1e3 * row['writing']:.1f} ms "
            f"({size / row['writing']:.0f} MB/s), verified in {1e3 * row['verifying']:.1f} ms "
            f"({size / row['verifying']:.0f} MB/s); compiled in {row['compiling']:.1f} s"
        )
    print("\n".join(["", *remarks]))


if __name__ == "__main__":
    main()
