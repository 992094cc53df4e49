"""``pi05-ros bench-inputs``: what a tick costs the host beside the model."""

from __future__ import annotations

import argparse
import json
from typing import Any

from pi05_ros.control.images import NATIVE_ENCODINGS

from .terminal import image_size, make_console, output_file, positive, positive_count


def add_parser(subparsers: Any) -> None:
    """Add ``bench-inputs`` to the command line."""
    parser = subparsers.add_parser(
        'bench-inputs',
        help="measure the node's own work per tick, from the middleware to the actions",
        description='Send images and joint states from another process, take them with the '
        "node's own classes once per tick, directly and through rclpy by turns, and say what "
        'each part costs the host. The policy computes nothing.',
    )
    parser.add_argument('--views', type=positive_count, default=2, metavar='N', help='cameras (2)')
    parser.add_argument(
        '--image-size', type=image_size, default=(480, 640), metavar='WxH', help='640x480'
    )
    parser.add_argument(
        '--encoding', default='rgb8', choices=sorted(NATIVE_ENCODINGS), help='of images (rgb8)'
    )
    parser.add_argument(
        '--rate-hz', type=positive, default=30.0, metavar='HZ', help='of cameras and ticks (30)'
    )
    parser.add_argument(
        '--duration-s', type=positive, default=30.0, metavar='S', help='how long to measure (30)'
    )
    parser.add_argument(
        '--device', default='auto', help='cuda: into page-locked memory (auto: where there is one)'
    )
    parser.add_argument('--json', type=output_file, metavar='FILE', help='write every figure')
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print, write; return the exit status."""
    import torch

    from .input_measure import measure  # needs ROS
    from .input_report import print_inputs_report

    if args.device == 'auto':
        args.device = 'cuda' if torch.cuda.is_available() else 'cpu'
    report = measure(args)
    print_inputs_report(report, make_console())
    if args.json:
        args.json.write_text(json.dumps(report.as_json(), indent=1) + '\n', encoding='utf-8')
    return 0
