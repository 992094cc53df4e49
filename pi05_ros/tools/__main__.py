"""``python -m pi05_ros.tools`` is ``pi05-ros``."""

import sys

from .cli import main

sys.exit(main())
