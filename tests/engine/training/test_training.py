"""The stages of training on a handful of made-up clips: every file they hand on, at its smallest."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.training import export as exporting
from engine.training import latents, sampling, train_vae
from engine.training.budget import Budget, load_checkpoint
from engine.training.data import STYLES, Shard, shard_paths
from engine.training.optimisers import Muon, orthogonalise, split_parameters
from engine.training.phrases import BY_ID
from engine.training.playback import restyle_clip
from engine.training.teachers import Picture, stylise_clip
from engine.training.thumbnails import write_thumbnails
from engine.training.train_transformer import STAGES, Trainer, border_loss, picture_loss, trained_parts
from engine.wan.presets import LIVEBRUSH_TINY
from engine.wan.transformer import CausalTransformer
from engine.wan.vae import TinyVAE, TinyVAEConfig
from engine.wan.weights import WEIGHTS_FILE, load_model


def moving_clip(seed: int, frames: int = 9) -> Picture:
    """A bright disc moving over soft noise, 256x256."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:256, 0:256].astype(np.float32)
    wall = 120 + 60 * np.sin(x / 40 + seed)[..., None] * rng.random(3)
    discs = [((x - 80 - 6 * i) ** 2 + (y - 128) ** 2 < 60**2)[..., None] for i in range(frames)]
    return np.stack([np.where(disc, (230, 190, 60), wall) for disc in discs]).astype(np.uint8)


def save_shard(work: Path, split: str, seed: int, styles: tuple[int, ...]) -> None:
    clean = np.stack([moving_clip(seed), moving_clip(seed + 1)])
    styled = np.stack([stylise_clip([STYLES[i] for i in styles], clip) for clip in clean])
    (work / "shards").mkdir(parents=True, exist_ok=True)
    Shard(clean, clean, styled, np.array([styles] * 2)).save(work / "shards" / f"{split}_0_{seed:04d}.npz")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with data, prompt table, a barely trained decoder and latents."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("tiny")
    save_shard(folder, "train", 0, (1, 9))
    save_shard(folder, "validation", 7, (1, 9))
    shipped = load_file(exporting.MODEL_FOLDER / WEIGHTS_FILE)
    text = {key.removeprefix("text."): tensor for key, tensor in shipped.items() if key.startswith("text.")}
    save_file(text, folder / "text.safetensors")
    train_vae.solve(folder, crops=8)
    train_vae.train(folder, minutes=0.02)
    latents.encode_shards(folder)
    return folder


def test_shards_come_back_as_written_and_unfinished_ones_are_not_listed(work: Path) -> None:
    (path,) = shard_paths(work, "train")
    (work / "shards" / "train_0_0001.part.npz").write_bytes(b"cut off")
    assert shard_paths(work, "train") == [path]
    shard = Shard.load(path)
    assert shard.styled.shape == (2, 2, 9, 256, 256, 3)
    assert np.array_equal(shard.clean[0], moving_clip(0))


def test_a_decoder_step_lowers_the_loss_and_leaves_the_projection_alone(work: Path) -> None:
    torch.manual_seed(0)
    shard = Shard.load(shard_paths(work, "train")[0])
    plain, clips = (train_vae.to_tensor(clip)[..., 64:160, 64:160] for clip in (shard.clean, shard.styled[0]))
    vae = TinyVAE(TinyVAEConfig())
    vae.fit_pca(plain)
    vae.project.requires_grad_(False)
    vae.unproject.requires_grad_(False)
    before = vae.project.weight.clone()
    optimiser = torch.optim.AdamW([p for p in vae.parameters() if p.requires_grad], 1e-3)
    losses = [train_vae.training_step(vae, clips, optimiser) for _ in range(12)]
    assert losses[-1] < losses[0]
    assert torch.equal(vae.project.weight, before)


def test_decoder_training_goes_on_where_it_stopped(work: Path) -> None:
    first = load_checkpoint(work / "vae.pt")
    assert first is not None
    train_vae.train(work, minutes=first["spent_s"] / 60 + 0.01)
    second = load_checkpoint(work / "vae.pt")
    assert second is not None
    assert second["step"] > first["step"]
    assert second["spent_s"] > first["spent_s"]
    assert torch.equal(second["vae"]["project.weight"], first["vae"]["project.weight"])


def trained(work: Path, stage: int, steps: int) -> tuple[Trainer, float, float]:
    """A trainer after some steps on one fixed batch, with its loss before and after."""
    trainer = Trainer(work, STAGES[stage], minutes=1e6, seed=0)
    batch = trainer.sampler.draw(2, 16)

    def loss() -> float:
        torch.manual_seed(1)
        with torch.no_grad():
            return float(trainer.loss(batch))

    before = loss()
    for _ in range(steps):
        trainer.train_step(batch)
    return trainer, before, loss()


def test_both_stages_lower_their_loss_on_a_fixed_batch_and_can_be_resumed(work: Path) -> None:
    trainer, before, after = trained(work, 1, steps=25)
    assert after < 0.97 * before
    trainer.save()
    again = Trainer(work, STAGES[1], minutes=1e6, seed=0)
    assert again.step == trainer.step == 25
    assert all(torch.equal(a, b) for a, b in zip(again.muon.buffers, trainer.muon.buffers, strict=True))
    refined, before, after = trained(work, 2, steps=8)
    assert after < before
    refined.save()


def test_an_untrained_network_predicts_the_source(work: Path) -> None:
    trainer = Trainer(work, STAGES[1], minutes=1.0, seed=0)
    trainer.net = CausalTransformer(LIVEBRUSH_TINY)
    batch = trainer.sampler.draw(2, 16, single=True)
    source, target = (trainer.vae.linear_picture(latent) for latent in (batch.source, batch.target))
    assert float(trainer.loss(batch).detach()) == pytest.approx(float(picture_loss(source, target)), rel=1e-5)
    assert batch.source.shape == (2, 1, LIVEBRUSH_TINY.latent_channels, 16, 16)


