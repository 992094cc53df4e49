"""The prompt: openpi's two forms, its bins, and no silent truncation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from policy_files import VOCAB_SIZE, train_tokenizer

from pi05_ros.policy.errors import PromptError, TokenizerError
from pi05_ros.policy.tokenizer import (
    PromptTokenizer,
    clean_prompt,
    find_tokenizer,
    state_bins,
)


@pytest.fixture(scope='module')
def tokenizer(tokenizer_path: Path) -> PromptTokenizer:
    return PromptTokenizer(tokenizer_path, max_tokens=200, vocab_size=512)


@pytest.fixture(scope='module')
def pieces(tokenizer_path: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_path))


@pytest.mark.parametrize(
    'value, expected',
    [
        (-1.5, -1),  # below the first edge: the bin -1 is kept, not clipped to 0
        (np.nextafter(-1.0, -2.0), -1),
        (-1.0, 0),
        (np.nextafter(-1.0 + 1 / 128, -2.0), 0),
        (-1.0 + 1 / 128, 1),
        (0.0, 128),
        (1.0 - 1 / 128, 255),
        (1.0, 255),
        (1e9, 255),
    ],
)
def test_bin_of_a_value(value: float, expected: int):
    assert state_bins(np.array([value])).tolist() == [expected]


@given(st.floats(-1.0, 1.0, exclude_max=True))
def test_bin_holds_its_value(value: float):
    index = int(state_bins(np.array([value]))[0])
    assert -1 + index / 128 <= value < -1 + (index + 1) / 128


@pytest.mark.parametrize(
    'prompt, expected',
    [
        ('  pick up the bowl \n', 'pick up the bowl'),
        ('pick_up_the_bowl', 'pick up the bowl'),
        ('first\nsecond', 'first second'),
        ('_a_', ' a '),  # stripped before underscores become spaces, as openpi does
    ],
)
def test_text_is_cleaned_as_in_training(prompt: str, expected: str):
    assert clean_prompt(prompt) == expected


def test_prompt_with_state(
    tokenizer: PromptTokenizer, pieces: sentencepiece.SentencePieceProcessor
):
    state = np.array([-2.0, -1.0, 0.0, 1.0])
    ids = tokenizer.encode('put both_moka pots on the stove', state)
    text = 'Task: put both moka pots on the stove, State: -1 0 128 255;\nAction: '
    assert ids.tolist() == [2, *pieces.encode(text)]
    assert ids.dtype == np.int64


def test_prompt_without_state_ends_in_a_newline_of_its_own(
    tokenizer: PromptTokenizer, pieces: sentencepiece.SentencePieceProcessor
):
    ids = tokenizer.encode('put both moka pots on the stove', None)
    text = 'put both moka pots on the stove'
    assert ids.tolist() == [2, *pieces.encode(text), *pieces.encode('\n')]


def test_state_has_the_robots_own_dimension_in_the_prompt(
    tokenizer: PromptTokenizer, pieces: sentencepiece.SentencePieceProcessor
):
    """A state padded to the model's dimension before tokenising is a known mistake."""
    text = pieces.decode(tokenizer.encode('a', np.zeros(8)).tolist())
    assert text.count('128') == 8


def test_prompt_at_the_limit_passes_and_one_token_more_is_refused(tokenizer_path: Path):
    probe = PromptTokenizer(tokenizer_path, max_tokens=200, vocab_size=512)
    count = len(probe.encode('open the middle drawer', None))
    exact = PromptTokenizer(tokenizer_path, max_tokens=count, vocab_size=512)
    assert len(exact.encode('open the middle drawer', None)) == count
    short = PromptTokenizer(tokenizer_path, max_tokens=count - 1, vocab_size=512)
    message = f'has {count} tokens, the checkpoint takes at most {count - 1}; shorten the text'
    with pytest.raises(PromptError, match=message) as caught:
        short.encode('open the middle drawer', None)
    assert caught.value.reason == 'prompt_too_long'


def test_flood_is_refused_before_it_is_tokenised(tokenizer: PromptTokenizer):
    with pytest.raises(PromptError, match='1000000 characters, limit 10000'):
        tokenizer.encode('a' * 1_000_000, None)


@pytest.mark.parametrize('prompt', ['', '   ', '\n', '___'])
def test_empty_prompt_is_refused(tokenizer: PromptTokenizer, prompt: str):
    with pytest.raises(PromptError, match='the prompt is empty') as caught:
        tokenizer.encode(prompt, None)
    assert caught.value.reason == 'missing_input'


