"""Declares the parameter table to ROS and hands out one checked, frozen object."""

from __future__ import annotations

from collections.abc import Callable

from rcl_interfaces.msg import (
    FloatingPointRange,
    IntegerRange,
    ParameterDescriptor,
    SetParametersResult,
)
from rclpy.node import Node
from rclpy.parameter import Parameter

from pi05_ros.control.parameter_table import INACTIVE, ParameterSpec, parameter_specs
from pi05_ros.control.parameters import (
    NodeSettings,
    ParameterError,
    coerce,
    is_ros_own,
    settings_from_values,
    unknown_parameter,
)
from pi05_ros.policy.errors import RobotError
from pi05_ros.policy.robot import load_robot

_TYPES = {
    'string': Parameter.Type.STRING,
    'int': Parameter.Type.INTEGER,
    'double': Parameter.Type.DOUBLE,
    'bool': Parameter.Type.BOOL,
}


class NodeParameters:
    """The parameters of one node.

    The node must have been made with ``automatically_declare_parameters_from_overrides``: that is
    the public way to see every override, and so to refuse one that does not exist.

    Args:
        on_change: called with the new settings after parameters were set while the node runs.
        is_active: tells whether the node acts; some parameters cannot be set meanwhile.
    """

    def __init__(
        self,
        node: Node,
        on_change: Callable[[NodeSettings], None],
        is_active: Callable[[], bool],
    ) -> None:
        self._node = node
        self._on_change = on_change
        self._is_active = is_active
        self._problems: dict[str, str] = {}
        overrides = self._take_overrides()
        self._cameras = self._camera_names(overrides)
        self._table = parameter_specs(self._cameras)
        for name, spec in self._table.items():
            self._declare(spec, overrides.pop(name, None))
        for name in overrides:
            if 'robot' in self._problems and name.startswith('cameras.'):
                continue  # whose cameras they are meant for is not known
            self._problems[name] = str(unknown_parameter(name, self._table))
        # A set of a wrong type, out of range or of a read-only parameter is refused by rclpy
        # itself, with the reason, as the descriptors say.
        node.add_on_set_parameters_callback(self._check_inactive)
        node.add_post_set_parameters_callback(self._apply)

    def settings(self) -> NodeSettings:
        """Return the present values.

        Raises:
            ParameterError: lists every override that is unknown or wrong.
        """
        if self._problems:
            raise ParameterError('; '.join(self._problems.values()))
        values = {name: self._node.get_parameter(name).value for name in self._table}
        return settings_from_values(values, self._cameras)

    def _take_overrides(self) -> dict[str, Parameter]:
        """Return the parameters that were given, undeclared again to be declared properly."""
        given = {
            name: parameter
            for name, parameter in self._node.get_parameters_by_prefix('').items()
            if not is_ros_own(name)
        }
        for name in given:
            self._node.undeclare_parameter(name)
        return given

    def _camera_names(self, overrides: dict[str, Parameter]) -> tuple[str, ...]:
        """Return the cameras of the robot file; none if it cannot be read, as configure says."""
        spec = parameter_specs(())['robot']
        given = overrides.get('robot')
        try:
            return load_robot(
                str(coerce(spec, given.value if given else spec.default))
            ).camera_names
        except (ParameterError, RobotError) as error:
            self._problems['robot'] = str(error)
            return ()

    def _declare(self, spec: ParameterSpec, given: Parameter | None) -> None:
        value = spec.default
        if given is not None:
            try:
                value = coerce(spec, given.value)
            except ParameterError as error:
                self._problems.setdefault(spec.name, str(error))
        # The override was checked above; rclpy would raise here and end the process.
        self._node.declare_parameter(spec.name, value, descriptor(spec), ignore_override=True)

    def _check_inactive(self, parameters: list[Parameter]) -> SetParametersResult:
        """Refuse what cannot change between two ticks."""
        for parameter in parameters:
            spec = self._table.get(parameter.name)
            if spec is not None and spec.settable == INACTIVE and self._is_active():
                reason = f'{spec.name} can be set only while the node is not active; deactivate it'
                return SetParametersResult(successful=False, reason=reason)
        return SetParametersResult(successful=True)

    def _apply(self, parameters: list[Parameter]) -> None:
        ours = [parameter.name for parameter in parameters if parameter.name in self._table]
        for name in ours:
            self._problems.pop(name, None)
        if ours and not self._problems:
            self._on_change(self.settings())


def descriptor(spec: ParameterSpec) -> ParameterDescriptor:
    """Return what ``ros2 param describe`` shows for a parameter."""
    described = ParameterDescriptor(
        name=spec.name,
        type=_TYPES[spec.kind].value,
        description=spec.description,
        additional_constraints=spec.constraints,
        read_only=spec.read_only,
    )
    if spec.minimum is None or spec.maximum is None:
        return described
    if spec.kind == 'int':
        whole = IntegerRange(from_value=int(spec.minimum), to_value=int(spec.maximum), step=1)
        described.integer_range = [whole]
    else:
        decimal = FloatingPointRange(from_value=spec.minimum, to_value=spec.maximum, step=0.0)
        described.floating_point_range = [decimal]
    return described
