"""``~/doctor``: the short form of ``pi05-ros doctor``, asked of the running node.

It answers at once, from the graph and the diagnostics: measuring would hold up the ticks.
"""

from __future__ import annotations

from collections.abc import Callable

from rclpy.node import Node
from std_srvs.srv import Trigger

from pi05_ros.control.limits import needs_description
from pi05_ros.control.status import LEVEL_NAMES, OK, Status
from pi05_ros.control.topics import TASK_PROMPT, InputTopic, description_topic, input_topics
from pi05_ros.model.errors import Pi05Error
from pi05_ros.policy.robot import load_robot

from .parameters import NodeParameters
from .subscriptions import explain_publishers, find_mismatch


class DoctorService:
    """Answers ``~/doctor`` (std_srvs/Trigger): ``success`` is true if nothing is wrong.

    Args:
        parameters: of the node; they say which inputs it listens to.
        collect: returns the present statuses.
    """

    def __init__(
        self, node: Node, parameters: NodeParameters, collect: Callable[[], list[Status]]
    ) -> None:
        self._node = node
        self._parameters = parameters
        self._collect = collect
        self._service = node.create_service(Trigger, '~/doctor', self._answer)

    def _answer(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        findings = self._findings()
        response.success = not findings
        response.message = '\n'.join(findings) or 'nothing is wrong'
        return response

    def _findings(self) -> list[str]:
        try:
            settings = self._parameters.settings()
            topics = input_topics(load_robot(settings.robot), settings)
            if needs_description(settings):
                topics += (description_topic(),)
        except Pi05Error as error:
            return [f'parameters: {error}']
        found = [input_finding(self._node, topic) for topic in topics]
        found += [
            f'{status.part}: [{LEVEL_NAMES[status.level]}] {status.message}'
            for status in self._collect()
            if status.level != OK
        ]
        return [finding for finding in found if finding]


def input_finding(node: Node, topic: InputTopic) -> str:
    """Say why nothing can arrive on an input, with the remedy; empty if it can."""
    resolved = node.resolve_topic_name(topic.topic)
    if topic.name == TASK_PROMPT or node.count_publishers(resolved):
        return find_mismatch(node, topic, resolved)  # the task may be a parameter, too
    return explain_publishers(node, topic, resolved)
