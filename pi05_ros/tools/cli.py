"""``pi05-ros``: one module per subcommand.

Each has ``add_parser(subparsers)``, which adds the subcommand with ``set_defaults(run=run)``, and
``run(args) -> int``, the exit status.

A module is imported only when its subcommand is called (or all of them for ``--help``), so that
``pi05-ros play`` does not wait for PyTorch and ``pi05-ros parity`` needs no ROS.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from pi05_ros import __version__
from pi05_ros.model.errors import Pi05Error

COMMANDS = (
    *('ab', 'bench', 'bench-inputs', 'checkpoint', 'demo', 'doctor', 'parity', 'play'),
    *('recompute', 'replay', 'sensors', 'tune'),
)

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130


def build_parser(commands: Sequence[str] = COMMANDS) -> argparse.ArgumentParser:
    """Return the parser with the given subcommands; their modules are imported here."""
    parser = argparse.ArgumentParser(
        prog='pi05-ros',
        description='π0.5 as a ROS 2 policy node: tools for checkpoints, bags and measurements.',
    )
    parser.add_argument('--version', action='version', version=f'pi05_ros {__version__}')
    metavar = '{' + ','.join(COMMANDS) + '}'
    subparsers = parser.add_subparsers(dest='command', metavar=metavar, required=True)
    for name in commands:
        module = f'pi05_ros.tools.{name.replace("-", "_")}'
        importlib.import_module(module).add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit status.

    An error that the user can mend is one message on stderr and status 2; Ctrl-C is 130.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    wanted = arguments[:1] if arguments[:1] and arguments[0] in COMMANDS else COMMANDS
    args = build_parser(wanted).parse_args(arguments)
    try:
        return args.run(args)
    except Pi05Error as error:
        print(f'pi05-ros {args.command}: {error}', file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


if __name__ == '__main__':
    sys.exit(main())
