"""Draw docs/data_flow.png: the way of the data through the node.

Usage: python docs/draw_data_flow.py
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from pi05_ros.tools.plots import COLOURS

INK, FAINT, PAPER = '#20262e', '#6b7580', '#f5f7f9'
GATE, OUT = '#c0392b', '#3c8d5a'


class Canvas:
    """Boxes and arrows on a plane of 0..140 by 3..59."""

    def __init__(self) -> None:
        self.figure = Figure(figsize=(14, 5.6), dpi=110, facecolor='white')
        FigureCanvasAgg(self.figure)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_xlim(0, 140)
        self.axes.set_ylim(3, 59)
        self.axes.axis('off')

    def box(self, x, y, width, height, title, lines=(), fill='white', edge=FAINT, ink=INK):
        """Draw a box from its lower left corner, with a title and smaller lines."""
        self.axes.add_patch(
            FancyBboxPatch(
                (x, y), width, height, boxstyle='round,pad=0,rounding_size=0.8',
                facecolor=fill, edgecolor=edge, linewidth=1.3,
            )
        )  # fmt: skip
        rows = 1 + 0.82 * len(lines)
        top = y + height / 2 + (rows - 1) * 1.22
        self.axes.text(x + width / 2, top, title, ha='center', va='center', size=11,
                       weight='bold', color=ink)  # fmt: skip
        for number, line in enumerate(lines, start=1):
            self.axes.text(x + width / 2, top - 2.35 * number, line, ha='center', va='center',
                           size=8.6, color=ink if ink != INK else FAINT)  # fmt: skip

    def arrow(self, start, end, colour=FAINT, style='-'):
        """Draw an arrow between two points."""
        self.axes.annotate(
            '', xy=end, xytext=start,
            arrowprops={'arrowstyle': '-|>', 'color': colour, 'linewidth': 1.5,
                        'linestyle': style, 'shrinkA': 0, 'shrinkB': 0},
        )  # fmt: skip

    def note(self, x, y, text, size=9.0, colour=FAINT, **more):
        """Write a line of text."""
        self.axes.text(x, y, text, size=size, color=colour, va='center', **more)


def draw(path: Path) -> None:
    """Draw the whole picture and save it."""
    canvas = Canvas()
    inputs = [
        (47, 'camera/base/image_raw', 'sensor_msgs/Image or CompressedImage'),
        (38, 'camera/wrist/image_raw', 'any number of cameras: robot file'),
        (29, 'joint_states', 'read by joint name'),
        (20, 'task_prompt', 'std_msgs/String, or parameter'),
    ]
    canvas.box(31.5, 9.5, 81, 48.5, '', fill=PAPER, edge='#c9d0d8')
    canvas.note(33, 56, 'pi05_policy', size=13, colour=INK, weight='bold')
    canvas.note(46, 56, 'lifecycle node; on every control tick, one whole inference on the '
                'newest observation')  # fmt: skip
    for y, title, line in inputs:
        canvas.box(1, y, 25.5, 7, title, (line,))
        canvas.arrow((26.5, y + 3.5), (34, y + 3.5))
    canvas.box(34, 20, 12.5, 34, '')
    canvas.note(40.2, 43, 'newest\nat tick', size=11, colour=INK, ha='center', weight='bold')
    canvas.note(40.2, 33, 'raw bytes,\npolled,\nnever queued', size=8.8, ha='center')
    canvas.box(50, 20, 12.5, 34, '', edge=GATE)
    canvas.note(56.2, 43, 'gates', size=11, colour=INK, ha='center', weight='bold')
    canvas.note(56.2, 33, 'complete?\nage, skew,\nsize, encoding,\njoint names', size=8.8,
                ha='center')  # fmt: skip
    canvas.arrow((46.5, 37), (50, 37))
    canvas.arrow((62.5, 50.5), (66, 50.5))
    stages = [
        (47, 'preprocess', ('resize with pad, tokens',), COLOURS['preprocess']),
        (38, 'vision', ('SigLIP: images → 256 tokens each',), COLOURS['vision']),
        (29, 'KV prefill', ('Gemma: prefix → keys, values',), COLOURS['KV prefill']),
        (20, 'denoise', ('action expert, N Euler steps',), COLOURS['denoise']),
    ]
    for y, title, lines, fill in stages:
        canvas.box(66, y, 25, 7, title, lines, fill=fill, edge=fill, ink='white')
    for y in (47, 38, 29):
        canvas.arrow((78.5, y), (78.5, y - 2))
    canvas.box(95, 20, 15, 34, '')
    canvas.note(102.5, 43, 'convert,\ncheck', size=11, colour=INK, ha='center', weight='bold')
    canvas.note(102.5, 32, 'finite?\nrobot units,\nabsolute joints,\nstamp: oldest\ninput used',
                size=8.8, ha='center')  # fmt: skip
    canvas.arrow((91, 23.5), (95, 23.5))
    outputs = [
        (47, '~/dry_run/action_chunk', 'shipped default: moves nothing'),
        (38, 'joint_trajectory', 'joint_trajectory_controller'),
        (29, 'commands', 'or JointState: joint_commands'),
        (20, '~/action_chunk', 'pi05_ros/ActionChunk, all rows'),
    ]
    for y, title, line in outputs:
        canvas.box(116, y, 23, 7, title, (line,), edge=OUT)
        canvas.arrow((110, y + 3.5), (116, y + 3.5), OUT, '--' if y == 47 else '-')
    canvas.box(34, 11.5, 76, 5, '', edge='#c9d0d8')
    canvas.note(72, 14, '~/timing on every tick  ·  /diagnostics at 1 Hz: ms per stage, ages, '
                'rates, backend, skips by reason', colour=INK, ha='center')  # fmt: skip
    canvas.arrow((56.2, 20), (56.2, 16.5), GATE)
    canvas.note(57.2, 18.2, 'no: no action, the guilty input is named and counted', colour=GATE)
    canvas.arrow((110, 14), (116, 14))
    canvas.note(117, 14, 'rqt, Foxglove, PlotJuggler', size=9.5)
    canvas.note(1, 6, 'Nothing that was computed from one observation is used for the next. '
                'A missing input is never replaced by zeros.', size=10)  # fmt: skip
    canvas.figure.savefig(path, format='png')


if __name__ == '__main__':
    draw(Path(__file__).parent / 'data_flow.png')
