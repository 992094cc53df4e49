"""The prompt: text and state as token ids, in the two forms that π0.5 checkpoints use.

Source of both forms and of the binning: openpi models/tokenizer.py:22-48 (commit 15a9616).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece

from pi05_ros.model.files import local_path

from .errors import PromptError, TokenizerError

FILE_NAMES = ('paligemma_tokenizer.model', 'tokenizer.model')
PALIGEMMA_SHA256 = '8986bb4f423f07f8c7f70d0dbe3526fb2316056c17bae71b1ea975e77a168fc6'
WHERE_TO_GET_IT = (
    'it is paligemma_tokenizer.model of the public bucket gs://big_vision, or tokenizer.model of '
    'google/paligemma-3b-pt-224; put it into the checkpoint directory or set the parameter '
    'tokenizer to its path'
)
MAX_FILE_BYTES = 64 * 1024 * 1024
MAX_PROMPT_CHARACTERS = 10_000  # far above what fits; stops a flood before it is tokenised
STATE_BINS = 256
# Left edges only: what is below the first falls into bin -1, what is above the last into 255.
_BIN_EDGES = np.linspace(-1.0, 1.0, STATE_BINS + 1)[:-1]


def find_tokenizer(checkpoint_dir: Path, tokenizer: str = '') -> Path:
    """Return the tokenizer file.

    Args:
        checkpoint_dir: searched, with its ``assets/``, where ``tokenizer`` is empty.
        tokenizer: a file, or a directory that holds one.
    Raises:
        TokenizerError: there is none; says where it looked and where to get it.
    """
    given = local_path(tokenizer, TokenizerError)
    if tokenizer and given.is_file():
        return given
    roots = [given] if tokenizer else [checkpoint_dir, checkpoint_dir / 'assets']
    candidates = [root / name for root in roots for name in FILE_NAMES]
    for path in candidates:
        if path.is_file():
            return path
    looked = [given, *candidates] if tokenizer else candidates
    raise TokenizerError(
        f'no tokenizer: looked for {", ".join(map(str, looked))}; {WHERE_TO_GET_IT}'
    )


def clean_prompt(prompt: str) -> str:
    """Return the text as the model was trained to see it: one line, no underscores."""
    return prompt.strip().replace('_', ' ').replace('\n', ' ')


def state_bins(state: np.ndarray) -> np.ndarray:
    """Return the bin of each normalised state value: (S,) int64 in -1 .. 255, not clipped."""
    return _BIN_EDGES.searchsorted(state, side='right') - 1


@dataclass(frozen=True)
class TokenizerInfo:
    """What ``inspect`` and the diagnostics show of a tokenizer."""

    path: Path
    sha256: str
    vocab_size: int

    @property
    def is_paligemma(self) -> bool:
        """Return whether this is the very file that released checkpoints were trained with."""
        return self.sha256 == PALIGEMMA_SHA256


class PromptTokenizer:
    """A SentencePiece model that fits a checkpoint.

    Args:
        path: the ``.model`` file.
        max_tokens: most tokens that a prompt may have.
        vocab_size: of the model; every id must be below.
    Raises:
        TokenizerError: unreadable, damaged, or not the tokenizer of this model.
    """

    def __init__(self, path: Path, *, max_tokens: int, vocab_size: int) -> None:
        proto = _read(path)
        self._pieces = _parse(path, proto)
        self.max_tokens = max_tokens
        count = self._pieces.vocab_size()
        self.info = TokenizerInfo(path, hashlib.sha256(proto).hexdigest(), count)
        if count > vocab_size:
            raise TokenizerError(
                f'{path} has {count} tokens, the model only {vocab_size}: it is the tokenizer of '
                f'another model; {WHERE_TO_GET_IT}'
            )
        if self._pieces.bos_id() < 0:
            raise TokenizerError(f'{path} has no begin-of-sequence token; {WHERE_TO_GET_IT}')

    def check_state_dim(self, state_dim: int | None) -> None:
        """Refuse a robot for which even the shortest text could not be encoded.

        Args:
            state_dim: numbers of the state in the prompt; None for the π0 form.
        Raises:
            TokenizerError: the state alone fills the prompt, or a newline has no token.
        """
        state = None if state_dim is None else np.ones(state_dim)  # the longest integers
        try:
            self.encode('a', state)
        except PromptError as error:
            raise TokenizerError(
                f'{self.info.path}: a state of {state_dim} numbers leaves no room for a task: '
                f'{error}'
            ) from error

    def encode(self, prompt: str, state: np.ndarray | None) -> np.ndarray:
        """Return the token ids (T,) int64 of one prompt, without padding.

        Args:
            prompt: the task as the user wrote it.
            state: (S,) normalised state for the π0.5 form; None for the π0 form (text, newline).
        Raises:
            PromptError: empty, not encodable, or longer than ``max_tokens``; never truncated.
        """
        if len(prompt) > MAX_PROMPT_CHARACTERS:
            raise PromptError(
                'prompt_too_long',
                f'the prompt has {len(prompt)} characters, limit {MAX_PROMPT_CHARACTERS}',
            )
        text = clean_prompt(prompt)
        _check_unicode(text)
        if not text.strip():
            raise PromptError('missing_input', f'the prompt is empty: {prompt!r}')
        if state is None:
            ids = self._encode(text, add_bos=True) + self._newline()
        else:
            bins = ' '.join(map(str, state_bins(state).tolist()))
            ids = self._encode(f'Task: {text}, State: {bins};\nAction: ', add_bos=True)
        if len(ids) > self.max_tokens:
            raise PromptError(
                'prompt_too_long',
                f'the prompt has {len(ids)} tokens, the checkpoint takes at most '
                f'{self.max_tokens}; shorten the text: {text[:60]!r}',
            )
        return np.asarray(ids, dtype=np.int64)

    def _encode(self, text: str, *, add_bos: bool = False) -> list[int]:
        return list(self._pieces.encode(text, add_bos=add_bos))

    def _newline(self) -> list[int]:
        ids = self._encode('\n')
        if not ids or self._pieces.unk_id() in ids:
            raise TokenizerError(
                f'{self.info.path} has no token for a newline, which ends the prompt where '
                f'discrete_state is false; {WHERE_TO_GET_IT}'
            )
        return ids


def _check_unicode(text: str) -> None:
    try:
        text.encode('utf-8')
    except UnicodeEncodeError as error:
        raise PromptError(
            'malformed_message', f'the prompt is not valid Unicode: {error.reason}'
        ) from None


def _read(path: Path) -> bytes:
    try:
        with path.open('rb') as stream:
            proto = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise TokenizerError(f'{path}: cannot be read: {error.strerror or error}') from error
    if len(proto) > MAX_FILE_BYTES:
        raise TokenizerError(f'{path}: larger than {MAX_FILE_BYTES} bytes, so not a tokenizer')
    return proto


def _parse(path: Path, proto: bytes) -> sentencepiece.SentencePieceProcessor:
    pieces = sentencepiece.SentencePieceProcessor()
    try:
        if not proto:
            raise RuntimeError('the file is empty')
        pieces.LoadFromSerializedProto(proto)
        if pieces.vocab_size() < 1:
            raise RuntimeError('it has no tokens')
    except (RuntimeError, OSError, ValueError) as error:  # also a message that is no UTF-8
        raise TokenizerError(
            f'{path}: not a SentencePiece model: {error}; {WHERE_TO_GET_IT}'
        ) from error
    return pieces
