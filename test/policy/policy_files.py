"""Small checkpoint files with a known content, and a pipeline that answers as told."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import sentencepiece
from safetensors.numpy import save_file

from pi05_ros.engine.pipeline import InferenceResult, Pipeline, PipelineShape, StageTimes
from pi05_ros.model.config import Pi05Config
from pi05_ros.policy.policy import Policy
from pi05_ros.policy.robot import RobotSpec, load_robot
from pi05_ros.policy.stats import NormStats
from pi05_ros.policy.tokenizer import PromptTokenizer
from pi05_ros.policy.transforms import Normalizer

VOCAB_SIZE = 320


def train_tokenizer(path: Path, **changes: Any) -> Path:
    """Train a SentencePiece model with PaliGemma's special ids on a few sentences."""
    sentences = [
        'Task: pick up the black bowl and place it on the plate, State: 0 12 255 -1;',
        'put both moka pots on the stove',
        'open the middle drawer of the cabinet',
    ] * 20
    model = io.BytesIO()
    settings = {
        'vocab_size': VOCAB_SIZE,
        'model_type': 'bpe',
        'pad_id': 0,
        'eos_id': 1,
        'bos_id': 2,
        'unk_id': 3,
        'byte_fallback': True,
        'normalization_rule_name': 'identity',
        'remove_extra_whitespaces': False,
        'split_digits': True,
        'minloglevel': 2,
    } | changes
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, **settings
    )
    path.write_bytes(model.getvalue())
    return path


def feature_stats(dim: int, first: float = 1.0) -> dict[str, list[float]]:
    """Return statistics that differ in every dimension."""
    index = np.arange(dim, dtype=np.float64)
    values = {
        'mean': first + index,
        'std': 0.5 + index,
        'q01': -first - index,
        'q99': first + 2.0 * index,
    }
    return {name: value.tolist() for name, value in values.items()}


def write_norm_stats(
    directory: Path, state: Mapping[str, Any] | None, actions: Mapping[str, Any] | None
) -> Path:
    """Write openpi's norm_stats.json."""
    directory.mkdir(parents=True, exist_ok=True)
    tree = {'state': state, 'actions': actions}
    path = directory / 'norm_stats.json'
    path.write_text(json.dumps({'norm_stats': {k: v for k, v in tree.items() if v is not None}}))
    return path


def lerobot_steps(mode: str, step_index: int = 3) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the content of a lerobot checkpoint's two processor files."""
    config = {'eps': 1e-8, 'norm_map': {'VISUAL': 'IDENTITY', 'STATE': mode, 'ACTION': mode}}
    before = f'policy_preprocessor_step_{step_index}_normalizer_processor.safetensors'
    after = 'policy_postprocessor_step_0_unnormalizer_processor.safetensors'
    relative = {'enabled': False, 'exclude_joints': ['gripper'], 'action_names': None}
    return (
        {
            'name': 'policy_preprocessor',
            'steps': [
                {'registry_name': 'rename_observations_processor', 'config': {'rename_map': {}}},
                {'registry_name': 'to_batch_processor', 'config': {}},
                {'registry_name': 'relative_actions_processor', 'config': relative},
                {
                    'registry_name': 'normalizer_processor',
                    'config': config,
                    'state_file': before,
                },
                {'registry_name': 'pi05_prepare_state_tokenizer_processor_step', 'config': {}},
                {'registry_name': 'tokenizer_processor', 'config': {'max_length': 200}},
                {'registry_name': 'device_processor', 'config': {'device': 'cuda'}},
            ],
        },
        {
            'name': 'policy_postprocessor',
            'steps': [
                {
                    'registry_name': 'unnormalizer_processor',
                    'config': config,
                    'state_file': after,
                },
                {'registry_name': 'absolute_actions_processor', 'config': {'enabled': False}},
                {'registry_name': 'device_processor', 'config': {'device': 'cpu'}},
            ],
        },
    )


def write_lerobot(
    directory: Path,
    steps: tuple[dict[str, Any], dict[str, Any]],
    state: Mapping[str, Any],
    actions: Mapping[str, Any],
) -> Path:
    """Write the processor files and the safetensors files that they name."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {f'observation.state.{name}': np.float32(value) for name, value in state.items()}
    tensors |= {f'action.{name}': np.float32(value) for name, value in actions.items()}
    for name, content in zip(('policy_preprocessor', 'policy_postprocessor'), steps, strict=True):
        (directory / f'{name}.json').write_text(json.dumps(content))
        for step in content['steps']:
            if 'state_file' in step and step['state_file'].endswith('.safetensors'):
                save_file(tensors, directory / Path(step['state_file']).name)
    return directory


class FakePipeline(Pipeline):
    """Stands in for a model: records what it was asked, answers ``actions``."""

    device = 'cpu'
    precision = 'float32'

    def __init__(self, shape: PipelineShape, actions: np.ndarray) -> None:
        self.config = Pi05Config.tiny()
        self.shape = shape
        self.actions = actions
        self.calls: list[SimpleNamespace] = []
        self.closed = False

    @property
    def stage_backends(self) -> Mapping[str, str]:
        return {'vision': 'fake', 'prefill': 'fake', 'denoise': 'fake'}

    def infer(
        self,
        images: Sequence[np.ndarray],
        tokens: np.ndarray,
        noise: np.ndarray,
        num_steps: int | None = None,
        meanwhile: Callable[[], None] | None = None,
    ) -> InferenceResult:
        self.check_call(images, tokens, noise, num_steps or self.shape.num_steps)
        call = SimpleNamespace(images=images, tokens=tokens, noise=noise, num_steps=num_steps)
        self.calls.append(call)
        if meanwhile is not None:
            meanwhile()
        return InferenceResult(self.actions, StageTimes(*[1.0] * 7))

    def close(self) -> None:
        self.closed = True


def identity_normalizer(dim: int) -> Normalizer:
    """Return the z-score of mean 0 and deviation 1: what goes in comes out."""
    one = np.ones(dim)
    return Normalizer('zscore', np.zeros(dim), one, one)


def fake_policy(
    tokenizer_path: Path,
    robot: str | RobotSpec = 'franka',
    *,
    actions: np.ndarray | None = None,
    stats: NormStats | None = None,
    horizon: int = 4,
    size_px: tuple[int, int] = (8, 10),
) -> Policy:
    """Return the real policy around a :class:`FakePipeline`."""
    spec = load_robot(robot) if isinstance(robot, str) else robot
    config = Pi05Config.tiny()
    if actions is None:
        actions = np.zeros((horizon, config.action_dim), dtype=np.float32)
    if stats is None:
        normalizers = identity_normalizer(spec.state_dim), identity_normalizer(spec.action_dim)
        stats = NormStats(*normalizers, files=(Path('norm_stats.json'),), rule='openpi')
    shape = PipelineShape(
        view_sizes_px=(size_px,) * len(spec.camera_names),
        max_prompt_tokens=config.max_prompt_tokens,
        horizon=horizon,
    )
    checkpoint: Any = SimpleNamespace(path=Path('ckpt'), layout='openpi', sha256='ab' * 32)
    return Policy(
        checkpoint=checkpoint,
        robot=spec,
        stats=stats,
        tokenizer=PromptTokenizer(
            tokenizer_path, max_tokens=config.max_prompt_tokens, vocab_size=config.vocab_size
        ),
        pipeline=FakePipeline(shape, actions),
    )


def urdf(joints: str) -> str:
    """Return a robot description with these ``<joint>`` elements."""
    return f'<robot name="r"><link name="base"/>{joints}</robot>'
