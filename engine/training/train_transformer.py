"""The transformer: from noise, the source latent and a prompt to the styled latent, in one step.

The network returns the residual on the source (clean - source), so at its start it is the identity and spends no
width on copying noise. Both stages compare pictures: pixel, low-pass, edge and temporal differences. Stage 1 takes the
latent's linear picture, which costs next to nothing, and mostly single latent frames; stage 2 goes on with whole clips,
in chunks of one and two latent frames, through the decoder, which learns along to make the best of what it is given;
it is held against the teachers' own frames, for a decoded target jumps a little from chunk to chunk. Stage 3 trains the
head, refiner and decoder alone, against the steps that tokens leave at their borders in flat places. Teachers are
deterministic, so regression at full noise is the one-step model: no distillation follows. One process per core; they
average their gradients.

    python -m engine.training.train_transformer --work .work/tiny --stage 1 --minutes 50 --workers 2
"""

from __future__ import annotations

import argparse
import signal
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional

from engine.config import multiplies_bfloat16
from engine.training.budget import Budget, load_checkpoint, log, save_checkpoint
from engine.training.data import STYLES, shard_paths
from engine.training.latents import latent_paths, load_latents, load_vae
from engine.training.optimisers import Muon, average_gradients, split_parameters, world
from engine.training.sampling import Batch, LatentSampler, PictureSampler, noised
from engine.training.text_table import build as build_text_table
from engine.training.train_vae import decode_clip
from engine.wan.presets import LIVEBRUSH_TINY
from engine.wan.transformer import CausalTransformer
from engine.wan.vae import TinyVAE

TOKEN_PX = 16
SMALL = 16  # latents per side of a crop: 128 px
WHOLE_SHARE = 0.1
PAIR_SHARE = 0.25  # of clips in chunks of two latent frames, where the stage takes clips
DECODER_RATE = 2e-4


@dataclass(frozen=True)
class Stage:
    """What differs between the stages.

    Frames of a clip are alike: batches of single frames show three times as many pictures at the same cost, and
    whole clips teach what time adds. blocks: whether those of the transformer learn, and what is before them. borders:
    weight of `border_loss`.
    """

    number: int
    batch: int
    whole_batch: int
    muon_rate: float
    adam_rate: float
    hold: float
    single_share: float
    blocks: bool = True
    borders: float = 0.0


STAGES = {
    1: Stage(1, batch=4, whole_batch=1, muon_rate=0.012, adam_rate=2e-3, hold=0.6, single_share=0.75),
    2: Stage(2, batch=4, whole_batch=1, muon_rate=0.004, adam_rate=7e-4, hold=0.3, single_share=0.0),
    3: Stage(
        3,
        batch=4,
        whole_batch=1,
        muon_rate=0.008,
        adam_rate=1e-3,
        hold=0.4,
        single_share=0.0,
        blocks=False,
        borders=3.0,
    ),
}


def predict(
    net: CausalTransformer, batch: Batch, noisy_BTCHW: Tensor, sigma_B: Tensor, chunks: Sequence[int] | None = None
) -> Tensor:
    """The clean latent: the source plus the network's residual."""
    prompt = net.prompt_context(batch.text, batch.mean)
    residual = net.forward_clip(noisy_BTCHW, batch.source, 1000 * sigma_B, prompt, chunks=chunks, origin=batch.origin)
    return batch.source + residual


def picture_loss(out_BTCHW: Tensor, target_BTCHW: Tensor) -> Tensor:
    """Pixel, low-pass, edge and temporal L1 between two clips of frames."""
    error = out_BTCHW - target_BTCHW
    low = functional.avg_pool2d(error.flatten(0, 1), 4)
    edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    moved = error[:, 1:] - error[:, :-1]
    return error.abs().mean() + low.abs().mean() + edges + 2 * moved.abs().mean()


def seam_loss(out_BTCHW: Tensor, target_BTCHW: Tensor) -> Tensor:
    """Temporal L1 between two clips of 1 + 4k frames where one chunk ends and the next begins."""
    out, target = (frames[:, 1::4] - frames[:, :-1:4] for frames in (out_BTCHW, target_BTCHW))
    return (out - target).abs().mean()


def border_loss(out_BTCHW: Tensor, target_BTCHW: Tensor) -> Tensor:
    """L1 of what two clips of frames differ by from one side of a token's border to the other.

    Their edges all count alike in `picture_loss`, and a border is one in 16 of them.
    """
    error = out_BTCHW - target_BTCHW
    across = error[..., TOKEN_PX::TOKEN_PX] - error[..., TOKEN_PX - 1 : -1 : TOKEN_PX]
    down = error[..., TOKEN_PX::TOKEN_PX, :] - error[..., TOKEN_PX - 1 : -1 : TOKEN_PX, :]
    return across.abs().mean() + down.abs().mean()