def test_broken_unicode_is_refused(tokenizer: PromptTokenizer):
    with pytest.raises(PromptError, match='not valid Unicode: surrogates not allowed') as caught:
        tokenizer.encode('pick \ud800', None)
    assert caught.value.reason == 'malformed_message'


@given(st.text(max_size=300))
def test_any_text_gives_ids_of_the_model_or_is_refused(tokenizer: PromptTokenizer, text: str):
    try:
        ids = tokenizer.encode(text, np.zeros(3))
    except PromptError:
        return
    assert ids[0] == 2
    assert 1 < len(ids) <= 200
    assert ids.min() >= 0
    assert ids.max() < VOCAB_SIZE


@pytest.mark.parametrize(
    'place', ['paligemma_tokenizer.model', 'tokenizer.model', 'assets/paligemma_tokenizer.model']
)
def test_tokenizer_is_found_in_the_checkpoint(tmp_path: Path, place: str):
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    path.touch()
    assert find_tokenizer(tmp_path) == path


def test_tokenizer_parameter_is_a_file_or_its_directory(tmp_path: Path):
    (tmp_path / 'tokenizer.model').touch()
    (tmp_path / 'other.model').touch()
    elsewhere = tmp_path / 'checkpoint'
    assert find_tokenizer(elsewhere, str(tmp_path)) == tmp_path / 'tokenizer.model'
    assert find_tokenizer(elsewhere, str(tmp_path / 'other.model')) == tmp_path / 'other.model'


def test_parameter_that_leads_nowhere_does_not_fall_back_to_the_checkpoint(tmp_path: Path):
    (tmp_path / 'tokenizer.model').touch()
    with pytest.raises(TokenizerError, match='looked for /nowhere/t.model'):
        find_tokenizer(tmp_path, '/nowhere/t.model')


def test_missing_tokenizer_says_where_to_get_it(tmp_path: Path):
    message = 'no tokenizer: looked for .*paligemma_tokenizer.model of the public bucket gs://big'
    with pytest.raises(TokenizerError, match=message):
        find_tokenizer(tmp_path)


@pytest.mark.parametrize('raw', [b'', b'{"version": "1.0"}', b'\xff' * 1000, b'\0'])
def test_damaged_tokenizer_is_refused(tmp_path: Path, raw: bytes):
    path = tmp_path / 'tokenizer.model'
    path.write_bytes(raw)
    with pytest.raises(TokenizerError, match='not a SentencePiece model'):
        PromptTokenizer(path, max_tokens=200, vocab_size=512)


def test_truncated_tokenizer_is_refused(tmp_path: Path, tokenizer_path: Path):
    path = tmp_path / 'tokenizer.model'
    path.write_bytes(tokenizer_path.read_bytes()[:1000])
    with pytest.raises(TokenizerError, match='not a SentencePiece model'):
        PromptTokenizer(path, max_tokens=200, vocab_size=512)


def test_tokenizer_of_a_larger_model_is_refused(tokenizer_path: Path):
    with pytest.raises(TokenizerError, match='has 320 tokens, the model only 319'):
        PromptTokenizer(tokenizer_path, max_tokens=200, vocab_size=319)


def test_tokenizer_without_bos_is_refused(tmp_path: Path):
    path = train_tokenizer(tmp_path / 'tokenizer.model', bos_id=-1)
    with pytest.raises(TokenizerError, match='no begin-of-sequence token'):
        PromptTokenizer(path, max_tokens=200, vocab_size=512)


def test_tokenizer_without_newline_is_refused_when_it_is_needed(tmp_path: Path):
    """SentencePiece's default rules turn a newline into nothing."""
    path = train_tokenizer(
        tmp_path / 'tokenizer.model',
        normalization_rule_name='nmt_nfkc',
        remove_extra_whitespaces=True,
    )
    tokenizer = PromptTokenizer(path, max_tokens=200, vocab_size=512)
    tokenizer.check_state_dim(8)
    with pytest.raises(TokenizerError, match='has no token for a newline'):
        tokenizer.check_state_dim(None)


def test_state_that_fills_the_prompt_is_refused_at_load(tokenizer_path: Path):
    tokenizer = PromptTokenizer(tokenizer_path, max_tokens=30, vocab_size=512)
    with pytest.raises(TokenizerError, match='a state of 32 numbers leaves no room for a task'):
        tokenizer.check_state_dim(32)


def test_trained_tokenizer_is_not_mistaken_for_paligemmas(tokenizer: PromptTokenizer):
    assert not tokenizer.info.is_paligemma
    assert tokenizer.info.vocab_size == VOCAB_SIZE
    assert len(tokenizer.info.sha256) == 64