def test_the_second_stage_trains_the_decoder_with_the_transformer_and_hands_both_on(work: Path) -> None:
    trained(work, 1, steps=1)[0].save()
    refined, _, _ = trained(work, 2, steps=3)
    refined.save()
    transformer, vae = trained_parts(work, 2)
    before = load_checkpoint(work / "vae.pt")
    assert before is not None
    assert torch.equal(vae.unproject.weight, before["vae"]["unproject.weight"])
    assert not torch.equal(vae.decode_out.weight, before["vae"]["decode_out.weight"])
    torch.testing.assert_close(transformer.head.weight, refined.average["transformer.head.weight"])


def test_the_third_stage_trains_head_refiner_and_decoder_alone(work: Path) -> None:
    trained(work, 1, steps=1)[0].save()
    trained(work, 2, steps=1)[0].save()
    before, _ = trained_parts(work, 2)
    polished, first, last = trained(work, 3, steps=8)
    assert last < first
    polished.save()
    after, vae = trained_parts(work, 3)
    changed = {
        name.split(".")[0]
        for (name, old), new in zip(before.state_dict().items(), after.state_dict().values(), strict=True)
        if not torch.equal(old, new)
    }
    assert changed == {"head", "refine"}
    assert not torch.equal(vae.decode_out.weight, trained_parts(work, 2)[1].decode_out.weight)


def test_the_border_loss_sees_steps_at_the_borders_of_tokens_alone() -> None:
    target = torch.zeros(1, 2, 3, 48, 48)
    step = target.clone()
    step[..., 16:32, :] = 0.5
    assert float(border_loss(step, target)) == pytest.approx(0.5)
    assert float(border_loss(step.roll(4, dims=-2), target)) == 0
    assert float(border_loss(step, step)) == 0


def test_a_blend_is_a_mix_of_two_styles_in_picture_and_prompt(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "PHOTO_SHARE", 0.0)
    monkeypatch.setattr(sampling, "BLEND_SHARE", 1.0)
    trainer = Trainer(work, STAGES[1], minutes=1.0, seed=0)
    batch = trainer.sampler.draw(1, 16)
    (shard,) = latents.load_latents(latents.latent_paths(work, "train"))
    a, b = (trainer.prompts[int(number)].mean for number in shard.styles[0])
    share = torch.linalg.lstsq((b - a)[:, None], (batch.mean[0] - a)[:, None]).solution
    assert 0.1 < float(share) < 0.9
    torch.testing.assert_close(batch.mean[0], torch.lerp(a, b, float(share)))


def test_export_loads_as_the_engine_loads_it_and_restyles(work: Path, tmp_path: Path) -> None:
    trained(work, 1, steps=1)[0].save()
    for stage in (2, 3):
        (work / f"transformer_{stage}.pt").unlink(missing_ok=True)
    exporting.export(work, tmp_path / "model")
    model = load_model(tmp_path / "model", "cpu")
    for key, tensor in trained_parts(work, 1)[0].state_dict().items():
        torch.testing.assert_close(model.transformer.state_dict()[key], tensor, atol=2e-3, rtol=2e-3)
    listed = list(BY_ID)
    assert [style.id for style in model.styles.styles] == listed
    assert [style.thumbnail for style in model.styles.styles] == [f"/styles/{style}.jpg" for style in listed]
    clip = moving_clip(3)
    out = restyle_clip(model, clip, "watercolor painting")
    assert out.shape == clip.shape
    assert np.array_equal(out, restyle_clip(model, clip, "watercolor painting"))


def test_thumbnails_are_written_for_every_style(work: Path, tmp_path: Path) -> None:
    import cv2

    trained(work, 1, steps=1)[0].save()
    exporting.export(work, tmp_path / "model")
    cv2.imwrite(str(tmp_path / "face.png"), moving_clip(0)[0])
    paths = write_thumbnails(load_model(tmp_path / "model", "cpu"), tmp_path / "face.png", tmp_path / "styles")
    assert {path.stem for path in paths} == set(BY_ID)
    pictures = [cv2.imread(str(path)) for path in paths]
    assert all(picture is not None and picture.shape == (256, 256, 3) for picture in pictures)


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((24, 64), (64, 24)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert values.min() > 0.5
        assert values.max() < 1.4


def test_muon_takes_the_hidden_matrices_and_convolutions_and_only_those() -> None:
    hidden, others = split_parameters(CausalTransformer(LIVEBRUSH_TINY))
    refining = LIVEBRUSH_TINY.refine_blocks + LIVEBRUSH_TINY.refine_coarse_blocks
    assert len(hidden) == 7 * LIVEBRUSH_TINY.layers + 2 * refining
    assert {parameter.ndim for parameter in Muon(hidden).parameters} == {2, 4}
    assert not {id(p) for p in hidden} & {id(p) for p in others}


def test_a_budget_warms_up_holds_and_decays() -> None:
    assert Budget(1e9).rate(0, warmup_steps=10, hold=0.5) == pytest.approx(0.1)
    assert Budget(1e9).rate(100, warmup_steps=10, hold=0.5) == 1.0
    assert Budget(1e9, spent_s=0.75e9).rate(100, warmup_steps=10, hold=0.5) == pytest.approx(0.5)
    assert Budget(1e9, spent_s=2e9).rate(100, warmup_steps=10, hold=0.5) == pytest.approx(0.02)
