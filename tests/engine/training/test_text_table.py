"""The reader's way into a model that is there, and when it must be fitted anew."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.training.phrases import BY_ID
from engine.training.prompt_classifier import Classifier, is_current, unfitted
from engine.training.text_table import write_into
from engine.wan.save import save_model
from engine.wan.text_encoder import StaticTextEncoder, Style
from engine.wan.untrained import VOCABULARY, untrained_model
from engine.wan.weights import load_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = untrained_model()
    styles = [Style(id=id_, name=BY_ID[id_].name, prompt=BY_ID[id_].prompt) for id_ in ("photo", "neon", "ink")]
    save_model(
        tmp_path, name="small", transformer=model.transformer, vae=model.vae, text=model.text, styles=styles, card="#"
    )
    return tmp_path


def test_a_reader_is_written_into_a_model_and_means_the_styles_it_lists(folder: Path) -> None:
    before = load_model(folder, "cpu")
    assert isinstance(before.text, StaticTextEncoder)
    table = (before.text.table_VK, before.text.scale_V1, before.text.vocabulary, before.text.text_len)
    write_into(StaticTextEncoder(*table, reader=unfitted(VOCABULARY)), folder)
    after = load_model(folder, "cpu")
    assert after.text.encode("neon sign").styles == (("neon", 1.0),)
    assert {after.text.encode(word).styles[0][0] for word in ("mosaic", "gray", "a")} <= {"photo", "neon", "ink"}
    assert after.styles.styles[1].phrases == BY_ID["neon"].phrases[1:]
    for key, tensor in before.transformer.state_dict().items():
        assert torch.equal(after.transformer.state_dict()[key], tensor)


def test_a_model_of_another_table_is_left_alone(folder: Path) -> None:
    text = load_model(folder, "cpu").text
    assert isinstance(text, StaticTextEncoder)
    other = StaticTextEncoder(
        text.table_VK + 1, text.scale_V1, text.vocabulary, text.text_len, reader=unfitted(VOCABULARY)
    )
    kept = (folder / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="another text table"):
        write_into(other, folder)
    assert (folder / "model.safetensors").read_bytes() == kept


def test_other_phrases_ask_for_another_fit() -> None:
    assert is_current(unfitted(VOCABULARY))
    assert not is_current(replace(unfitted(VOCABULARY), phrases={"neon": 5}))


def test_evidence_is_the_sum_of_pieces_and_sequences() -> None:
    classifier = Classifier(VOCABULARY, ["neon ink"], torch.zeros(len(VOCABULARY), 2))
    assert classifier.sequences == ["neon", "ink", "neon ink"]
    with torch.no_grad():
        classifier.table[VOCABULARY.index("ink")] += torch.tensor([1.0, 0.0])
        classifier.table[len(VOCABULARY) + 2] += torch.tensor([0.0, 4.0])
    logits = classifier.logits([classifier.features(text) for text in ("Ink!", "neon, ink", "")])
    assert logits.tolist() == [[1, 0], [1, 4], [0, 0]]
