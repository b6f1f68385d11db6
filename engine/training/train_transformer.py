"""The transformer: from noise, the source latent and a prompt to the styled latent, in one step.

The network returns the residual on the source (clean - source), so at its start it is the identity and spends no
width on copying noise. Stage 1 compares latents, each channel weighted by how far it moves pixels. Stage 2 goes on
through the frozen decoder with pixel, low-pass, edge and temporal differences; it costs three times as much a
sample and steadies contours. Teachers are deterministic, so regression at full noise is the one-step model: no
distillation follows. One process per core; they average their gradients.

    python -m engine.training.train_transformer --work .work/tiny --stage 1 --minutes 50 --workers 2
"""

from __future__ import annotations

import argparse
import signal
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn import functional

from engine.training.budget import Budget, load_checkpoint, log, save_checkpoint
from engine.training.latents import load_latents, load_vae
from engine.training.optimisers import Muon, average_gradients, split_parameters, world
from engine.training.sampling import Batch, LatentSampler, noised
from engine.training.text_table import build as build_text_table
from engine.wan.presets import LIVEBRUSH_TINY
from engine.wan.transformer import CausalTransformer
from engine.wan.vae import TinyVAE, VAEState

SMALL, WHOLE = 16, 32  # latents per side of a crop: 128 px, and the whole 256 px
WHOLE_SHARE = 0.12


@dataclass(frozen=True)
class Stage:
    """What differs between the two stages.

    Frames of a clip are alike: batches of single frames show three times as many pictures at the same cost, and
    whole clips teach what time adds.
    """

    number: int
    batch: int
    whole_batch: int
    muon_rate: float
    adam_rate: float
    hold: float
    single_share: float


STAGES = {
    1: Stage(1, batch=6, whole_batch=2, muon_rate=0.012, adam_rate=3e-3, hold=0.7, single_share=0.75),
    2: Stage(2, batch=6, whole_batch=2, muon_rate=0.004, adam_rate=1e-3, hold=0.3, single_share=0.0),
}


def channel_weights(vae: TinyVAE) -> Tensor:
    """How far each latent channel moves pixels, mean 1, [C, 1, 1]: from the length of its decoder column.

    The power 1.4 lies between squared pixels (2), where the mean colour of a block outweighs all contours, and 1.
    """
    column = vae.unproject.weight[:, :, 0, 0] * vae.latent_std
    weight = column.square().sum(0) ** 0.7
    return (weight / weight.mean()).clamp_min(0.02).view(-1, 1, 1)


def predict(net: CausalTransformer, batch: Batch, noisy_BTCHW: Tensor, sigma_B: Tensor) -> Tensor:
    """The clean latent: the source plus the network's residual."""
    prompt = net.prompt_context(batch.text, batch.mean)
    residual = net.forward_clip(noisy_BTCHW, batch.source, 1000 * sigma_B, prompt, origin=batch.origin)
    return batch.source + residual


def latent_loss(clean_BTCHW: Tensor, target_BTCHW: Tensor, weights_C11: Tensor) -> Tensor:
    """Length of the weighted error vector of each place, averaged: L1 over places, so that contours stay sharp."""
    squared = ((clean_BTCHW - target_BTCHW).square() * weights_C11).mean(2)
    return (squared + 1e-3).sqrt().mean()


def pixel_loss(vae: TinyVAE, clean_BTCHW: Tensor, target_BTCHW: Tensor) -> Tensor:
    """Pixel, low-pass, edge and temporal L1 between what the decoder makes of both latents."""
    out = vae.decode(clean_BTCHW, VAEState())[0]
    with torch.no_grad():
        wanted = vae.decode(target_BTCHW, VAEState())[0]
    error = out - wanted
    low = functional.avg_pool2d(error.flatten(0, 1), 4)
    edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    moved = error[:, 1:] - error[:, :-1]
    return error.abs().mean() + low.abs().mean() + edges + moved.abs().mean()


