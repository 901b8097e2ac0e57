"""Trains the demo model from scratch.

`python -m examples.shapes.train --out FOLDER`: first the VAE, then the pool of encoded pictures,
then the transformer with rectified flow: first on sentences that say all (`tasks`), then on those
that people write (`phrases`). What is done is kept in the folder: a run that was ended goes on
where its last checkpoint was taken.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from omnigen_fast.kernels import widened
from torch import Tensor

from omnigen_fast.config import ModelConfig
from omnigen_fast.processor import Processor
from omnigen_fast.request import DEFAULT_NEGATIVE_PROMPT
from omnigen_fast.weights.names import ORIGINAL

from .autoencoder import (
    encode_scenes,
    save_autoencoder,
    train_autoencoder,
    train_decoder,
)
from .network import Conditions, Network
from .optimizer import Optimizer
from .phrases import synonyms, words
from .pool import Pool, collate, make_families
from .scenes import Scene
from .tasks import EDITS, Task
from .words import write_tokenizer

_Words = Callable[[Task, random.Random], str]

DRAWS = 2  # of time and noise for each condition
# Conditions of each part of a step; "other" is one of `_OTHERS`.
PARTS = {"text": 16, "edit": 16, "other": 16, "negative": 4}
# How often the last part of a step's batch is of each kind.
_OTHERS = {"subject": 0.32, "compose": 0.26, "mask": 0.12, "pair": 0.20, "images": 0.10}
WORDS_DECIDE = 0.15  # the time until which a picture's content comes from its condition
EARLY = 0.6  # share of draws with times before it
ASKED_WEIGHT = 4.0  # what a latent counts that shows what was asked, beyond one that does not
ASKED_FROM = 0.2  # deviations of a latent by which it shows something
FURTHER_RATE = 0.5  # of the full learning rate, at which the further training begins
FURTHER_IMPLIED = 0.4  # see Pool.task
# Conditions of each part of its steps: there is much to learn from "text", little from what needs
# few words.
FURTHER_PARTS = {"text": 20, "edit": 12, "other": 6, "negative": 4}
LONGEST_STEP = 20.0  # seconds; whatever is beyond it the machine was stopped or asleep
_LONG = tuple(round(64 ** (i / 31), 4) for i in range(32))  # no picture here is long enough


def phi3_config(vocab_size: int, hidden: int = 256, layers: int = 5) -> dict:
    """The `config.json` of the original layout."""
    return {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "vocab_size": vocab_size,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {"type": "su", "short_factor": [1.0] * 32, "long_factor": list(_LONG)},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }


POS_EMBED_SIZE = 64  # 1024 px, the default size of a call


@dataclass(frozen=True)
class Part:
    """Tasks of one kind for a step."""

    conditions: Conditions
    noisy: Tensor  # [batch, draws, 4, height, width]
    times: Tensor  # [batch, draws]
    velocity: Tensor  # as noisy
    weights: Tensor  # of the squared errors; broadcasts to noisy, 1 on average


def own_words(task: Task, rng: random.Random) -> str:
    """One of the wordings of `tasks`."""
    return task.words(rng)


class Sampler:
    """Parts of training steps; `words` gives a task's prompt, `implied` goes to `Pool.task`."""

    def __init__(
        self,
        pool: Pool,
        latents: Tensor,
        processor: Processor,
        seed: int,
        words: _Words = own_words,
        implied: float = 0.0,
    ) -> None:
        self._pool, self._latents, self._processor = pool, latents, processor
        self._words, self._implied = words, implied
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def batch(self, kind: str, size: int) -> Part:
        """A part of a step, of `size` conditions.

        `kind` is one of `tasks.KINDS`, "edit" for any edit, "images" for image guidance's branch
        (input images without words), or "negative" for the branch of the negative prompt.
        """
        rng = self.rng
        if kind == "negative":
            # one condition for all; every draw has a picture of its own
            text = DEFAULT_NEGATIVE_PROMPT if rng.random() < 0.8 else ""
            kinds = rng.choices(("text", "edit", "subject", "compose"), k=size * DRAWS)
            targets = self._of([self._task(one).target for one in kinds]).unsqueeze(0)
            conditions = collate(
                self._processor, [text], targets.new_empty(1, 0, *targets.shape[2:])
            )
            return Part(conditions, *self._noise(targets), torch.ones(()))
        words_known = kind != "images"
        if not words_known:
            kind = rng.choices(("edit", "subject", "compose", "pair"), (6, 2, 2, 1))[0]
            tasks = [self._task(kind) for _ in range(size)]
            count = len(tasks[0].inputs)
            tags = " ".join(f"<img><|image_{i + 1}|></img>" for i in range(count))
            texts = [tags] * size
        else:
            tasks = [self._task(kind) for _ in range(size)]
            texts = [self._words(task, rng) for task in tasks]
        images = [self._of(task.inputs) for task in tasks]
        conditions = collate(self._processor, texts, torch.stack(images))
        targets = self._of([task.target for task in tasks])
        weights = torch.ones(())
        if words_known:
            weights = 1 + ASKED_WEIGHT * self._asked(tasks, targets)
            weights = (weights / weights.mean()).unsqueeze(1)
        noisy = self._noise(targets.unsqueeze(1).expand(-1, DRAWS, -1, -1, -1))
        return Part(conditions, *noisy, weights)

    def _asked(self, tasks: Sequence[Task], targets: Tensor) -> Tensor:  # [tasks, 1, ...], 0 or 1
        """Where a target shows things, or what is no more as it was before an edit.

        That is a small part of a picture. Where all is as the words say, weights change nothing;
        for a branch without words they would make things likelier than they are.
        """
        empty = self._of([Scene((), task.target.background) for task in tasks])
        before = [task.inputs[0] if task.kind in EDITS else task.target for task in tasks]
        apart = torch.maximum((targets - empty).abs(), (targets - self._of(before)).abs())
        return (apart.amax(1, keepdim=True) > ASKED_FROM).float()

    def _task(self, kind: str) -> Task:
        if kind == "edit":
            kind = self.rng.choice(list(EDITS))
        return self._pool.task(kind, self.rng, self._implied)

    def _of(self, scenes: Sequence) -> Tensor:  # [scenes, 4, height, width]
        if not scenes:
            return self._latents[:0]
        return self._latents[[self._pool.index(scene) for scene in scenes]]

    def _noise(self, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rectified flow (Liu et al., 2022): `x_t = (1 - t) noise + t image`, `v = image - noise`.

        Times are spread evenly over the draws of a condition; most of the late ones are
        logit-normal (Esser et al., 2024). Those teach how to draw but hardly what: from about
        t = 0.1 on, a shape of so many latents stands out of the noise, and the words say nothing
        new. So `EARLY` of the times are before `WORDS_DECIDE`, and most of these close to zero.
        """
        count, draws = targets.shape[:2]
        places = torch.rand(count, draws, generator=self.generator)
        even = (torch.arange(draws) + places) / draws
        late = ((even - EARLY) / (1 - EARLY)).clamp(1e-4, 1 - 1e-4)
        times = torch.sigmoid(1.2 * torch.special.ndtri(late) - 0.3)
        uniform = torch.rand(count, 1, generator=self.generator) < 0.3
        times = torch.where(uniform, late, times)
        early = (even / EARLY).square() * WORDS_DECIDE
        times = torch.where(even < EARLY, early, times)
        noise = torch.randn(targets.shape, generator=self.generator)
        t = times[..., None, None, None]
        return (1 - t) * noise + t * targets, times, targets - noise


def save_model(folder: Path, config: dict, weights: dict[str, Tensor]) -> None:
    """Writes `config.json` and `model.safetensors` in the original layout and bfloat16."""
    from safetensors.torch import save_file

    tensors = {}
    for name, value in weights.items():
        tensors[original_name(name)] = value.detach().to(torch.bfloat16).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def original_name(name: str) -> str:
    """What the original layout calls one of our parameters."""
    head, _, tail = name.partition(".")
    if head == "layers":
        layer, _, kind = tail.partition(".")
        return ORIGINAL[kind][0].format(layer)
    if name in ORIGINAL:
        return ORIGINAL[name][0]
    module, _, kind = name.rpartition(".")
    return f"{ORIGINAL[module][0]}.{kind}"


def learning_fraction(used: float, step: int) -> float:
    """Of the full learning rate: a short warm-up, then down to zero (Bergsma et al., 2025)."""
    return min(1, (step + 1) / 100) * max(0.0, 1 - used)


def train_transformer(
    network: Network,
    sampler: Sampler,
    optimizer: Optimizer,
    *,
    steps: int,
    threads: int = 1,
    rate: float = 1.0,
    sizes: Mapping[str, int] = PARTS,
    spent: float = 0.0,
    save: Callable[[float], None] = lambda spent: None,
) -> list[float]:
    """Trains up to a number of steps; returns the losses.

    Args:
        steps: those that an optimizer has done before count.
        threads: parts of a step that are computed at the same time. Each runs on one core: these
            tensors are so small that cores which share an operation wait for one another most of
            the time.
        rate: the fraction of the full learning rate at which it begins.
        sizes: conditions of each part of a step.
        spent: minutes that an earlier run took.
        save: called every two minutes and at the end with the minutes spent.
    """
    losses: list[float] = []
    workers = ThreadPoolExecutor(threads)
    last = last_save = last_log = time.monotonic()
    used, minutes_spent = optimizer.steps / steps, spent
    while used < 1:
        kinds = list(_OTHERS)
        other = sampler.rng.choices(kinds, [_OTHERS[kind] for kind in kinds])[0]
        parts = {other if kind == "other" else kind: size for kind, size in sizes.items()}
        batches = {kind: sampler.batch(kind, size) for kind, size in parts.items()}
        total = sum(parts.values())
        weights = {kind: size / total for kind, size in parts.items()}
        # the longest part first, the short ones together
        kinds = sorted(parts, key=parts.__getitem__, reverse=True)
        running = [
            workers.submit(backward, network, batches[kind], weights[kind]) for kind in kinds
        ]
        logged = {kind: one.result() for kind, one in zip(kinds, running)}
        now = time.monotonic()
        minutes_spent += min(now - last, LONGEST_STEP) / 60
        last = now
        used = (optimizer.steps + 1) / steps
        optimizer.step(rate * learning_fraction(used, optimizer.steps), workers.map)
        losses.append(sum(weights[kind] * logged[kind] for kind in parts))
        if now - last_log > 30 or used >= 1:
            recent = losses[-50:]
            print(
                f"step {optimizer.steps}, {minutes_spent:.1f} min: loss "
                f"{sum(recent) / len(recent):.4f} "
                + " ".join(f"{kind} {value:.3f}" for kind, value in logged.items()),
                flush=True,
            )
            last_log = now
        if now - last_save > 120 or used >= 1:
            save(minutes_spent)
            last_save = now
    workers.shutdown()
    return losses


def backward(network: Network, part: Part, weight: float) -> float:
    """Adds the gradients of a part's loss, times `weight`; returns the loss."""
    noisy = part.noisy.to(network.weight("norm").dtype)
    predicted = network(part.conditions, noisy, part.times)
    loss = ((predicted.float() - part.velocity).square() * part.weights).mean()
    (loss * weight).backward()
    return loss.item()


def make_network(config_values: dict, seed: int) -> Network:
    """An untrained network of a `config.json`."""
    torch.manual_seed(seed)
    return Network(ModelConfig.from_phi3(config_values, POS_EMBED_SIZE))


def arithmetic() -> torch.dtype:
    """What this processor trains fastest in; the optimizer keeps float32 either way."""
    return widened.fastest(torch.bfloat16)


def start_from(network: Network, folder: Path, tokenizer: Path) -> None:
    """Takes the weights of a trained model, whose tokenizer may know fewer words.

    A new word begins as the first of its group in `phrases`, or as it was.

    Args:
        network: of the new tokenizer.
        folder: of the trained model.
        tokenizer: the new `tokenizer.json`.
    """
    from safetensors.torch import load_file
    from tokenizers import Tokenizer

    values = load_file(folder / "model.safetensors")
    old = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    new = Tokenizer.from_file(str(tokenizer)).get_vocab()
    first = {word: group[0] for group in synonyms() for word in group}
    with torch.no_grad():
        for name, weight in network.named().items():
            value = values[original_name(name)].float()
            if name != "embed_tokens":
                weight.copy_(value.view_as(weight))
                continue
            for word, index in new.items():
                known = old.get(word, old.get(first.get(word, word)))
                if known is not None:
                    noise = torch.randn(weight.shape[1]) if word not in old else 0.0
                    weight[index] = value[known] + 0.1 * noise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the model and the run")
    parser.add_argument("--steps", type=int, default=4600, help="of the transformer")
    parser.add_argument(
        "--further-steps", type=int, default=2200, help="of it on what people write"
    )
    parser.add_argument(
        "--start", type=Path, help="a trained model: its VAE and transformer are trained further"
    )
    parser.add_argument("--vae-steps", type=int, default=4500)
    parser.add_argument(
        "--decoder-steps", type=int, default=2500, help="of the VAE's decoder alone"
    )
    parser.add_argument("--families", type=int, default=5000, help="about 6 pictures each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # see train_transformer
    run = arguments.out / "run"
    run.mkdir(parents=True, exist_ok=True)

    if not (arguments.out / "vae").exists():
        if arguments.start is not None:
            shutil.copytree(arguments.start / "vae", arguments.out / "vae")
        else:
            vae = train_autoencoder(arguments.vae_steps, arguments.seed, threads=arguments.threads)
            train_decoder(
                vae, arguments.decoder_steps, arguments.seed + 1, threads=arguments.threads
            )
            save_autoencoder(vae, arguments.out / "vae")
    pool = Pool(make_families(arguments.families, random.Random(arguments.seed)))
    latents = _encoded(pool, arguments.out / "vae", run / "latents.pt")

    start = arguments.start
    if start is None:
        start = run / "first"
        start.mkdir(exist_ok=True)
        _train(arguments, pool, latents, start, steps=arguments.steps)
    _train(
        arguments,
        pool,
        latents,
        arguments.out,
        steps=arguments.further_steps,
        start=start,
        words=words,
        implied=FURTHER_IMPLIED,
        rate=FURTHER_RATE,
        sizes=FURTHER_PARTS,
    )


def _train(
    arguments: argparse.Namespace,
    pool: Pool,
    latents: Tensor,
    folder: Path,
    *,
    steps: int,
    start: Path | None = None,
    words: _Words = own_words,
    implied: float = 0.0,
    rate: float = 1.0,
    sizes: Mapping[str, int] = PARTS,
) -> None:
    """Trains the transformer of a model folder, or goes on with it."""
    tokenizer = folder / "tokenizer.json"
    config = phi3_config(write_tokenizer(tokenizer))
    network = make_network(config, arguments.seed)
    if start is not None:
        start_from(network, start, tokenizer)
    processor = Processor.from_file(tokenizer, network.config)
    optimizer = Optimizer(network.to(arithmetic()))
    sampler = Sampler(pool, latents, processor, arguments.seed, words, implied)
    state_path, spent = arguments.out / "run" / f"{'first' if start is None else 'further'}.pt", 0.0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        optimizer.load(state["optimizer"])
        spent = state["minutes"]
        sampler.rng.seed(arguments.seed + optimizer.steps)
        sampler.generator.manual_seed(arguments.seed + optimizer.steps)

    def save(minutes_spent: float) -> None:
        partial = state_path.with_suffix(".part")
        torch.save({"optimizer": optimizer.state(), "minutes": minutes_spent}, partial)
        partial.replace(state_path)
        save_model(folder, config, optimizer.averaged(network))

    train_transformer(
        network,
        sampler,
        optimizer,
        steps=steps,
        threads=arguments.threads,
        rate=rate,
        sizes=sizes,
        spent=spent,
        save=save,
    )


def _encoded(pool: Pool, vae: Path, path: Path) -> Tensor:
    """Latents of a pool's pictures, from `path` if they are there already."""
    if path.exists():
        return torch.load(path, weights_only=True)
    from diffusers import AutoencoderKL

    start = time.monotonic()
    model = AutoencoderKL.from_pretrained(vae).eval()
    latents = encode_scenes(model, pool.scenes)
    print(f"{len(latents)} pictures encoded in {time.monotonic() - start:.0f} s", flush=True)
    torch.save(latents, path)
    return latents


if __name__ == "__main__":
    main()