class Trainer:
    """One worker's model, optimisers and data; all workers hold the same weights."""

    def __init__(self, work: Path, stage: Stage, minutes: float, seed: int) -> None:
        self.path, self.stage, self.work = work / f"transformer_{stage.number}.pt", stage, work
        state = load_checkpoint(self.path)
        self.net = CausalTransformer(LIVEBRUSH_TINY)
        self.vae = load_vae(work)
        self.trained = nn.ModuleDict({"transformer": self.net})
        if stage.number > 1:
            before, vae = trained_parts(work, stage.number - 1)
            self.net.load_state_dict(before.state_dict())
            self.vae.load_state_dict(vae.state_dict())
            self.trained["vae"] = self.vae.requires_grad_(True)
            for layer in (self.vae.project, self.vae.unproject):
                layer.requires_grad_(False)
        if not stage.blocks:
            assert self.net.refine is not None
            self.net.requires_grad_(False)
            for part in (self.net.head, self.net.refine):
                part.requires_grad_(True)
        if state:
            self.trained.load_state_dict(state["weights"])
        weights: dict[str, Tensor] = state["average"] if state else self.trained.state_dict()
        self.average = {key: tensor.clone() for key, tensor in weights.items()}
        self.step = int(state["step"]) if state else 0
        self.samples = int(state["samples"]) if state else 0
        self.budget = Budget(minutes * 60, float(state["spent_s"]) if state else 0.0)
        hidden, others = (
            [parameter for parameter in group if parameter.requires_grad] for group in split_parameters(self.net)
        )
        self.muon = Muon(hidden)
        decoder = [parameter for parameter in self.vae.parameters() if parameter.requires_grad]
        groups = [{"params": others, "rate": stage.adam_rate}, {"params": decoder, "rate": DECODER_RATE}]
        self.adam = torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.95))
        if state and state["adam"]:
            self.muon.buffers = state["muon"]
            self.adam.load_state_dict(state["adam"])
        self.seed = (seed, world()[0], self.step)
        text = build_text_table(work)
        self.prompts = [text.canonical(style) for style in STYLES]
        self.sampler: LatentSampler | PictureSampler
        if stage.number == 1:
            self.sampler = LatentSampler(load_latents(latent_paths(work, "train")), self.prompts, self.seed)
        else:
            self.sampler = PictureSampler(shard_paths(work, "train"), self.prompts, self.vae, self.seed)
        torch.manual_seed(hash(self.seed))

    def loss(self, batch: Batch) -> Tensor:
        """This stage's loss on a batch with fresh noise."""
        latents = batch.source.shape[1]
        paired = batch.frames is not None and bool(torch.rand(()) < PAIR_SHARE)
        clean = predict(self.net, batch, *noised(batch), (1,) + (2,) * (latents // 2) if paired else None)
        # A clip's first latent stands for one frame, the last of its four; a single one may be from anywhere.
        first = 3 if latents > 1 else 0
        drawn, wanted = (self.vae.linear_picture(latent)[:, first:] for latent in (clean, batch.target))
        linear = picture_loss(drawn, wanted)
        if latents > 1:
            linear = linear + seam_loss(drawn, wanted)
        if batch.frames is None:
            return linear
        out = decode_clip(self.vae, clean)
        borders = self.stage.borders * border_loss(out, batch.frames) if self.stage.borders else 0.0
        return 0.3 * linear + picture_loss(out, batch.frames) + seam_loss(out, batch.frames) + borders

    def train_step(self, batch: Batch) -> float:
        """One step of all workers together; returns this worker's loss before it."""
        self.trained.zero_grad(set_to_none=True)
        # A CPU that can serves the model in bfloat16; with AMX it makes a step here take two thirds of the time.
        with torch.autocast("cpu", torch.bfloat16, enabled=multiplies_bfloat16()), warnings.catch_warnings():
            # Of the norms, which take float32 weights to inputs in bfloat16 here.
            warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
            loss = self.loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        average_gradients(self.trained.parameters())
        torch.nn.utils.clip_grad_norm_(self.trained.parameters(), 1.0)
        factor = self.budget.rate(self.step, warmup_steps=40, hold=self.stage.hold)
        for group in self.adam.param_groups:
            group["lr"] = group["rate"] * factor
        self.adam.step()
        self.muon.step(self.stage.muon_rate * factor)
        self.step += 1
        decay = min(0.998, self.step / (self.step + 20))
        with torch.no_grad():
            for key, tensor in self.trained.state_dict().items():
                self.average[key].lerp_(tensor, 1 - decay)
        return float(loss.detach())

    def draw(self) -> Batch:
        """A batch: mostly crops, sometimes whole pictures; in stage 1 often of one latent frame."""
        whole, single = bool(torch.rand(()) < WHOLE_SHARE), bool(torch.rand(()) < self.stage.single_share)
        count = (self.stage.whole_batch if whole else self.stage.batch) * (3 if single else 1)
        batch = self.sampler.draw(count, None if whole else SMALL, single=single)
        self.samples += len(batch.mean)
        return batch

    def save(self) -> None:
        """Write all that is needed to go on, from worker 0."""
        state: dict[str, Any] = {"weights": self.trained.state_dict(), "average": self.average}
        state |= {"muon": self.muon.buffers, "adam": self.adam.state_dict(), "step": self.step}
        save_checkpoint(self.path, state | {"samples": self.samples, "spent_s": self.budget.spent_s})

    def finished(self) -> bool:
        """True for all workers at once, when worker 0's budget is spent."""
        share = torch.tensor([self.budget.share])
        if world()[1] > 1:
            dist.broadcast(share, 0)
        return bool(share.item() >= 1)


def averaged_weights(work: Path, stage: int) -> dict[str, Tensor]:
    """The moving average of a stage's weights, by part: what is shipped.

    Raises: FileNotFoundError before that stage began.
    """
    state = load_checkpoint(work / f"transformer_{stage}.pt")
    if state is None:
        raise FileNotFoundError(f"stage {stage} has not been trained in {work}: run engine.training.train_transformer")
    weights: dict[str, Tensor] = state["average"]
    return weights


def trained_parts(work: Path, stage: int) -> tuple[CausalTransformer, TinyVAE]:
    """Transformer and autoencoder as a stage left them; the first stage leaves the autoencoder alone."""
    weights = averaged_weights(work, stage)
    transformer, vae = CausalTransformer(LIVEBRUSH_TINY), load_vae(work)
    transformer.load_state_dict(_part(weights, "transformer"))
    if decoder := _part(weights, "vae"):
        vae.load_state_dict(decoder)
    return transformer.eval(), vae


def _part(weights: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): tensor for key, tensor in weights.items() if key.startswith(f"{name}.")}


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
