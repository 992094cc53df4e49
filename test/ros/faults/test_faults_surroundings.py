"""What is around one node: another one beside it, and a disk that takes no more logs."""

from __future__ import annotations

import signal

from fault_bench import NODE

SIDES = ('/left', '/right')
SENSORS = ('camera:base', 'camera:wrist', 'joints')
# As on a full disk: every write to a file fails.
FULL_DISK = ('sh', '-c', 'ulimit -f 0; exec "$@"', 'sh')


def test_two_nodes_in_two_namespaces_do_not_touch_each_other(bay, table):
    sensors = {side: bay.sensors('sensors', *SENSORS, namespace=side) for side in SIDES}
    left, right = (bay.node(namespace=side, rate_hz=4.0) for side in SIDES)
    left.start()
    right.start()
    before = left.seen()
    sensors['/left'].change('wrist', running=False)
    message = left.until_said('Action', r'stale_input: wrist image \d+ ms old')
    left.until(left.is_holding)
    deed = left.deed(before)
    right.until_acting()
    assert 'stale_input' not in right.counts()
    assert right.commands_from.topic_name == '/right/commands'
    sensors['/left'].change('wrist', running=True)
    left.until_acting()
    assert [node.stop(signal.SIGINT) for node in (left, right)] == [0, 0]
    table.add(
        'two nodes in two namespaces, a camera of one stops',
        f'the one: {deed}; the other went on acting',
        message.partition('; ')[2], 'yes, with the input',
    )  # fmt: skip


def test_full_disk_costs_the_log_file_and_nothing_else(bay, table):
    sensors = bay.sensors('sensors', *SENSORS)
    node = bay.node([*FULL_DISK, *NODE])
    node.start()
    before = node.seen()
    sensors.change('wrist', running=False)
    node.until(node.is_holding)
    sensors.change('wrist', running=True)
    node.until_acting()
    said = node.until_said('Inputs', '^all inputs fresh$')
    deed = node.deed(before)
    exit_code = node.stop(signal.SIGTERM)
    assert exit_code == 0
    node.until(node.is_holding)
    assert node.node.log_path.read_bytes() == b'', 'the disk was not full'
    table.add(
        'no space for log files (`ulimit -f 0`), then a camera stops',
        f'{deed}; exit code {exit_code} by SIGTERM',
        said, 'yes; no log file',
    )  # fmt: skip
