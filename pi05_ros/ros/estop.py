"""``~/estop`` and ``~/estop_reset``: answered at once, also while a tick or configure runs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter
from std_srvs.srv import Trigger


class EstopServices:
    """The two services (std_srvs/Trigger), on a hidden node that a thread of its own spins.

    The executor of the policy node is busy for as long as a tick takes, and would then run the
    next tick before a service. A node belongs to one executor, hence the second node.

    Args:
        latch: told True to latch and False to release, in this object's thread; returns whether it
            was latched before.
    """

    def __init__(self, node: Node, latch: Callable[[bool], bool]) -> None:
        self._latch = latch
        self._node = Node(
            f'_{node.get_name()}_estop',
            namespace=node.get_namespace(),
            context=node.context,
            use_global_arguments=False,  # a remap of __node is not meant for this one
            enable_rosout=False,
            start_parameter_services=False,
            parameter_overrides=[Parameter('start_type_description_service', value=False)],
        )
        # rclpy's types know no service types.
        trigger: Any = Trigger
        for name, answer in (('~/estop', self._on_estop), ('~/estop_reset', self._on_reset)):
            self._node.create_service(trigger, node.resolve_service_name(name), answer)
        self._executor = SingleThreadedExecutor(context=node.context)
        self._executor.add_node(self._node)
        self._thread = threading.Thread(target=self._spin, name='estop', daemon=True)
        self._thread.start()

    def destroy(self) -> None:
        """End the thread and remove the services."""
        self._executor.shutdown()
        self._thread.join()
        self._node.destroy_node()

    def _spin(self) -> None:
        with suppress(ExternalShutdownException):
            self._executor.spin()

    def _on_estop(self, request: Any, response: Any) -> Any:
        try:
            self._latch(True)
        # Such as one of the middleware: it is latched by then, and the next call counts.
        except Exception as error:
            response.message = f'latched, but no hold is sent: {type(error).__name__}: {error}'
            self._node.get_logger().error(f'emergency stop {response.message}')
            return response
        response.success, response.message = True, 'latched; ~/estop_reset releases it'
        return response

    def _on_reset(self, request: Any, response: Any) -> Any:
        was_latched = self._latch(False)
        response.success, response.message = True, 'released' if was_latched else 'was not set'
        return response
