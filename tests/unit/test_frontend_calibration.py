"""Token windows: deterministic, disjoint, and clear errors for files that do not serve."""

import pytest
import torch

from scalebits_compiler.errors import FrontendError
from scalebits_compiler.frontend.calibration import (
    framed,
    load_tokenizer,
    read_windows,
    split_text,
)


@pytest.fixture
def tokenizer(tiny_llama):
    return load_tokenizer(tiny_llama())


@pytest.fixture
def text(tmp_path):
    """1000 bytes, so 1000 tokens of the byte-level tokenizer, all windows different."""
    file = tmp_path / "text.txt"
    file.write_text("".join(f"{i:04d}\n" for i in range(200)))
    return file


def test_windows_in_the_order_of_the_text(tokenizer, text):
    windows = read_windows(text, tokenizer, 300)
    assert windows.shape == (3, 300)
    assert windows.dtype == torch.int64
    assert tokenizer.decode(windows[0].tolist()) == text.read_text()[:300]
    assert tokenizer.decode(windows[2].tolist()) == text.read_text()[600:900]


def test_windows_are_drawn_by_the_seed_alone(tokenizer, text):
    state = torch.get_rng_state()
    first, again = (read_windows(text, tokenizer, 10, 20, seed=1) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, read_windows(text, tokenizer, 10, 20, seed=2))
    assert torch.equal(state, torch.get_rng_state())


def test_split_is_disjoint(tokenizer, text):
    calibration, acceptance, tuning = split_text(text, tokenizer, 10, 50, 30, 5, tuning_share=2)
    assert calibration.shape == (50, 10)
    assert acceptance.shape == (30, 10)
    assert tuning.shape == (20, 10)  # what the text has left
    seen = {tuple(row) for row in torch.cat((calibration, acceptance, tuning)).tolist()}
    assert len(seen) == 100


def test_long_text_is_cut_at_line_ends(tokenizer, tmp_path):
    file = tmp_path / "long.txt"
    content = "a line of text\r\n" * 9000
    file.write_bytes(content.encode())
    windows = read_windows(file, tokenizer, 1000)
    assert tokenizer.decode(windows.flatten().tolist()) == content[: windows.numel()]


@pytest.mark.parametrize(
    ("seq_len", "asked", "counts"),
    [
        (10, (None, None), (67, 33, 0)),  # 100 windows, of which a third accept
        (5, (None, None), (128, 64, 8)),
        (500, (None, None), (1, 1, 0)),
        (10, (90, None), (90, 10, 0)),
        (10, (None, 90), (10, 90, 0)),
        (10, (20, None), (20, 64, 16)),
        (10, (None, 0), (100, 0, 0)),  # acceptance from another text
        (10, (0, None), (0, 64, 0)),
    ],
)
def test_default_numbers_go_as_far_as_the_text(tokenizer, text, seq_len, asked, counts):
    parts = split_text(text, tokenizer, seq_len, *asked, seed=3, tuning_share=4)
    assert tuple(map(len, parts)) == counts
    again = split_text(text, tokenizer, seq_len, *asked, seed=3, tuning_share=4)
    assert all(map(torch.equal, parts, again))
    seen = {tuple(row) for row in torch.cat(parts).tolist()}
    assert len(seen) == sum(counts)


@pytest.mark.parametrize(
    ("seq_len", "asked", "words"),
    [
        (100, (8, 4), ("12 windows of 100", "1200")),
        (100, (10, None), ("11 windows of 100", "1100")),
        (100, (None, 10), ("11 windows of 100", "1100")),
        (501, (None, None), ("2 windows of 501", "1002")),
    ],
)
def test_too_little_text_says_how_much(tokenizer, text, seq_len, asked, words):
    with pytest.raises(FrontendError) as caught:
        split_text(text, tokenizer, seq_len, *asked)
    for part in (str(text), "1000 tokens", *words):
        assert part in str(caught.value)


def test_empty_missing_and_binary_files(tokenizer, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    with pytest.raises(FrontendError, match="has 0 tokens"):
        read_windows(empty, tokenizer, 8)
    with pytest.raises(FrontendError, match=r"no\.txt cannot be read"):
        read_windows(tmp_path / "no.txt", tokenizer, 8)
    with pytest.raises(FrontendError, match="cannot be read"):
        read_windows(tmp_path, tokenizer, 8)
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"text\xff\xfe")
    with pytest.raises(FrontendError, match="byte at 4"):
        read_windows(binary, tokenizer, 8)


@pytest.mark.parametrize(("seq_len", "count"), [(1, 3), (8, 0), (8, -1)])
def test_senseless_windows_are_refused(tokenizer, text, seq_len, count):
    with pytest.raises(FrontendError, match="at least one window"):
        read_windows(text, tokenizer, seq_len, count)


def test_missing_and_broken_tokenizer(tmp_path):
    with pytest.raises(FrontendError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(FrontendError, match="cannot be read"):
        load_tokenizer(tmp_path)


def test_framed_windows_have_the_special_tokens(tokenizer, text):
    from tokenizers.processors import TemplateProcessing

    windows = read_windows(text, tokenizer, 10)
    assert torch.equal(framed(windows, tokenizer), windows)
    tokenizer.post_processor = TemplateProcessing(
        single="X $A Y Y", special_tokens=[("X", 7), ("Y", 9)]
    )
    seen = framed(windows, tokenizer)
    assert torch.equal(seen[:, 1:-2], windows[:, 1:-2])
    assert seen[:, [0, -2, -1]].unique(dim=0).tolist() == [[7, 9, 9]]
    assert torch.equal(framed(windows[:, :3], tokenizer), windows[:, :3])


def test_a_tokenizer_that_pads_or_cuts_is_told_not_to(tiny_llama, text, tmp_path):
    tokenizer = load_tokenizer(tiny_llama())
    tokenizer.enable_padding(length=2000)
    tokenizer.enable_truncation(5)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert read_windows(text, load_tokenizer(tmp_path), 10).shape == (100, 10)
