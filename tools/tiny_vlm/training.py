"""Training steps, checkpoints and the score."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from mqc.testing import vqa
from tiny_vlm.data import SLOT, TELLING, Prompts, Task, cell_labels, normalise
from tiny_vlm.forward import SEE, Layout, correct, forward, forward_both


def check_forward(name: str, model: Any, processor: Any) -> float:
    """Largest difference of logits between ``forward`` and the model fed by its processor."""
    prompts = Prompts(model, processor)
    worst = 0.0
    for size in ((64, 64), (64, 96)) if name == "tiny-qwen2-vl" else ((64, 64),):
        one = vqa.sample("train", 3, size)
        scene = vqa.scene(vqa.generator("train", 3), size)
        rng = vqa.generator("train", 3, questions=True)
        pairs = [[vqa.ask(scene, rng), vqa.ask(scene, rng)]]
        ids, _ = prompts.encode_all(pairs)
        layout = prompts.layout(*size, 2)
        with torch.no_grad():
            fast = forward(
                name, model, layout, normalise(torch.from_numpy(scene.pixels)[None]), ids.long()
            ).unflatten(1, (2, SLOT))[0]
            for slot, (question, answer) in enumerate(pairs[0]):
                chat = vqa.messages(vqa.Sample(one.image, question, answer))
                text = processor.apply_chat_template(
                    chat, add_generation_prompt=True, tokenize=False
                )
                inputs = processor(images=[one.image], text=[text + answer], return_tensors="pt")
                slow = model(**inputs).logits[0, len(layout.prefix) :]
                assert inputs["input_ids"][0, len(layout.prefix) :].tolist() == (
                    ids[0, slot, : len(slow)].tolist()
                )
                worst = max(worst, float((fast[slot, : len(slow)] - slow).abs().max()))
    return worst


def evaluate(name: str, model: Any, prompts: Prompts, task: Task, limit: int = 100000) -> float:
    """Share of answers that are right in every token, teacher-forced, in percent, in float32."""
    good: list[Tensor] = []
    count = min(limit, len(task.pixels))
    with torch.no_grad():
        for at in range(0, count, 64):
            part = slice(at, min(at + 64, count))
            ids, labels = task.ids[part].long(), task.labels[part].long()
            layout = prompts.layout(*task.size, ids.shape[1])
            logits = forward(name, model, layout, normalise(task.pixels[part]), ids)
            good.append(correct(logits, labels).flatten())
    return 100 * float(torch.cat(good).float().mean())


def save_state(path: Path, model: Any, optimizer: Any, step: int) -> None:
    """A checkpoint of training: weights, both moments of AdamW, the step."""
    named = {id(p): name for name, p in model.named_parameters()}  # a head is not kept
    tensors = {"w." + name: p.detach() for name, p in model.named_parameters()}
    for p, state in optimizer.state.items():
        if id(p) not in named:
            continue
        tensors["m." + named[id(p)]] = state["exp_avg"]
        tensors["v." + named[id(p)]] = state["exp_avg_sq"]
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors | {"step": torch.tensor(step)}, path.with_suffix(".new"))
    path.with_suffix(".new").rename(path)


def load_state(path: Path, model: Any, optimizer: Any = None) -> int:
    """Load a checkpoint, with the optimizer's state if given; returns the step."""
    tensors = load_file(path)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(tensors["w." + name])
            if optimizer is not None and "m." + name in tensors:
                optimizer.state[p] = {
                    "step": torch.tensor(float(tensors["step"])),
                    "exp_avg": tensors["m." + name],
                    "exp_avg_sq": tensors["v." + name],
                }
    return int(tensors["step"])


