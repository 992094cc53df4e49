"""π0.5 as a ROS 2 policy node: camera topics in, actions and per-stage timing out.

The packages, lowest first; an import may only point downwards:

- ``model``    the oracle: π0.5 in plain PyTorch, and checkpoint files
- ``engine``   the same function, fast; one interface for every backend
- ``policy``   observation in robot units -> action chunk in robot units
- ``control``  when to act: inputs, gates, tick decision, parameters (no rclpy)
- ``ros``      everything that imports rclpy
- ``tools``    the ``pi05-ros`` command
"""

from pkgutil import extend_path

# The generated messages (pi05_ros.msg) are installed in another directory than a source tree;
# both together form this package.
__path__ = extend_path(__path__, __name__)

__version__ = '0.1.0'
