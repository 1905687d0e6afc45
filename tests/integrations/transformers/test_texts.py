"""Texts: what is drawn for calibration, and perplexity against its definition."""

import math

import pytest
import torch
from transformers import AutoTokenizer

from kernelgraft_transformers.checkpoint import load_model
from kernelgraft_transformers.texts import Calibration, encode, perplexity, read_text


def test_samples_are_windows_of_the_text_drawn_with_the_seed():
    tokens = torch.arange(1000)
    batches = Calibration(samples=20, length=16, seed=3).draw(tokens, "text")
    assert [tuple(batch.shape) for batch in batches] == [(1, 16)] * 20
    assert all(torch.equal(batch[0], torch.arange(16) + batch[0, 0]) for batch in batches)
    assert len({int(batch[0, 0]) for batch in batches}) > 15

    again = Calibration(20, 16, 3).draw(tokens, "text")
    other = Calibration(20, 16, 4).draw(tokens, "text")
    assert all(map(torch.equal, batches, again))
    assert not all(map(torch.equal, batches, other))


def test_the_first_and_the_last_window_can_be_drawn():
    starts = {int(batch[0, 0]) for batch in Calibration(200, 8).draw(torch.arange(11), "text")}
    assert starts == {0, 1, 2, 3}
    assert torch.equal(Calibration(1, 8).draw(torch.arange(8), "text")[0][0], torch.arange(8))


def test_a_text_that_is_too_short_is_refused_by_name():
    with pytest.raises(ValueError, match=r"notes\.txt has 7 tokens; one calibration sample is 8 tokens long"):
        Calibration(1, 8).draw(torch.arange(7), "notes.txt")


@pytest.mark.parametrize(("samples", "length"), [(0, 16), (-1, 16), (4, 1), (4, 0)])
def test_numbers_that_draw_nothing_are_refused(samples, length):
    with pytest.raises(ValueError, match=f"calibration wants {samples} samples of {length} tokens"):
        Calibration(samples, length).draw(torch.arange(100), "text")


def test_files_are_read_as_utf8(tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes("naïve café".encode())
    assert read_text(file) == "naïve café"
    for content, message in ((b"", "is empty"), (b" \n\t ", "is empty"), (b"\xff\xfe", "is not UTF-8 text")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"text\.txt {message}"):
            read_text(file)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt"):
        read_text(tmp_path / "nowhere.txt")


def test_a_text_becomes_one_stream_of_tokens(float_llama, words):
    tokens = encode(AutoTokenizer.from_pretrained(float_llama), words)
    assert (tokens.dtype, tuple(tokens.shape)) == (torch.int64, (2000,))
    assert tokens[0] == 3 + int(words.split()[0][1:])


@pytest.fixture(scope="module")
def model(float_llama):
    return load_model(str(float_llama), torch.float32)


def by_definition(model, tokens, window, count):
    """exp of the mean negative log-likelihood of every token but the first of each window, one token at a time."""
    total, predicted = 0.0, 0
    with torch.no_grad():
        for start in range(0, count * window, window):
            ids = tokens[start : start + window]
            probabilities = model(input_ids=ids.unsqueeze(0)).logits[0].double().softmax(-1)
            for position in range(1, window):
                total -= math.log(float(probabilities[position - 1, ids[position]]))
                predicted += 1
    return math.exp(total / predicted)


@pytest.mark.parametrize(("windows", "count"), [(None, 4), (2, 2), (9, 4)])
def test_perplexity_is_that_of_its_definition(model, windows, count):
    tokens, seen = torch.randint(3, 99, (70,)), []
    found = perplexity(model, tokens, window=16, windows=windows, on_window=lambda *args: seen.append(args))
    assert found == pytest.approx(by_definition(model, tokens, 16, count), rel=1e-5)
    assert [(done, of) for done, of, _ in seen] == [(done, count) for done in range(1, count + 1)]
    assert seen[-1][2] == found


def test_a_text_shorter_than_a_window_is_refused(model):
    with pytest.raises(ValueError, match="the text has 15 tokens; perplexity needs one window of 16"):
        perplexity(model, torch.arange(15), window=16)


@pytest.mark.parametrize(
    "options", [{"window": 1}, {"window": 0}, {"window": 8, "windows": 0}, {"windows": -1}], ids=str
)
def test_numbers_that_measure_nothing_are_refused(model, options):
    with pytest.raises(ValueError, match="at least 1 and 2 are needed"):
        perplexity(model, torch.arange(90), **options)
