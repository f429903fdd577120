"""Generation: greedy and sampled, batches, stop tokens, streaming, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from scalebits_compiler.errors import ArtifactError, UsageError
from scalebits_compiler.runtime.generate import TextStream
from scalebits_compiler.runtime.sampling import Sampling
from scalebits_compiler.sessions.open import load

WRONG_TYPES = ("1", [1], True, 1j)


def byte_tokenizer():
    """One token a byte, as the last resort of every byte-level tokenizer; 256 ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.fixture
def session(build_module, module_shape, write):
    module = build_module(module_shape(vocab=256, layers=1))
    files = {"tokenizer.json": byte_tokenizer().to_str().encode()}
    return load(write(module, files=files))


@pytest.fixture
def bare(build_module, module_shape, write, tmp_path):
    endless = {"generation_config.json": b"{}"}
    return load(write(build_module(module_shape(layers=1)), tmp_path / "bare", files=endless))


def greedy(session, prompt, count):
    """Greedy by full forwards: no cache, no batch."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(session.forward([tokens])[0, -1].argmax()))
    return tuple(tokens[len(prompt) :])


def test_greedy_equals_full_forwards(bare):
    (found,) = bare.generate([5, 7, 9], 8)
    assert found.tokens == greedy(bare, [5, 7, 9], 8)
    assert (found.prompt, found.text, found.finish) == ((5, 7, 9), None, "length")


def test_a_batch_gives_what_each_prompt_gives_alone(bare):
    prompts = [[3], [5, 7, 9, 11, 2], np.array([8, 8])]
    together = bare.generate(prompts, 6)
    assert together == [bare.generate(prompt, 6)[0] for prompt in prompts]


def test_sampling_is_seeded_and_rows_do_not_mix(bare):
    options = {"temperature": 1.0, "top_k": 50, "top_p": 0.95}
    first = bare.generate([[3, 4], [3, 4]], 12, seed=1, **options)
    assert first == bare.generate([[3, 4], [3, 4]], 12, seed=1, **options)
    assert first[0].tokens != first[1].tokens
    assert first[:1] == bare.generate([3, 4], 12, seed=1, **options)
    assert first != bare.generate([[3, 4], [3, 4]], 12, seed=2, **options)


def test_text_ends_at_a_stop_token(bare):
    tokens = bare.generate([5, 7, 9], 8)[0].tokens
    bare.__dict__["stop_tokens"] = frozenset([tokens[3]])
    cut = tokens.index(tokens[3])
    (found,) = bare.generate([5, 7, 9], 8)
    assert (found.tokens, found.finish) == (tokens[:cut], "stop")
    both = bare.generate([[5, 7, 9], [1]], 8)
    assert both[0] == found


@pytest.mark.parametrize("eos", ["0", "[0, 3]"])
def test_stop_tokens_of_the_model(build_module, module_shape, write, tmp_path, eos):
    files = {"generation_config.json": f'{{"eos_token_id": {eos}}}'.encode()}
    session = load(write(build_module(module_shape(layers=1)), tmp_path / "o", files=files))
    assert session.stop_tokens == ({0} if eos == "0" else {0, 3})


def test_stream_joins_to_the_text(session):
    pieces = {0: "", 1: ""}

    def collect(row, piece):
        pieces[row] += piece

    found = session.generate(["Once é", "a"], 20, stream=collect, temperature=1.0)
    assert [pieces[0], pieces[1]] == [row.text for row in found]
    assert found[0].text == byte_tokenizer().decode(list(found[0].tokens))
    assert found[0].prompt == tuple(byte_tokenizer().encode("Once é").ids)


def test_characters_are_not_cut():
    tokenizer = byte_tokenizer()
    text = "a €b 😀 çé"
    stream = TextStream(tokenizer, tokenizer.encode("xy").ids)
    pieces = [stream.push(token) for token in tokenizer.encode(text).ids]
    assert "".join(pieces) + stream.flush() == text == stream.text
    assert "😀" in pieces
    half = TextStream(tokenizer, [])
    assert half.push(tokenizer.encode("é").ids[0]) == ""
    assert half.flush() == "\N{REPLACEMENT CHARACTER}"


def test_leading_spaces_stay():
    words = Tokenizer(models.WordLevel({"▁Once": 0, "▁upon": 1, "▁a": 2, "<unk>": 3}, "<unk>"))
    words.decoder = decoders.Metaspace()
    stream = TextStream(words, [0])
    assert stream.push(1) + stream.push(2) == " upon a"


@pytest.mark.parametrize("prompt", ["", [], [[]], ["a", ""]])
def test_empty_prompts(session, prompt):
    with pytest.raises(UsageError, match=r"prompt is empty|there is no prompt"):
        session.generate(prompt)


def test_refused(session, bare):
    with pytest.raises(UsageError, match="65 tokens, the model knows 64 positions"):
        session.generate("abcde", 60)
    session.generate("abcde", 59)
    with pytest.raises(UsageError, match="max-new-tokens"):
        session.generate("a", 0)
    with pytest.raises(UsageError, match="not in the model's vocabulary"):
        bare.generate([90], 5)
    with pytest.raises(UsageError, match="no tokenizer"):
        bare.generate("text")


def test_damaged_tokenizer(build_module, module_shape, write):
    out = write(build_module(module_shape(layers=1)), files={"tokenizer.json": b"{}"})
    with pytest.raises(ArtifactError, match=r"tokenizer\.json"):
        load(out).generate("a")


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"seed": -1},
        *({name: bad} for name in ("temperature", "top_k", "top_p", "seed") for bad in WRONG_TYPES),
        {"temperature": None},
        {"temperature": 10**400},
        {"top_p": None},
        {"seed": None},
        {"top_k": 1.0},
        {"seed": 1.0},
    ],
)
def test_bad_sampling(options):
    (name,) = options
    with pytest.raises(UsageError, match=f"{name.replace('_', '-')} is .*, it must be "):
        Sampling(**options)


def test_numbers_of_numpy_are_numbers(bare):
    options = {"temperature": 1.0, "top_k": 50, "top_p": 0.5, "seed": 3}
    kinds = (np.float32, np.int64, np.float64, np.uint8)
    given = {name: kind(options[name]) for kind, name in zip(kinds, options, strict=True)}
    found = bare.generate(np.array([3, 4]), np.int64(5), **given)
    assert found == bare.generate([3, 4], 5, **options)


@pytest.mark.parametrize("count", [0, -1, *WRONG_TYPES, None, 1.0])
def test_bad_number_of_new_tokens(bare, count):
    with pytest.raises(UsageError, match=r"max-new-tokens is .*, it must be a whole number, 1 or"):
        bare.generate([1], count)


@pytest.mark.parametrize(
    "prompt",
    [None, 5, 1.5, b"ab", [b"ab"], {1: 2}, {1, 2}, np.array(3), [1.0, 2.0], [1, None], [[1], None],
     [[1], 2], [[1.5]], [True], [2**70], [[[1]]], [["a"]]],
)  # fmt: skip
def test_prompts_of_wrong_types(session, prompt):
    with pytest.raises(UsageError, match=r"of the type|must be integers"):
        session.generate(prompt, 2)


def test_threads_generate_what_each_would_alone(bare, generate_in_threads):
    prompts = [[3, 4, 5], [7]]
    alone = [bare.generate(prompt, 12)[0].tokens for prompt in prompts]
    assert generate_in_threads(bare, prompts, 12) == alone


def drawn(sampling, logits, count=4000):
    rng = sampling.generator(0)
    picks = [sampling.pick(np.float32(logits), rng) for _ in range(count)]
    return np.bincount(picks, minlength=len(logits)) / count


def test_sampling_follows_the_probabilities():
    chances = np.array([0.1, 0.5, 0.0, 0.4])
    with np.errstate(divide="ignore"):
        logits = np.log(chances)
    np.testing.assert_allclose(drawn(Sampling(1.0), logits), chances, atol=0.03)
    np.testing.assert_allclose(drawn(Sampling(1.0, top_k=1), logits), [0, 1, 0, 0])
    np.testing.assert_allclose(
        drawn(Sampling(1.0, top_p=0.8), logits), [0, 5 / 9, 0, 4 / 9], atol=0.03
    )
    np.testing.assert_allclose(drawn(Sampling(1e-300), logits, 10), [0, 1, 0, 0])
    assert Sampling().pick(np.float32([1, 2, 2]), np.random.default_rng(0)) == 1


def test_shared_model_tokenizer(shared_dir):
    """A real byte-level tokenizer: pieces join to the decoded text."""
    tokenizer = Tokenizer.from_file(
        str(Path(shared_dir) / "models/wikitext2-llama-1m/tokenizer.json")
    )
    ids = tokenizer.encode("The naïve — café 😀 was built in 1920 .").ids
    stream = TextStream(tokenizer, ids[:3])
    pieces = "".join(stream.push(token) for token in ids[3:]) + stream.flush()
    assert tokenizer.decode(ids[:3]) + pieces == tokenizer.decode(ids)
