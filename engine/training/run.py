"""The embedded model from its data to its model card, in one command; each stage also runs alone.

    python -m engine.training.run --people ../shared/data --minutes 360

Data, prompt table, decoder, transformer in three stages, export, thumbnails, evaluation. Everything lies in --work and
goes on where a run was cut off: finished files and spent minutes count. The budget is wall-clock time and is
shared out as below; on a busy machine less training fits into it, and the model card tells how many steps did.
"""

from __future__ import annotations

import argparse
import multiprocessing
from dataclasses import dataclass
from pathlib import Path

import cv2
import torch

from engine.training import data, evaluate, export, latents, text_table, thumbnails, train_transformer, train_vae
from engine.training.budget import log
from engine.wan.weights import load_model

# Shares of the budget. The decoder trains beside the first part of stage 1 where there are two workers.
DATA_SHARE, DECODER_SHARE = 0.15, 0.15
STAGE_SHARES = {1: 0.4, 2: 0.2, 3: 0.1}


@dataclass(frozen=True)
class Plan:
    """What one run is asked to do."""

    people: Path
    work: Path
    out: Path
    thumbnails: Path
    minutes: float
    clips: int
    workers: int
    seed: int


def _generate(plan: Plan, worker: int, encode: bool) -> None:
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    seconds, clips = plan.minutes * 60 * DATA_SHARE, -(-plan.clips // plan.workers)
    encoder = latents.ShardEncoder(plan.work) if encode else None
    data.generate(plan.people, plan.work, split="train", worker=worker, clips=clips, seconds=seconds, encode=encoder)


def make_data(plan: Plan) -> None:
    """Some clips with their pictures, the projection from them, then all others as latents; one process per worker."""
    context = multiprocessing.get_context("spawn")
    for encode in (False, True):
        processes = [context.Process(target=_generate, args=(plan, worker, encode)) for worker in range(plan.workers)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            if process.exitcode:
                raise RuntimeError(f"generating data failed with exit code {process.exitcode}; see its output above")
        train_vae.solve(plan.work, plan.seed)
        latents.encode_shards(plan.work)
    data.generate(plan.people, plan.work, split="validation", worker=0, clips=8, seconds=600.0)
    latents.encode_shards(plan.work, "validation")


def run(plan: Plan) -> None:
    """All stages in order."""
    journal = plan.work / "run.log"
    log(journal, f"budget {plan.minutes:g} min, {plan.workers} workers, seed {plan.seed}")
    make_data(plan)
    text_table.build(plan.work)
    log(journal, "data and prompt table ready")
    train_vae.train(plan.work, plan.minutes * DECODER_SHARE, plan.seed)
    for stage, share in STAGE_SHARES.items():
        log(journal, f"transformer, stage {stage}")
        train_transformer.run_workers(plan.work, stage, plan.minutes * share, plan.workers, plan.seed)
    config = export.export(plan.work, plan.out)
    log(journal, f"exported to {plan.out.name}, SHA-256 {config.sha256}")
    model = load_model(plan.out, "cpu")
    portrait = data.held_out_portraits(plan.people)[thumbnails.PORTRAIT]
    thumbnails.write_thumbnails(model, portrait, plan.thumbnails)
    evaluate.evaluate(plan.work, plan.out, people=plan.people)


def main() -> None:
    """Command line of the whole training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", type=Path, default=Path("../shared/data"), help="portraits/ and webcam/")
    parser.add_argument("--work", type=Path, default=Path(".work/tiny"), help="everything in progress")
    parser.add_argument("--out", type=Path, default=export.MODEL_FOLDER)
    parser.add_argument("--thumbnails", type=Path, default=thumbnails.FOLDER)
    parser.add_argument("--minutes", type=float, default=360.0, help="wall-clock budget of the whole run")
    parser.add_argument("--clips", type=int, default=2048, help="training clips to make")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--seed", type=int, default=0)
    torch.set_num_threads(1)
    run(Plan(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
