"""Speed and memory of a text-to-image pipeline of the size of Stable Diffusion 1.5, with parameters drawn at random.

    uv run python benchmarks/pipeline_speed.py
    uv run python benchmarks/pipeline_speed.py --size 64 --tiny
    uv run python benchmarks/pipeline_speed.py --attention

For each batch it prints, with guidance and DPM-Solver++(2M): seconds a picture from noise to pixels; the time of the
run of the network over that of as many calls of the jitted network alone, of the same batch; seconds of the decoder and
of the text encoder; the time to trace and compile; the device's peak memory so far, where the device tells it. Times
are medians of three after one that is not counted.

Where torch and diffusers can be imported, diffusers' pipeline of the same size, without `torch.compile`, is timed
first, in a process of its own: neither library then holds memory that the other one needs. It needs an environment such
as that of `speed.py`.

No batch begins after --minutes. With --attention attention alone is timed in place of all this: with the limit on the
memory of its weights, and without one.
"""

import argparse
import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import evodiff_jax as ed
from evodiff_jax import pretrained
from evodiff_jax.pretrained import blocks
from evodiff_jax.pretrained.model import Model, build
from evodiff_jax.pretrained.pipeline import Encoder, Pipeline
from evodiff_jax.pretrained.text.tokenizer import Tokenizer
from evodiff_jax.schedules import discrete, scaled_linear_betas

Settings = dict[str, Any]

