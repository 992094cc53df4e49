"""A complete checkpoint of random weights, in openpi's layout: for demos, tests and benchmarks."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
import torch

from pi05_ros.model.checkpoint import WEIGHTS_FILE
from pi05_ros.model.config import Pi05Config
from pi05_ros.model.errors import CheckpointError

from .weight_writer import write_random_weights

SIZES = ('tiny', 'full')
ASSET_ID = 'franka'
TOKENIZER_FILE = 'paligemma_tokenizer.model'
_CORPUS = Path(__file__).with_name('tokenizer_corpus.txt')
_TOKENIZER_VOCAB = 512  # fits the tiny model; the full model's ids simply go further

# Quantiles 1 % and 99 % of a Franka arm at a table: seven joints in rad around its ready pose,
# one finger in m. The shipped recording stays within them.
_STATE_QUANTILES = (
    (-1.2, 1.2),
    (-1.2, 1.0),
    (-1.0, 1.0),
    (-2.9, -0.8),
    (-1.5, 1.5),
    (0.8, 3.4),
    (-1.5, 1.9),
    (0.0, 0.04),
)
# Actions: seven joints relative to the measured state in rad, the finger's opening in m.
# Random weights jump from row to row; these are so small that they keep the limits of the robot
# file franka, or nothing would ever be sent.
_ACTION_QUANTILES = (*((-0.005, 0.005),) * 7, (0.0, 0.04))
_QUANTILE_STDS = 2.326  # the 99 % quantile of a normal distribution


def make_checkpoint(size: str, out: Path, seed: int) -> None:
    """Write a checkpoint directory: weights, config, statistics, tokenizer.

    Args:
        size: one of :data:`SIZES`; 'full' has the released model's dimensions in bfloat16.
        out: a directory that does not exist or is empty.
        seed: determines the weights.
    Raises:
        CheckpointError: the directory is in use, or the disk is too small.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f'{out} exists and is not an empty directory; nothing was written')
    full = size == 'full'
    config = Pi05Config.full() if full else Pi05Config.tiny()
    dtype = torch.bfloat16 if full else torch.float32
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / TOKENIZER_FILE).write_bytes(train_tokenizer())
        stats = out / 'assets' / ASSET_ID / 'norm_stats.json'
        stats.parent.mkdir(parents=True)
        _write_json(stats, {'norm_stats': franka_stats()})
        write_random_weights(out / WEIGHTS_FILE, config, dtype, seed)
        # Last: a directory without a config is not mistaken for a finished checkpoint.
        _write_json(out / 'config.json', openpi_config(config, dtype, full))
    except OSError as cause:
        raise CheckpointError(f'cannot write {out}: {cause}') from cause


def openpi_config(config: Pi05Config, dtype: torch.dtype, full: bool) -> dict[str, Any]:
    """Return config.json: by openpi's variant names, or by dimensions where none fits."""
    common = {
        'action_dim': config.action_dim,
        'action_horizon': config.action_horizon,
        'precision': str(dtype).removeprefix('torch.'),
    }
    if full:
        return common | {
            'paligemma_variant': 'gemma_2b',
            'action_expert_variant': 'gemma_300m',
        }
    return common | {'dims': config.to_dims()}


def franka_stats() -> dict[str, dict[str, list[float]]]:
    """Return plausible statistics of a Franka arm, in the form of openpi's norm_stats.json."""
    stats = {}
    for name, quantiles in (('state', _STATE_QUANTILES), ('actions', _ACTION_QUANTILES)):
        stats[name] = {
            'mean': [round((low + high) / 2, 6) for low, high in quantiles],
            'std': [round((high - low) / 2 / _QUANTILE_STDS, 6) for low, high in quantiles],
            'q01': [low for low, _ in quantiles],
            'q99': [high for _, high in quantiles],
        }
    return stats


def train_tokenizer() -> bytes:
    """Train a small SentencePiece model on the shipped sentences; always the same bytes.

    Special ids, byte fallback, single digits and the untouched white space are PaliGemma's.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_CORPUS.read_text(encoding='utf-8').splitlines()),
        model_writer=model,
        model_type='bpe',
        vocab_size=_TOKENIZER_VOCAB,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name='identity',
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8')
