"""Prompts to states: the tokenizer, the spellings, the table and the nearest style."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.wan.text_encoder import StaticTextEncoder, Style, StyleIndex, WordPiece, normalise

VOCABULARY = ("[UNK]", "water", "##color", "color", "gray", "pen", "##cil", "##c", "a", ",", "neon", "cafe", "center")


def encoder(text_len: int = 4) -> StaticTextEncoder:
    table = torch.arange(len(VOCABULARY) * 3).view(-1, 3).to(torch.int8)
    scale = torch.full((len(VOCABULARY), 1), 0.5, dtype=torch.float16)
    return StaticTextEncoder(table, scale, VOCABULARY, text_len)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("Watercolor", ["water", "##color"]),
        ("WATERCOLOUR, grey", ["water", "##color", ",", "gray"]),
        ("a pencil", ["a", "pen", "##cil"]),
        ("Café", ["cafe"]),
        ("xyz neon", ["neon"]),
        ("a" * 101, []),
        ("", []),
    ],
)
def test_words_are_cut_into_the_longest_known_pieces(text: str, pieces: list[str]) -> None:
    assert [VOCABULARY[i] for i in WordPiece(VOCABULARY)(text)] == pieces


@pytest.mark.parametrize(
    ("british", "american"),
    [
        ("watercolour", "watercolor"),
        ("multicoloured", "multicolored"),
        ("grey greyscale", "gray grayscale"),
        ("centre theatres sombre", "center theaters somber"),
        ("stylised, pixelising, solarised", "stylized, pixelizing, solarized"),
        ("vapourwave glamour", "vaporwave glamor"),
        ("moulded jewellery", "molded jewelry"),
    ],
)
def test_spellings_meet(british: str, american: str) -> None:
    assert normalise(british) == normalise(american) == american


@pytest.mark.parametrize("word", ["glamourous", "advertise", "four", "hour", "greyhound dog"])
def test_normalising_twice_changes_nothing_more(word: str) -> None:
    assert normalise(normalise(word)) == normalise(word)


@given(st.text(max_size=300))
def test_any_text_can_be_encoded(text: str) -> None:
    encoded = encoder().encode(text)
    assert encoded.states.shape == (4, 3)
    assert torch.isfinite(encoded.mean).all()


def test_states_are_rows_times_scale_and_zero_beyond_the_last_piece() -> None:
    encoded = encoder().encode("a neon")
    rows = torch.tensor([[24.0, 25, 26], [30, 31, 32]]) / 2
    assert torch.equal(encoded.states, torch.cat((rows, torch.zeros(2, 3))))
    assert torch.equal(encoded.mean, rows.mean(0))
    assert encoded.pieces == 2


def test_a_long_prompt_fills_the_states_and_counts_whole_in_the_mean() -> None:
    encoded = encoder(text_len=2).encode("a a a neon")
    assert torch.equal(encoded.states[0], encoded.states[1])
    assert torch.equal(encoded.mean, (3 * encoder().encode("a").mean + encoder().encode("neon").mean) / 4)


def test_an_unknown_prompt_is_zero() -> None:
    encoded = encoder().encode("xyz")
    assert not encoded.states.any()
    assert not encoded.mean.any()


def test_tables_survive_being_stored() -> None:
    first = encoder()
    second = StaticTextEncoder.from_tensors(first.to_tensors(), text_len=4)
    assert second.vocabulary == VOCABULARY
    assert torch.equal(second.encode("watercolour").states, first.encode("watercolour").states)


def test_tables_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="12 rows, 13 scales and 13 pieces"):
        StaticTextEncoder(torch.zeros(12, 3, dtype=torch.int8), torch.ones(13, 1), VOCABULARY, 4)


def test_without_a_reader_only_a_styles_own_phrases_are_known() -> None:
    styles = [Style(id="n", name="Neon", prompt="neon"), Style(id="p", name="Pencil", prompt="pen", phrases=("gray",))]
    index = StyleIndex(encoder(), styles)
    assert index.nearest("Grey") == ("p", 1.0)
    assert index.nearest("gray neon") is None
    assert StyleIndex(encoder(), []).nearest("neon") is None


def test_without_a_reader_no_style_has_a_prompt() -> None:
    with pytest.raises(KeyError, match="no reader"):
        encoder().canonical("neon")
