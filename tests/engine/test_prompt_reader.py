"""What free prompts mean, by the classifier that ships; all of its styles, whether or not the weights know them yet."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from engine.config import EngineSettings
from engine.training.phrases import BY_ID, LEXICON, NAMES, STYLES
from engine.training.prompt_classifier import clean
from engine.wan.grade import BY_ID as MODIFIERS
from engine.wan.grade import identity
from engine.wan.prompt_reader import ReaderWeights
from engine.wan.text_encoder import EncodedPrompt, StaticTextEncoder
from engine.wan.weights import load_model

MODEL_DIR = EngineSettings().model_dir
UNSEEN = Path(__file__).parent / "unseen_phrases.txt"
UNSEEN_2 = Path(__file__).parent / "unseen_phrases_2.txt"
TEXT_LEN = 16


def tensors() -> dict[str, torch.Tensor]:
    found = load_file(MODEL_DIR / "model.safetensors")
    return {key.removeprefix("text."): tensor for key, tensor in found.items() if key.startswith("text.")}


@pytest.fixture(scope="module")
def text() -> StaticTextEncoder:
    return StaticTextEncoder.from_tensors(tensors(), TEXT_LEN)


def style(encoded: EncodedPrompt) -> str:
    ((found, _),) = encoded.styles
    return found


def unseen(path: Path = UNSEEN) -> list[tuple[str, str]]:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return [(wanted.strip(), phrase.strip()) for wanted, phrase in (line.split("|") for line in lines)]


# --- styles


def test_at_least_27_of_30_unseen_prompts_land_where_a_person_would_expect(text: StaticTextEncoder) -> None:
    phrases = unseen()
    assert len(phrases) == 30
    known = {phrase for style in STYLES for phrase in style.phrases + style.held_out}
    assert not known & {phrase for _, phrase in phrases}
    misses = [(wanted, phrase) for wanted, phrase in phrases if text.encode(phrase).styles[0][0] != wanted]
    assert len(misses) <= 3, misses


def test_prompts_of_another_hand_land_where_a_person_would_expect(text: StaticTextEncoder) -> None:
    phrases = unseen(UNSEEN_2)
    assert len(phrases) == 56
    known = {clean(phrase) for style in STYLES for phrase in (*style.phrases, *style.held_out, *LEXICON[style.id])}
    assert not known & {clean(phrase) for _, phrase in phrases}
    misses = [(wanted, phrase) for wanted, phrase in phrases if text.encode(phrase).styles[0][0] != wanted]
    assert len(misses) <= 5, misses


def test_the_lexicon_knows_every_style_and_no_phrase_twice() -> None:
    assert set(LEXICON) == {style.id for style in STYLES}
    phrases = [clean(phrase) for style in STYLES for phrase in LEXICON[style.id]]
    assert len(phrases) == len(set(phrases)) >= 100 * len(STYLES)
    assert not set(phrases) & {clean(phrase) for style in STYLES for phrase in style.held_out}


def test_phrases_held_out_of_training_are_understood(text: StaticTextEncoder) -> None:
    held_out = [(style.id, phrase) for style in STYLES for phrase in style.held_out]
    right = [text.encode(phrase).styles[0][0] == wanted for wanted, phrase in held_out]
    assert len(held_out) >= 5 * len(STYLES)
    assert sum(right) / len(right) >= 0.95


@pytest.mark.parametrize("wanted", BY_ID)
def test_a_styles_own_prompt_and_name_are_its_states_whatever_is_said_around_them(
    text: StaticTextEncoder, wanted: str
) -> None:
    own = text.canonical(wanted)
    assert own.styles == ((wanted, 1.0),)
    for name in (BY_ID[wanted].prompt, *NAMES[wanted]):
        for template in ("{}", "make me look like {}", "a man in the style of {}", "{} please", "me as a {} portrait"):
            encoded = text.encode(template.format(name))
            assert style(encoded) == wanted, template.format(name)
            assert torch.equal(encoded.states, own.states)
            assert torch.equal(encoded.mean, own.mean)
            assert encoded.grade is None


def test_the_styles_prompts_lie_apart(text: StaticTextEncoder) -> None:
    means = torch.nn.functional.normalize(torch.stack([text.canonical(wanted).mean for wanted in BY_ID]), dim=-1)
    cosines = means @ means.T - torch.eye(len(means))
    assert cosines.max() < 0.9


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("water colour", "watercolor"),
        ("watercolr painting", "watercolor"),
        ("Comik book", "comic"),
        ("pixle art", "pixel"),
        ("embroidry", "embroidery"),
        ("stained-glass", "stainedglass"),
        ("Monet's garden", "impressionist"),
        ("a mosaïc", "mosaic"),
    ],
)
def test_spellings_and_single_slips_are_forgiven(text: StaticTextEncoder, prompt: str, wanted: str) -> None:
    assert style(text.encode(prompt)) == wanted


@pytest.mark.parametrize("prompt", ["", "me", "a man waving", "warm", "make it night", "slightly blue please"])
def test_without_a_style_it_is_the_camera(text: StaticTextEncoder, prompt: str) -> None:
    encoded = text.encode(prompt)
    assert (encoded.styles, encoded.score) == ((("photo", 1.0),), 1.0)
    assert torch.equal(encoded.states, text.canonical("photo").states)


@pytest.mark.parametrize(
    "prompt", ["a castle", "quantum physics", "asdfgh qwertz", "a robot on the moon eating cheese"]
)
def test_far_from_everything_is_one_style_and_a_low_score(text: StaticTextEncoder, prompt: str) -> None:
    encoded = text.encode(prompt)
    assert torch.equal(encoded.states, text.canonical(style(encoded)).states)
    assert encoded.score < 0.5


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=200))
def test_any_text_means_something(prompt: str) -> None:
    encoded = _shipped().encode(prompt)
    assert sum(share for _, share in encoded.styles) == pytest.approx(1)
    assert 0 <= encoded.score <= 1
    assert torch.isfinite(encoded.states).all()


_SHIPPED: list[StaticTextEncoder] = []


def _shipped() -> StaticTextEncoder:
    if not _SHIPPED:
        _SHIPPED.append(StaticTextEncoder.from_tensors(tensors(), TEXT_LEN))
    return _SHIPPED[0]


# --- two styles


@pytest.mark.parametrize(
    ("prompt", "shares"),
    [
        ("a comic drawn in neon", {"comic": 0.5, "neon": 0.5}),
        ("half pencil, half watercolour", {"pencil": 0.5, "watercolor": 0.5}),
        ("an oil painting with a touch of neon", {"oil": 0.7, "neon": 0.3}),
        ("stained glass meets pixel art", {"stainedglass": 0.5, "pixel": 0.5}),
    ],
)
def test_two_styles_plainly_named_are_mixed(text: StaticTextEncoder, prompt: str, shares: dict[str, float]) -> None:
    encoded = text.encode(prompt)
    assert dict(encoded.styles) == pytest.approx(shares)
    expected = sum(share * text.canonical(own).states for own, share in shares.items())
    torch.testing.assert_close(encoded.states, expected)
    torch.testing.assert_close(encoded.mean, sum(share * text.canonical(own).mean for own, share in shares.items()))


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("ink and wash illustration", "watercolor"),
        ("chalk drawing", "chalk"),
        ("black and white manga", "ink"),
        ("impressionist painting", "impressionist"),
        ("glass mosaic", "mosaic"),
        ("pop art poster", "popart"),
    ],
)
def test_a_phrase_of_one_style_is_no_mixture(text: StaticTextEncoder, prompt: str, wanted: str) -> None:
    assert style(text.encode(prompt)) == wanted


# --- colours and moods


@pytest.mark.parametrize(
    ("prompt", "wanted", "moods"),
    [
        ("warm", "photo", ("warm",)),
        ("make it night", "photo", ("night",)),
        ("cartoon, but warmer", "comic", ("warm",)),
        ("black and white comic", "comic", ("monochrome",)),
        ("a black and white film", "vintage", ("monochrome",)),
        ("red oil painting", "oil", ("red",)),
        ("pastel water colours", "watercolor", ("pastel",)),
        ("dark, moody low poly", "lowpoly", ("dark", "moody")),
        ("winter wonderland", "photo", ("cool",)),
        ("dutch golden age painting", "oil", ()),
        ("teal and orange", "photo", ("teal", "orange")),
        ("colourful clay figure at sunset", "clay", ("vivid", "golden")),
        ("not warm watercolour", "watercolor", ()),
        ("pencil without colour", "pencil", ()),
    ],
)
def test_moods_go_with_any_style(text: StaticTextEncoder, prompt: str, wanted: str, moods: tuple[str, ...]) -> None:
    encoded = text.encode(prompt)
    assert (style(encoded), encoded.modifiers) == (wanted, moods)
    assert (encoded.grade is None) == (not moods)


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("night vision", "nightvision"),
        ("green night vision", "nightvision"),
        ("starry night", "starry"),
        ("neon lights at night", "neon"),
        ("black ink", "ink"),
        ("blue print", "blueprint"),
        ("golden mosaic", "mosaic"),
        ("film noir", "vintage"),
        ("white chalk on black", "chalk"),
    ],
)
def test_a_word_that_a_style_means_anyway_is_no_mood(text: StaticTextEncoder, prompt: str, wanted: str) -> None:
    encoded = text.encode(prompt)
    assert style(encoded) == wanted
    assert encoded.modifiers == ()


def test_the_colour_of_a_thing_is_no_mood(text: StaticTextEncoder) -> None:
    assert text.encode("a cartoon man in a red shirt").modifiers == ()


def test_intensities_scale_and_moods_compose(text: StaticTextEncoder) -> None:
    def grade(prompt: str) -> torch.Tensor:
        found = text.encode(prompt).grade
        assert found is not None
        return found

    warm = MODIFIERS["warm"].grade
    torch.testing.assert_close(grade("warm comic"), warm)
    torch.testing.assert_close(grade("a slightly warm comic"), torch.lerp(identity(), warm, 0.5))
    torch.testing.assert_close(grade("a little bit warm"), torch.lerp(identity(), warm, 0.5))
    torch.testing.assert_close(grade("very warm ink"), torch.lerp(identity(), warm, 1.5))
    torch.testing.assert_close(grade("warm and pink"), torch.cat(_composed(warm, MODIFIERS["pink"].grade), 1))


def _composed(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return second[:, :3] @ first[:, :3], (second[:, :3] @ first[:, 3] + second[:, 3])[:, None]


# --- the weights


def test_only_styles_that_the_model_lists_are_meant() -> None:
    text = StaticTextEncoder.from_tensors(tensors(), TEXT_LEN, ["photo", "pixel", "ink"])
    for prompt in ("mosaic", "watercolor", "warm", "", "a comic drawn in neon", "qwertz"):
        assert {found for found, _ in text.encode(prompt).styles} <= {"photo", "pixel", "ink"}
    assert text.encode("mosaic").score < 0.5
    assert text.encode("pixel art").score == 1.0
    with pytest.raises(ValueError, match="none of the model's styles"):
        StaticTextEncoder.from_tensors(tensors(), TEXT_LEN, ["sandstone"])


def test_the_shipped_model_means_the_styles_it_lists() -> None:
    model = load_model(MODEL_DIR, "cpu")
    listed = {style.id for style in model.styles.styles}
    assert {model.text.encode(style.phrases[0]).styles[0][0] for style in STYLES} == listed
    assert model.styles.nearest("a cartoon hero") is not None


def test_a_reader_survives_being_stored_and_refuses_parts_that_do_not_fit(text: StaticTextEncoder) -> None:
    stored = text.to_tensors()
    again = StaticTextEncoder.from_tensors(stored, TEXT_LEN)
    assert torch.equal(again.encode("a boat in neon").states, text.encode("a boat in neon").states)
    assert all(torch.equal(tensor, tensors()[key]) for key, tensor in stored.items())
    with pytest.raises(ValueError, match="do not fit"):
        ReaderWeights.from_tensors(stored | {"reader_bias": torch.zeros(3)})
    with pytest.raises(ValueError, match="damaged"):
        ReaderWeights.from_tensors(stored | {"reader_json": stored["reader_json"][:-5]})
