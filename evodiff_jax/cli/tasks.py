"""What `evodiff-jax generate` samples: a checkpoint, a model of texts, or a user's own."""

from __future__ import annotations

import argparse
import hashlib
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from evodiff_jax.cli.factories import load_source
from evodiff_jax.cli.models import class_number, load_guided
from evodiff_jax.cli.prompts import check_takes_texts, load_of_texts, read_prompts

if TYPE_CHECKING:
    from evodiff_jax.generation import Source


class Task(NamedTuple):
    """What is made.

    Attributes:
      source: the model.
      words: the model in words.
      digest: of its file, None where there is none.
      uint8: how its samples become bytes.
      settings: of guidance, for `warn_of_guidance`; None for a user's own model.
      twice: whether a model call evaluates the network twice.
    """

    source: Source
    words: str
    digest: str | None
    uint8: str
    settings: dict[str, Any] | None
    twice: bool


def load_task(args: argparse.Namespace) -> Task:
    """Loads what `add_generate_arguments` parsed.

    Raises:
      OSError: a file cannot be read.
      ValueError: a file is unusable, or an argument does not fit it.
    """
    if args.model is not None:
        source = load_source("--model", args.model)
        if source.conditions is None and source.label is None and source.num_classes:
            source = _in_turn(source)
        return Task(source, args.model, None, args.uint8 or "diffusers", None, False)
    twice = args.guidance not in (0, 1)
    if args.prompt is not None or args.prompts is not None:
        return _task_of_prompts(args, twice)
    from evodiff_jax import evaluation, generation

    guided = load_guided(args)
    model = guided.model
    label = None if args.label is None else class_number(args.label, guided.num_classes)
    if args.random_classes and not guided.num_classes:
        raise ValueError("argument --random-classes: not for an unconditional model")
    source = generation.Source(
        make_denoiser=guided.make_denoiser,
        params=guided.params,
        schedule=model.schedule,
        image_shape=model.image_shape,
        num_classes=guided.num_classes,
        label=label,
        settings={**evaluation.settings_of(model), **guided.settings, "dtype": guided.dtype},
        decode=guided.decode,
    )
    if guided.num_classes and label is None and not args.random_classes:
        source = _in_turn(source)
    uint8 = args.uint8 or model.network.uint8
    return Task(source, f"{model.name}, {guided.dtype}{guided.words}", model.digest, uint8, guided.settings, twice)


def _task_of_prompts(args: argparse.Namespace, twice: bool) -> Task:
    """Loads a model of texts; prompt k modulo their number is that of sample k."""
    from evodiff_jax import generation, pretrained

    check_takes_texts(args)
    prompts = read_prompts(args)
    dtype = args.dtype or pretrained.default_dtype()
    pipeline = load_of_texts(args)
    if pipeline.takes_mask:
        raise ValueError(f"{args.checkpoint} is a model of inpainting, which the command sample has")
    size = args.size or pipeline.size
    try:
        shape = pipeline.latent_shape(size)
    except ValueError as error:
        raise ValueError(f"argument --size: {error}") from error

    def conditions(indices: np.ndarray) -> Any:
        some = [prompts[int(i) % len(prompts)] for i in indices]
        negative = None if args.negative_prompt is None else [args.negative_prompt] * len(some)
        return pipeline.text(pipeline.params, some, negative, size=size)

    source = generation.Source(
        make_denoiser=lambda params, text: pipeline.denoiser(params, text, args.guidance),
        params=pipeline.params,
        schedule=pipeline.schedule,
        image_shape=shape,
        settings={
            "model": pipeline.name,
            "weights": pipeline.digest,
            "dtype": dtype,
            "guidance": args.guidance,
            "prompts": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
            "negative": args.negative_prompt,
            "size": list(size),
        },
        decode=pipeline.decode_each,
        conditions=conditions,
    )
    guided = f", guidance {args.guidance:g}" if twice else ""
    words = f"{pipeline.name}, {dtype}, {len(prompts):,} prompts in turn{guided}"
    return Task(source, words, None, args.uint8 or "diffusers", None, twice)


def _in_turn(source: Source) -> Source:
    from evodiff_jax.generation import classes_in_turn

    settings = {**source.settings, "classes": "in turn"}
    return source._replace(conditions=classes_in_turn(source.num_classes), settings=settings)
