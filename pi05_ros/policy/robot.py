"""What a checkpoint does not say about the robot: cameras, state, actions, units, rates.

A robot file is ``config/robots/NAME.yaml``; ``template.yaml`` there explains every key. It is read
once, into a frozen :class:`RobotSpec`. Everything that is not known here is an error.
"""

from __future__ import annotations

import math
import re
import reprlib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from pi05_ros.model.files import local_path
from pi05_ros.resources import robot_dir

from .errors import RobotError
from .strict_yaml import YamlError, read_plain_yaml

# The model's views, in the order in which it was trained with them (openpi preprocessing_pytorch).
CAMERA_SLOTS = ('base_0_rgb', 'left_wrist_0_rgb', 'right_wrist_0_rgb')

JointField = Literal['position', 'velocity', 'effort']
EefComponent = Literal[
    'position_x', 'position_y', 'position_z',
    'axis_angle_x', 'axis_angle_y', 'axis_angle_z',
    'quaternion_x', 'quaternion_y', 'quaternion_z', 'quaternion_w',
]  # fmt: skip
ActionKind = Literal[
    'joint_position',
    'joint_velocity',
    'eef_delta_position',
    'eef_delta_rotation',
    'gripper_position',
    'gripper_command',
]
Unit = Literal['rad', 'm', 'rad/s', 'm/s', 'N', 'N*m', '1']

# '1' is a number without a unit: a share of the range, or the input of a controller.
UNITS_OF_KIND: dict[str, tuple[str, ...]] = {
    'joint_position': ('rad', 'm'),
    'joint_velocity': ('rad/s', 'm/s', '1'),
    'eef_delta_position': ('m', '1'),
    'eef_delta_rotation': ('rad', '1'),
    'gripper_position': ('m', 'rad', '1'),
    'gripper_command': ('1',),
}
POSITION_KINDS = ('joint_position', 'gripper_position')
# Limits of a joint's position where the robot file gives none: per action, and per second.
DEFAULT_MAX_JUMP = {'rad': 0.5, 'm': 0.1}
DEFAULT_MAX_RATE = {'rad': 3.0, 'm': 0.5}
JOINT_KINDS = ('joint_position', 'joint_velocity', 'gripper_position')
ALOHA_DIMS = 14

_Name = Annotated[str, StringConstraints(pattern=r'^[A-Za-z][A-Za-z0-9_]{0,62}$')]
_Camera = Annotated[str, StringConstraints(pattern=r'^[a-z][a-z0-9_]{0,62}$')]
_Joint = Annotated[str, StringConstraints(pattern=r'^[!-~]{1,128}$')]
_Asset = Annotated[str, StringConstraints(max_length=200, pattern=r'^\w[\w.-]*(/\w[\w.-]*)*$')]
_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Limit = Annotated[float, Field(gt=0.0)]  # infinity is no limit


class _Strict(BaseModel):
    """Unknown keys and other types are errors; nothing changes after loading."""

    model_config = ConfigDict(strict=True, extra='forbid', frozen=True)


class Scaled(_Strict):
    """One number with its unit, and how the policy sees it: ``scale * robot value + offset``."""

    unit: Unit
    scale: _Finite = 1.0
    offset: _Finite = 0.0

    @property
    def mapping(self) -> tuple[str, float, float]:
        """Unit, scale and offset."""
        return self.unit, self.scale, self.offset

    @model_validator(mode='after')
    def _check_scale(self) -> Scaled:
        if self.scale == 0.0:
            raise ValueError('scale is 0, which would lose the value')
        return self


class StateDim(Scaled):
    """One number of the state: a field of a joint, or a component of the end effector's pose."""

    joint: _Joint | None = None
    field: JointField = 'position'
    eef: EefComponent | None = None

    @property
    def name(self) -> str:
        """``joint.field`` or ``eef.component``."""
        return f'{self.joint}.{self.field}' if self.joint else f'eef.{self.eef}'

    @model_validator(mode='after')
    def _check_source(self) -> StateDim:
        if (self.joint is None) == (self.eef is None):
            raise ValueError("give either 'joint' (with 'field') or 'eef'")
        if self.eef is not None and 'field' in self.model_fields_set:
            raise ValueError("'field' belongs to a joint; 'eef' already names its component")
        return self