GUIDANCE = 7.5
REPEATS = 3
TOKENS, VOCABULARY = 77, 49408
KINDS = {
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
UNET: Settings = {
    **KINDS,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
    "sample_size": 64,
}
AUTOENCODER: Settings = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
TEXT: Settings = {
    "vocab_size": VOCABULARY,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "eos_token_id": 2,
}
TINY = (
    {**UNET, "block_out_channels": [32, 32, 64, 64], "layers_per_block": 1, "cross_attention_dim": 32},
    {**AUTOENCODER, "block_out_channels": [32] * 4, "layers_per_block": 1},
    {**TEXT, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
)


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--batch", type=int, nargs="+", default=[4, 8])
    add("--size", type=int, default=512, help="pixels along a side")
    add("--calls", type=int, default=10)
    add("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on accelerators")
    add("--tiny", action="store_true", help="networks that a CPU evaluates in no time")
    add("--minutes", type=float, default=6.0, help="after which no batch begins")
    add("--attention", action="store_true", help="time attention alone")
    add("--peer", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    started = time.perf_counter()
    if args.peer:
        return measure_peer(args)
    if args.attention:
        return measure_attention()
    if all(importlib.util.find_spec(name) for name in ("torch", "diffusers")):
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--peer"], check=False)
    else:
        print("diffusers: torch or diffusers cannot be imported")
    dtype = args.dtype or pretrained.default_dtype()
    device = jax.devices()[0]
    print(
        f"evodiff_jax {ed.__version__}, jax {jax.__version__}, {device.platform}, {device.device_kind}, {dtype}; "
        f"{args.size} x {args.size} pixels, {args.calls} calls"
    )
    pipeline = drawn_pipeline(*(TINY if args.tiny else (UNET, AUTOENCODER, TEXT)), dtype)
    print("batch   s a picture   run over its calls   s a call   s decode   s text   compile s   peak GiB", flush=True)
    for batch in args.batch:
        if time.perf_counter() - started > 60 * args.minutes:
            print(f"{batch:5}   left out after {args.minutes:g} minutes")
            continue
        measure(pipeline, batch, args.size, args.calls)


def measure(pipeline: Pipeline, batch: int, size: int, calls: int) -> None:
    """Prints the line of one batch."""
    params, schedule = pipeline.params, pipeline.schedule
    prompts = ["a photo"] * batch
    text_time = median(lambda: pipeline.text(params, prompts, prompts))
    text = pipeline.text(params, prompts, prompts)
    x_T = schedule.noise(jax.random.key(0), (batch, *pipeline.latent_shape((size, size))))
    plan = ed.plan(schedule, ed.grids.log_snr(schedule, calls), ed.solvers.dpm_solver_pp(2))

    def run(params: Any, text: pretrained.Text, x_T: jax.Array, plan: ed.Plan) -> jax.Array:
        return ed.sample(pipeline.denoiser(params, text, GUIDANCE), x_T, plan)

    def call(params: Any, text: pretrained.Text, x_T: jax.Array) -> jax.Array:
        """The network alone, of the batch that guidance makes."""
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), *text)
        twice = jnp.concatenate([x_T, x_T])
        return pipeline.network.apply(params["network"], x=twice, timesteps=jnp.full(2 * batch, 500.0), **both)

    started = time.perf_counter()
    sampler = jax.jit(run).lower(params, text, x_T, plan).compile()
    decoder = jax.jit(pipeline.decode).lower(params, x_T).compile()
    compile_time = time.perf_counter() - started
    network = jax.jit(call).lower(params, text, x_T).compile()
    latents = median(lambda: sampler(params, text, x_T, plan))
    decoding = median(lambda: decoder(params, x_T))
    one = median(lambda: network(params, text, x_T))
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", float("nan")) / 2**30
    print(
        f"{batch:5} {(latents + decoding) / batch:13.4f} {latents / (calls * one):20.3f} {one:10.4f} {decoding:10.4f}"
        f" {text_time:8.4f} {compile_time:11.1f} {peak:10.2f}",
        flush=True,
    )


def drawn_pipeline(unet: Settings, autoencoder: Settings, text: Settings, dtype: str) -> Pipeline:
    """A pipeline of these networks, whose tokenizer gives every prompt the same tokens."""
    network = drawn("unet2d_condition", "UNet2DConditionModel", unet, dtype)
    scheduled = network.network._replace(schedule=discrete(scaled_linear_betas()), prediction="epsilon")
    tokenizer = Tokenizer(
        lambda text: [320, 1125], lambda tokens: "", TOKENS, VOCABULARY - 2, VOCABULARY - 1, VOCABULARY - 1
    )
    return Pipeline(
        name="drawn",
        network=network._replace(network=scheduled),
        autoencoder=drawn("autoencoder_kl", "AutoencoderKL", autoencoder, dtype),
        encoders=(Encoder(drawn("clip_text", "CLIPTextModel", text, dtype), tokenizer),),
        zeros_for_no_prompt=False,
        digest="",
    )


def drawn(family: str, cls: str, settings: Mapping[str, Any], dtype: str) -> Model:
    """A network with parameters of the size that training starts from, made on the device."""
    network = build(family, cls, settings, dtype)
    shapes = jax.eval_shape(lambda inputs: network.module.init(jax.random.key(0), **inputs), network.inputs)["params"]
    largest = max(leaf.size for leaf in jax.tree.leaves(shapes))

    @jax.jit
    def draw(key: jax.Array) -> Any:
        numbers = jax.random.normal(key, (largest,))  # the same for all: their values do not change the time

        def leaf_of(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
            name = path[-1].key
            if name in ("scale", "bias"):
                return jnp.full(leaf.shape, float(name == "scale"), leaf.dtype)
            width = np.sqrt(np.prod(leaf.shape[:-1])) if name == "kernel" else 50.0
            return (numbers[: leaf.size].reshape(leaf.shape) / width).astype(network.stored or jnp.float32)

        return jax.tree_util.tree_map_with_path(leaf_of, shapes)

    return Model(cls, cls, network, draw(jax.random.key(0)), "", {})


def median(run: Callable[[], Any]) -> float:
    """Seconds of a run, the first of which is not counted."""
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return float(np.median(times[1:]))


def measure_peer(args: argparse.Namespace) -> None:
    """Prints what diffusers' pipeline takes, with the same networks in PyTorch."""
    import diffusers  # pyright: ignore[reportMissingImports]
    import torch  # pyright: ignore[reportMissingImports]

    unet, autoencoder, _ = TINY if args.tiny else (UNET, AUTOENCODER, TEXT)
    gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if args.dtype == "bfloat16" or (args.dtype is None and gpu) else torch.float32
    where = torch.cuda.get_device_name() if gpu else "cpu"
    print(f"diffusers {diffusers.__version__}, torch {torch.__version__}, {where}, {dtype}")
    with torch.device("cuda" if gpu else "cpu"):
        pipe = diffusers.StableDiffusionPipeline(
            unet=diffusers.UNet2DConditionModel(**unet).to(dtype).eval(),
            vae=diffusers.AutoencoderKL(**autoencoder).to(dtype).eval(),
            scheduler=diffusers.DPMSolverMultistepScheduler(
                beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1
            ),
            text_encoder=None,
            tokenizer=None,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipe.set_progress_bar_config(disable=True)
        print("batch   s a picture   peak GiB")
        for batch in args.batch:
            text = torch.randn(batch, TOKENS, unet["cross_attention_dim"], dtype=dtype)

            def run(text: Any = text) -> None:
                pipe(
                    prompt_embeds=text,
                    negative_prompt_embeds=text,
                    num_inference_steps=args.calls,
                    guidance_scale=GUIDANCE,
                    height=args.size,
                    width=args.size,
                    output_type="pt",
                )
                if gpu:
                    torch.cuda.synchronize()

            seconds = median(run)
            peak = torch.cuda.max_memory_allocated() / 2**30 if gpu else float("nan")
            print(f"{batch:5} {seconds / batch:13.4f} {peak:10.2f}", flush=True)


def measure_attention() -> None:
    """Prints time and memory of self-attention in Stable Diffusion's first level, where its weights are largest."""
    tokens, heads, width = 4096, 8, 40
    device = jax.devices()[0]
    print(f"jax {jax.__version__}, {device.platform}, {device.device_kind}")
    print(f"{tokens} tokens, {heads} heads of {width}, float32")
    print("batch   limit GiB   parts   temporary GiB   ms")
    limits = {"1": blocks._MOST_BYTES, "none": 2**62}
    for batch in (2, 4):
        q = jax.random.normal(jax.random.key(0), (batch, tokens, heads, width))
        for name, limit in limits.items():
            blocks._MOST_BYTES = limit
            parts = blocks._parts(tokens, batch * heads * tokens * 4)
            # A function of its own each time: the limit is no part of what JAX knows a program by.
            attend = jax.jit(lambda q, k, v: blocks.attend(q, k, v)).lower(q, q, q).compile()
            memory = attend.memory_analysis()
            temporary = float("nan") if memory is None else memory.temp_size_in_bytes / 2**30
            seconds = median(lambda attend=attend, q=q: attend(q, q, q))
            print(f"{batch:5} {name:>11} {parts:7} {temporary:15.2f} {1000 * seconds:6.0f}", flush=True)


if __name__ == "__main__":
    main()