class Trainer:
    """One worker's model, optimisers and data; all workers hold the same weights."""

    def __init__(self, work: Path, stage: Stage, minutes: float, seed: int) -> None:
        self.path, self.stage, self.work = work / f"transformer_{stage.number}.pt", stage, work
        state = load_checkpoint(self.path)
        self.net = CausalTransformer(LIVEBRUSH_TINY)
        if state:
            self.net.load_state_dict(state["net"])
        elif stage.number > 1:
            self.net.load_state_dict(averaged_weights(work, stage.number - 1))
        weights: dict[str, Tensor] = state["average"] if state else self.net.state_dict()
        self.average = {key: tensor.clone() for key, tensor in weights.items()}
        self.step = int(state["step"]) if state else 0
        self.samples = int(state["samples"]) if state else 0
        self.budget = Budget(minutes * 60, float(state["spent_s"]) if state else 0.0)
        hidden, others = split_parameters(self.net)
        self.muon = Muon(hidden)
        self.adam = torch.optim.AdamW(others, stage.adam_rate, betas=(0.9, 0.95), weight_decay=1e-4)
        if state:
            self.muon.buffers = state["muon"]
            self.adam.load_state_dict(state["adam"])
        self.vae = load_vae(work)
        self.weights = channel_weights(self.vae)
        self.seed = (seed, world()[0], self.step)
        self.sampler = self._sampler()
        torch.manual_seed(hash(self.seed))

    def _sampler(self) -> LatentSampler:
        paths = sorted((self.work / "latents").glob("train_*.safetensors"))
        return LatentSampler(load_latents(paths), build_text_table(self.work), self.seed)

    def loss(self, batch: Batch) -> Tensor:
        """This stage's loss on a batch with fresh noise."""
        clean = predict(self.net, batch, *noised(batch))
        loss = latent_loss(clean, batch.target, self.weights)
        if self.stage.number == 1:
            return loss
        return 0.3 * loss + pixel_loss(self.vae, clean, batch.target)

    def train_step(self, batch: Batch) -> float:
        """One step of all workers together; returns this worker's loss before it."""
        self.net.zero_grad(set_to_none=True)
        loss = self.loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        average_gradients(self.net.parameters())
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        factor = self.budget.rate(self.step, warmup_steps=40, hold=self.stage.hold)
        for group in self.adam.param_groups:
            group["lr"] = self.stage.adam_rate * factor
        self.adam.step()
        self.muon.step(self.stage.muon_rate * factor)
        self.step += 1
        decay = min(0.99, self.step / (self.step + 20))
        with torch.no_grad():
            for key, tensor in self.net.state_dict().items():
                self.average[key].lerp_(tensor, 1 - decay)
        return float(loss.detach())

    def draw(self) -> Batch:
        """A batch: mostly crops, sometimes whole pictures; in stage 1 often of one latent frame."""
        whole, single = bool(torch.rand(()) < WHOLE_SHARE), bool(torch.rand(()) < self.stage.single_share)
        count = (self.stage.whole_batch if whole else self.stage.batch) * (3 if single else 1)
        batch = self.sampler.draw(count, WHOLE if whole else SMALL, single=single)
        self.samples += len(batch.mean)
        return batch

    def save(self) -> None:
        """Write all that is needed to go on, from worker 0."""
        state: dict[str, Any] = {"net": self.net.state_dict(), "average": self.average, "muon": self.muon.buffers}
        state |= {"adam": self.adam.state_dict(), "step": self.step, "samples": self.samples}
        save_checkpoint(self.path, state | {"spent_s": self.budget.spent_s})

    def finished(self) -> bool:
        """True for all workers at once, when worker 0's budget is spent."""
        share = torch.tensor([self.budget.share])
        if world()[1] > 1:
            dist.broadcast(share, 0)
        return bool(share.item() >= 1)


def averaged_weights(work: Path, stage: int) -> dict[str, Tensor]:
    """The moving average of a stage's weights: what is shipped. Raises: FileNotFoundError before that stage began."""
    state = load_checkpoint(work / f"transformer_{stage}.pt")
    if state is None:
        raise FileNotFoundError(f"stage {stage} has not been trained in {work}: run engine.training.train_transformer")
    weights: dict[str, Tensor] = state["average"]
    return weights


def train(work: Path, stage: int, minutes: float, seed: int = 0) -> None:
    """Train one stage until its budget is spent; goes on from its checkpoint."""
    trainer = Trainer(work, STAGES[stage], minutes, seed)
    journal, mean_loss = work / f"transformer_{stage}.log", 0.0
    while not trainer.finished():
        loss = trainer.train_step(trainer.draw())
        mean_loss = loss if mean_loss == 0 else 0.97 * mean_loss + 0.03 * loss
        if world()[0] == 0 and trainer.budget.save_due():
            trainer.save()
            spent, samples = trainer.budget.spent_s, trainer.samples
            log(journal, f"step {trainer.step} spent {spent:.0f} s loss {mean_loss:.4f} worker 0 samples {samples}")
    if world()[0] == 0:
        trainer.save()
        log(journal, f"done at step {trainer.step}, loss {mean_loss:.4f}")


def _worker(rank: int, workers: int, meeting: str, work: Path, stage: int, minutes: float, seed: int) -> None:
    torch.set_num_threads(1)
    if workers > 1:
        # torch has the kernel send SIGINT when the parent dies; a shell's background jobs ignore it by default.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=workers)
    train(work, stage, minutes, seed)
    if workers > 1:
        dist.destroy_process_group()


def run_workers(work: Path, stage: int, minutes: float, workers: int, seed: int = 0) -> None:
    """Train with one process per worker and wait for them."""
    with tempfile.TemporaryDirectory() as folder:
        args = (workers, str(Path(folder) / "meeting"), work, stage, minutes, seed)
        if workers == 1:
            _worker(0, *args)
        else:
            mp.start_processes(_worker, args, nprocs=workers, start_method="spawn")  # type: ignore[attr-defined,no-untyped-call]


def main() -> None:
    """Command line of this stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(".work/tiny"))
    parser.add_argument("--stage", type=int, choices=sorted(STAGES), default=1)
    parser.add_argument("--minutes", type=float, default=50.0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    run_workers(args.work, args.stage, args.minutes, args.workers, args.seed)


if __name__ == "__main__":
    main()