class ActionDim(Scaled):
    """One number of the action.

    ``delta_to_state``: the model gives the difference to the state dimension of the same index,
    so the state of the observation is added to every row of the chunk.

    ``min`` and ``max`` clip the action; one that exceeds :attr:`jump_limit` or :attr:`rate_limit`
    is refused. All are in the action's unit.
    """

    name: _Name
    kind: ActionKind
    joint: _Joint | None = None
    delta_to_state: bool = False
    min: _Finite | None = None
    max: _Finite | None = None
    max_jump: _Limit | None = None
    max_rate: _Limit | None = None

    @property
    def jump_limit(self) -> float:
        """Largest distance of a chunk's first row from the measured position; inf: no limit."""
        default = DEFAULT_MAX_JUMP if self.kind == 'joint_position' else {}
        return default.get(self.unit, math.inf) if self.max_jump is None else self.max_jump

    @property
    def rate_limit(self) -> float:
        """Largest change per second from row to row and action to action; inf: no limit."""
        default = DEFAULT_MAX_RATE if self.kind == 'joint_position' else {}
        return default.get(self.unit, math.inf) if self.max_rate is None else self.max_rate

    @model_validator(mode='after')
    def _check_kind(self) -> ActionDim:
        if self.unit not in UNITS_OF_KIND[self.kind]:
            known = ', '.join(UNITS_OF_KIND[self.kind])
            raise ValueError(f'{self.kind} has unit {self.unit!r}; expected one of: {known}')
        if self.kind in JOINT_KINDS and self.joint is None:
            raise ValueError(f"{self.kind} needs 'joint', the name in JointState")
        if self.kind.startswith('eef_') and self.joint is not None:
            raise ValueError(f"{self.kind} has no 'joint'")
        if self.delta_to_state and self.kind not in POSITION_KINDS:
            raise ValueError(f'{self.kind} cannot be a delta to the state; only positions can')
        return self

    @model_validator(mode='after')
    def _check_limits(self) -> ActionDim:
        if self.min is not None and self.max is not None and self.min >= self.max:
            raise ValueError(f'min {self.min:g} is not below max {self.max:g}')
        if self.max_jump is not None and self.kind not in POSITION_KINDS:
            raise ValueError(f'{self.kind} is not measured; max_jump limits positions only')
        return self


class Cameras(_Strict):
    """Which camera feeds which view of the model; a view that is left out is dropped."""

    base_0_rgb: _Camera | None = None
    left_wrist_0_rgb: _Camera | None = None
    right_wrist_0_rgb: _Camera | None = None

    @model_validator(mode='after')
    def _check_names(self) -> Cameras:
        names = list(self.by_slot().values())
        if not names:
            raise ValueError('no camera is given; at least one view needs one')
        if len(set(names)) != len(names):
            raise ValueError(f'the same camera feeds two views: {names}')
        return self

    def by_slot(self) -> dict[str, str]:
        """Return view -> camera name for the views that have one, in the model's order."""
        slots = {slot: getattr(self, slot) for slot in CAMERA_SLOTS}
        return {slot: name for slot, name in slots.items() if name is not None}


class RobotSpec(_Strict):
    """One robot, as the policy needs it; see ``config/robots/template.yaml`` for each key."""

    name: _Name
    description: Annotated[str, StringConstraints(max_length=500)] = ''
    asset_id: _Asset
    normalization: Literal['quantile', 'zscore'] = 'quantile'
    discrete_state: bool
    transform: Literal['none', 'aloha'] = 'none'
    action_horizon: Annotated[int, Field(ge=1, le=1000)] | None = None
    action_rate_hz: Annotated[float, Field(gt=0.0, le=1000.0, allow_inf_nan=False)]
    cameras: Cameras
    # YAML has lists, not tuples; the items stay strict.
    state: Annotated[tuple[StateDim, ...], Field(strict=False)] = ()
    actions: Annotated[tuple[ActionDim, ...], Field(strict=False, min_length=1)]

    @property
    def camera_names(self) -> tuple[str, ...]:
        """Camera names in the model's view order; absent views are not listed."""
        return tuple(self.cameras.by_slot().values())

    @property
    def state_dim(self) -> int:
        """Numbers in the state (S)."""
        return len(self.state)

    @property
    def state_names(self) -> tuple[str, ...]:
        """Name of each number of the state, e.g. ``panda_joint1.position``."""
        return tuple(dim.name for dim in self.state)

    @property
    def action_dim(self) -> int:
        """Numbers in one row of a chunk (D)."""
        return len(self.actions)

    @property
    def action_names(self) -> tuple[str, ...]:
        """Name of each action dimension."""
        return tuple(dim.name for dim in self.actions)

    @property
    def action_units(self) -> tuple[str, ...]:
        """Unit of each action dimension; '1' is a number without a unit."""
        return tuple(dim.unit for dim in self.actions)

    @property
    def action_kinds(self) -> tuple[str, ...]:
        """Kind of each action dimension; an output looks here whether it can carry it."""
        return tuple(dim.kind for dim in self.actions)

    @property
    def delta_mask(self) -> tuple[bool, ...]:
        """Per action dimension: is the state to be added (openpi AbsoluteActions)?"""
        return tuple(dim.delta_to_state for dim in self.actions)

    def measured_index(self, action: ActionDim) -> int | None:
        """Return where in the state the position stands that an action drives, if it does."""
        if action.kind not in POSITION_KINDS:
            return None
        for index, dim in enumerate(self.state):
            same = (dim.joint, dim.field, dim.unit) == (action.joint, 'position', action.unit)
            if same:
                return index
        return None

    @property
    def state_joints(self) -> tuple[str, ...]:
        """Joint names that a JointState must bring, each once, in the order of the state."""
        return tuple(dict.fromkeys(dim.joint for dim in self.state if dim.joint is not None))

    @property
    def action_joints(self) -> tuple[str | None, ...]:
        """Joint that each action dimension drives, or None."""
        return tuple(dim.joint for dim in self.actions)

    @property
    def needs_joint_states(self) -> bool:
        """Whether the state holds anything from a JointState."""
        return bool(self.state_joints)

    @property
    def needs_eef_pose(self) -> bool:
        """Whether the state holds anything from the end effector's pose."""
        return any(dim.eef is not None for dim in self.state)

    @property
    def step_s(self) -> float:
        """Seconds between two rows of a chunk."""
        return 1.0 / self.action_rate_hz

    @model_validator(mode='after')
    def _check_whole(self) -> RobotSpec:
        for what, names in (('state', self.state_names), ('actions', self.action_names)):
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f'{what}: given twice: {", ".join(twice)}')
        if self.discrete_state and not self.state:
            raise ValueError('discrete_state puts the state into the prompt, but state is empty')
        if self.transform == 'aloha' and (self.state_dim, self.action_dim) != (ALOHA_DIMS,) * 2:
            raise ValueError(
                f'transform aloha needs {ALOHA_DIMS} state and {ALOHA_DIMS} action dimensions, '
                f'got {self.state_dim} and {self.action_dim}'
            )
        for index, action in enumerate(self.actions):
            if action.delta_to_state:
                self._check_delta(index, action)
            if action.max_jump is not None and self.measured_index(action) is None:
                raise ValueError(
                    f'action {action.name} has max_jump, but the state has no '
                    f'{action.joint}.position [{action.unit}] to measure it by'
                )
        return self

    def _check_delta(self, index: int, action: ActionDim) -> None:
        """Refuse a delta to another quantity than the one that the action drives."""
        source = self.state[index] if index < self.state_dim else None
        found = 'missing' if source is None else f'{source.name} [{source.unit}]'
        if source is None or (source.joint, source.field) != (action.joint, 'position'):
            raise ValueError(
                f'action {action.name} is a delta to state dimension {index}, which is {found}; '
                f'expected {action.joint}.position there'
            )
        if source.mapping != action.mapping:
            raise ValueError(
                f'action {action.name} is a delta to {found}, '
                'but their unit, scale or offset differ'
            )


