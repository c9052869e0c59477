#!/usr/bin/env python3
"""Train the tiny vision-language models in ``mqc/models`` from nothing.

The task is :mod:`mqc.testing.vqa`. Three phases: plain training; outliers put into residual
channels, norm gains and MLP rows by a rescaling that changes no result; fine-tuning that lets the
outliers grow into the model. See ``mqc/models/README.md`` for the commands that made the shipped
files.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from tiny_vlm.architectures import IMAGE, MODELS
from tiny_vlm.data import Prompts, cached_pictures, encoded, normalise
from tiny_vlm.forward import SEE
from tiny_vlm.outliers import LAST, Strengths, last_projection, text_outliers, vision_outliers
from tiny_vlm.saving import save, warm_start, write_card
from tiny_vlm.training import check_forward, evaluate, fit, load_state, look

from mqc.testing import vqa


def work(rank: int, args: argparse.Namespace) -> None:
    """One of the worker processes; each takes its part of every batch, on one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rendezvous = f"file://{args.scratch.resolve()}/{args.model}.rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=args.workers)
    name = args.model
    model, processor = MODELS[name]()
    if rank == 0:
        worst = check_forward(name, model, processor)
        print(f"{name}: {sum(p.numel() for p in model.parameters())} parameters")
        print(f"difference to the model's own forward pass: {worst:.1e}", flush=True)
    prompts = Prompts(model, processor)
    data = args.scratch / "data"
    tasks = [
        encoded(
            prompts,
            cached_pictures(data, "train", 0, count, size, 8, 1),
            "train" if size == IMAGE and args.easy_steps else None,
        )
        for size, count in sizes_of(args)
    ]
    shares = [0.94, 0.03, 0.03] if len(tasks) > 1 else [1.0]
    evaluation = encoded(prompts, cached_pictures(data, "evaluation", 0, 2048, IMAGE, 1, 1))
    if args.start is not None:
        warm_start(model, processor, args.start)
    plain = args.scratch / name / "plain.safetensors"
    if args.look_steps and not plain.exists():
        tower = args.scratch / name / "tower.safetensors"
        look(name, model, tasks[0], tower, args.look_steps, args.rate, args.seed)
        with torch.no_grad():  # smaller: the language model's layers can add to them
            spread = SEE[name](model, normalise(tasks[0].pixels[:16])).std()
            for parameter in last_projection(model).parameters():
                parameter.mul_(2.0 / spread)
        if rank == 0:
            print(f"visual tokens scaled from a standard deviation of {spread:.2f}", flush=True)
    common = name, model, prompts, tasks, shares, evaluation
    first = args.scratch / name / "easy.safetensors"
    if args.easy_steps and not plain.exists():
        fit(
            *common,
            first,
            args.easy_steps,
            0.7 * args.rate,
            args.seed,
            batch=args.easy_batch,
            easy=True,
        )
        dist.barrier()
        load_state(first, model)
    if args.steps:
        fit(*common, plain, args.steps, args.rate / 3, args.seed, batch=args.batch)
    healed = args.scratch / name / "healed.safetensors"
    calibration = encoded(prompts, cached_pictures(data, "calibration", 0, 512, IMAGE, 1, 1))
    if args.heal_steps:
        dist.barrier()
        load_state(plain if args.steps else first, model)
        with torch.no_grad():
            strengths = Strengths()
            text_outliers(name, model, prompts, calibration, strengths)
            vision_outliers(name, model, prompts, calibration, strengths)
            for parameter in model.parameters():
                dist.broadcast(parameter, 0)
        if rank == 0:
            score = evaluate(name, model, prompts, evaluation, 512)
            print(f"{name} with outliers, before fine-tuning: {score:.2f} %", flush=True)
        fit(*common, healed, args.heal_steps, args.heal_rate, args.seed + 1, batch=args.batch)
    if rank == 0:
        with torch.no_grad():
            if args.heal_steps:  # once more, by powers of two: exact, nothing to repair
                text_outliers(name, model, prompts, calibration, LAST[name])
            for parameter in model.parameters():
                parameter.copy_(parameter.to(torch.bfloat16).float())
        score = evaluate(name, model, prompts, evaluation)
        save(model, processor, args.out)
        write_card(args, model, score)
        print(f"{name}: exact match {score:.2f} % of {len(evaluation.pixels)} evaluation samples")


def sizes_of(args: argparse.Namespace) -> list[tuple[vqa.Size, int]]:
    """Picture sizes trained on and how many pictures of each."""
    if args.model != "tiny-qwen2-vl":
        return [(IMAGE, args.pictures)]
    other = args.pictures // 10
    return [(IMAGE, args.pictures), ((64, 96), other), ((96, 64), other)]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=sorted(MODELS), required=True)
    parser.add_argument("--look-steps", type=int, default=600, help="steps of the tower alone")
    parser.add_argument("--easy-steps", type=int, default=1000, help="steps on easy questions")
    parser.add_argument("--easy-batch", type=int, default=24, help="pictures in a step of those")
    parser.add_argument("--steps", type=int, default=0, help="steps of the whole model, plain")
    parser.add_argument("--batch", type=int, default=64, help="pictures in a step")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="learning rate of it")
    parser.add_argument("--heal-steps", type=int, default=600, help="steps after the rescaling")
    parser.add_argument("--heal-rate", type=float, default=5e-4, help="learning rate of them")
    parser.add_argument("--start", type=Path, help="folder of a model whose language model to take")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model to write")
    parser.add_argument("--scratch", type=Path, default=Path("build/tiny-vlm"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=int, default=32000)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    (args.scratch / f"{args.model}.rendezvous").unlink(missing_ok=True)
    data = args.scratch / "data"
    for size, count in sizes_of(args):
        cached_pictures(data, "train", 0, count, size, 8, args.workers)
    cached_pictures(data, "evaluation", 0, 2048, IMAGE, 1, args.workers)
    cached_pictures(data, "calibration", 0, 512, IMAGE, 1, args.workers)
    torch.multiprocessing.spawn(work, args=(args,), nprocs=args.workers)


if __name__ == "__main__":
    main()