def fit(
    name: str,
    model: Any,
    prompts: Prompts,
    tasks: list[Task],
    shares: list[float],
    evaluation: Task,
    path: Path,
    steps: int,
    rate: float,
    seed: int,
    questions: int = 4,
    batch: int = 64,
    easy: bool = False,
) -> None:
    """AdamW with a short warm-up and a cosine decay; resumes from ``path``, saves there.

    ``easy``: no decay; the tower stays as it is; the first quarter of the steps takes the first
    questions of each picture, those that name a position. One linear head has to tell, half way
    through the language model, each visual token's row and column and those of the cell that an
    answer's token depends on, so that the second half has only to match the two; and two heads of
    the layer after it have to look at that cell.
    """
    head = nn.Linear(model.config.text_config.hidden_size, 16)
    for parameter in head.parameters():
        dist.broadcast(parameter.data, 0)
    trained = list(model.parameters())
    if easy:
        trained = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
        trained = [*dict.fromkeys(trained), *head.parameters()]
    matrices = [p for p in trained if p.ndim > 1]
    vectors = [p for p in trained if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.03}, {"params": vectors, "weight_decay": 0.0}],
        lr=rate,
        betas=(0.9, 0.98),
        fused=True,
    )
    start = load_state(path, model, optimizer) if path.exists() else 0
    warm = min(200, steps // 10)

    def loss_of(
        layout: Layout, images: Tensor, ids: Tensor, labels: Tensor, cells: Tensor
    ) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits, middle, watched = forward_both(name, model, layout, images, ids, easy)
            guess = head(F.rms_norm(middle, middle.shape[-1:])).float() if easy else None
        loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100)
        if guess is None:
            return loss
        first, last = layout.visual
        wide = math.isqrt(last - first)  # tokens in a row of a square picture
        index = torch.arange(last - first).expand(len(images), -1)
        where = torch.stack((index // wide, index % wide), dim=-1) // (wide // 4)
        looks = watched[:, :, len(layout.prefix) :, first:last]  # (batch, heads, slots, tokens)
        cells = cells.flatten(1)
        own = where[0, :, 0] * 4 + where[0, :, 1]
        right = TELLING[cells.clamp(min=0)][..., own] & (cells[..., None] >= 0)
        mass = (looks * right[:, None]).sum(-1)
        known = (cells >= 0).float()[:, None]
        loss = loss - 0.5 * ((mass + 1e-4).log() * known).sum() / (known.sum() * looks.shape[1])
        asked = guess[:, len(layout.prefix) :].flatten(0, 1)
        for axis in range(2):
            part = slice(8 * axis, 8 * axis + 8)
            seen = guess[:, first:last, part].flatten(0, 1)
            loss = loss + 0.5 * F.cross_entropy(seen, where[..., axis].flatten())
            wanted = torch.where(cells < 16, cells % 4 if axis else cells // 4, -100)
            line = (cells >= 20) if axis else (cells >= 16) & (cells < 20)
            wanted = torch.where(line, cells % 4, wanted)
            wanted = torch.where(cells < 0, -100, wanted).flatten()
            loss = loss + 0.5 * F.cross_entropy(asked[:, part], wanted, ignore_index=-100)
        return loss

    compiled = torch.compile(loss_of, dynamic=False)
    rank, world = dist.get_rank(), dist.get_world_size()
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, start, steps])))
    bar = tqdm(
        range(start, steps), initial=start, total=steps, desc=name, mininterval=10, disable=rank > 0
    )
    smooth = 0.0
    for step in bar:
        task = tasks[0] if easy else tasks[int(rng.choice(len(tasks), p=shares))]
        chosen = torch.from_numpy(rng.integers(len(task.pixels), size=batch))[rank::world]
        columns = torch.from_numpy(rng.permutation(task.ids.shape[1])[:questions])
        if easy and step < steps // 4:
            columns = torch.arange(questions)
        ids = task.ids[chosen][:, columns].long()
        labels = task.labels[chosen][:, columns].long()
        layout = prompts.layout(*task.size, questions)
        for group in optimizer.param_groups:
            through = max(0.0, (step - warm) / max(1, steps - warm))
            scale = 1.0 if easy else 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * through))
            group["lr"] = rate * min(1.0, (step + 1) / warm) * scale
        cells = task.cells[chosen][:, columns].long()
        run = compiled if task is tasks[0] else loss_of  # rare sizes are not worth compiling
        loss = run(layout, normalise(task.pixels[chosen]), ids, labels, cells)
        loss.backward()
        share_gradients(trained, world)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        smooth = loss.item() if step == start else 0.96 * smooth + 0.04 * loss.item()
        if step % 50 == 49:
            bar.set_postfix(loss=f"{smooth:.4f}")
        if rank == 0 and ((step + 1) % 250 == 0 or step + 1 == steps):
            save_state(path, model, optimizer, step + 1)
            score = evaluate(name, model, prompts, evaluation, 512)
            tqdm.write(f"{name} step {step + 1} loss {smooth:.4f} evaluation {score:.2f} %")


def look(name: str, model: Any, task: Task, path: Path, steps: int, rate: float, seed: int) -> None:
    """Teach the vision tower to tell what the cells hold, by a linear head on each token.

    Without this the whole model spends a thousand steps ignoring the pictures.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    if path.exists():
        load_state(path, model)
        return
    labels = cell_labels("train", 0, len(task.pixels))
    sizes = [1 + len(vqa.SHAPES) + len(vqa.CHARACTERS), 1 + len(vqa.COLOURS)]
    place = torch.arange(16).repeat(64 // world)
    if name != "tiny-qwen2-vl":  # whose tower knows no positions
        sizes += [4, 4]
    head = nn.Linear(model.config.text_config.hidden_size, sum(sizes))
    for parameter in head.parameters():
        dist.broadcast(parameter.data, 0)

    def loss_of(images: Tensor, cells: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = SEE[name](model, images)
            side = math.isqrt(x.shape[1])
            x = x.unflatten(1, (4, side // 4, 4, side // 4)).mean((2, 4))  # tokens of each cell
            guess = head(x)
        parts = guess.float().view(-1, sum(sizes)).split(sizes, dim=1)
        cells = cells.view(-1, 2)
        targets = (cells[:, 0], cells[:, 1], place // 4, place % 4)
        losses = [F.cross_entropy(*pair) for pair in zip(parts, targets, strict=False)]
        return torch.stack(losses).sum()

    compiled = torch.compile(loss_of, dynamic=False)
    seen = [
        p for n, p in model.named_parameters() if "language_model" not in n and "lm_head" not in n
    ]
    parameters = [*seen, *head.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.03, fused=True
    )
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, 77])))
    bar = tqdm(range(steps), desc=f"{name} tower", mininterval=10, disable=rank > 0)
    smooth = 7.0
    for step in bar:
        chosen = torch.from_numpy(rng.integers(len(task.pixels), size=64))[rank::world]
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 100) * (1 - 0.8 * step / steps)
        loss = compiled(normalise(task.pixels[chosen]), labels[chosen])
        loss.backward()
        share_gradients(parameters, world)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        smooth = 0.98 * smooth + 0.02 * loss.item()
        if step % 50 == 49:
            bar.set_postfix(loss=f"{smooth:.4f}")
    if rank == 0:
        save_state(path, model, optimizer, 0)
    dist.barrier()


def share_gradients(parameters: list[Any], world: int) -> None:
    """Average the gradients of the worker processes."""
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads]) / world
    dist.all_reduce(flat)
    for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(part.view_as(grad))