def robot_names() -> tuple[str, ...]:
    """Return the names of the shipped robot files."""
    return tuple(sorted(path.stem for path in robot_dir().glob('*.yaml')))


def find_robot(name_or_path: str) -> Path:
    """Return the file of a shipped robot name, or of a path (has a ``/`` or ends in ``.yaml``).

    Raises:
        RobotError: there is no such file; names the shipped robots.
    """
    shipped = ', '.join(robot_names())
    if '/' in name_or_path or name_or_path.endswith(('.yaml', '.yml')):
        path = local_path(name_or_path, RobotError)
        if not path.is_file():
            raise RobotError(f'robot file {path} does not exist; shipped robots: {shipped}')
        return path
    if name_or_path not in robot_names():
        raise RobotError(
            f'unknown robot {name_or_path!r}; shipped robots: {shipped}; '
            'or give the path of a robot file ending in .yaml'
        )
    return robot_dir() / f'{name_or_path}.yaml'


def load_robot(name_or_path: str) -> RobotSpec:
    """Read and check one robot file.

    Args:
        name_or_path: a shipped name such as ``franka``, or the path of a YAML file.
    Raises:
        RobotError: no such file, not plain YAML, or a list of every key that is wrong.
    """
    path = find_robot(name_or_path)
    try:
        content = read_plain_yaml(path)
    except YamlError as error:
        raise RobotError(f'robot file {path}: {error}') from error
    if not isinstance(content, dict):
        raise RobotError(
            f'robot file {path}: expected keys and values, found {type(content).__name__}'
        )
    try:
        return RobotSpec.model_validate(content)
    except ValidationError as error:
        problems = [_explain(problem) for problem in error.errors(include_url=False)]
        raise RobotError('\n  '.join([f'robot file {path}:', *problems])) from None


def _explain(problem: Any) -> str:
    """Return one line for one pydantic error: place, found, expected."""
    place = '.'.join(str(part) for part in problem['loc'])
    kind, found = problem['type'], reprlib.repr(problem['input'])
    if kind == 'extra_forbidden':
        return f'{place}: unknown key; allowed: {", ".join(_allowed_keys(problem["loc"]))}'
    if kind == 'missing':
        return f'{place}: missing'
    message = re.sub(r'^Value error, ', '', problem['msg'])
    if kind == 'value_error':
        return f'{place}: {message}' if place else message
    return f'{place}: found {found}; {message[:1].lower()}{message[1:]}'


def _allowed_keys(loc: tuple[int | str, ...]) -> list[str]:
    models: dict[str, type[BaseModel]] = {
        'cameras': Cameras,
        'state': StateDim,
        'actions': ActionDim,
    }
    model = models[str(loc[0])] if len(loc) > 1 else RobotSpec
    return sorted(model.model_fields)
