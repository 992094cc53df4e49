"""May this observation be acted on? Age of each input, and the spread between cameras.

Stamps are nanoseconds of the ROS clock. Each function returns None, or a :class:`Skip` that names
the guilty input, its figure and the limit.
"""

from __future__ import annotations

from collections.abc import Mapping

from .reasons import Reason, Skip

NS_PER_MS = 1_000_000


def check_age(
    name: str, stamp_ns: int, now_ns: int, max_age_ms: float, max_future_ms: float
) -> Skip | None:
    """Refuse an input that is older than ``max_age_ms`` or stamped later than now.

    Args:
        name: how the diagnostics call the input, e.g. ``wrist image``.
        max_future_ms: tolerated lead of the stamp over ``now_ns``: clocks that are synchronised
            between machines still differ a little, and a simulated clock moves in steps.
    """
    if stamp_ns == 0:
        detail = f'{name} has no stamp in its header; set stamp_source: receive'
        return Skip(Reason.STALE_INPUT, name, detail)
    age_ms = (now_ns - stamp_ns) / NS_PER_MS
    if age_ms > max_age_ms:
        return Skip(Reason.STALE_INPUT, name, f'{name} {age_ms:.0f} ms old > {max_age_ms:g} ms')
    if -age_ms > max_future_ms:
        detail = f'{name} stamped {-age_ms:.0f} ms in the future > {max_future_ms:g} ms'
        return Skip(Reason.FUTURE_STAMP, name, detail)
    return None


def check_skew(stamps_ns: Mapping[str, int], max_skew_ms: float) -> Skip | None:
    """Refuse images that were taken too far apart; the oldest is the guilty one.

    Args:
        stamps_ns: stamp of each camera's image, by the name that the diagnostics use.
    """
    if len(stamps_ns) < 2:
        return None
    oldest = min(stamps_ns, key=lambda name: stamps_ns[name])
    newest = max(stamps_ns, key=lambda name: stamps_ns[name])
    skew_ms = skew_of(stamps_ns)
    if skew_ms <= max_skew_ms:
        return None
    detail = f'{oldest} is {skew_ms:.0f} ms older than {newest} > {max_skew_ms:g} ms'
    return Skip(Reason.SKEWED_INPUTS, oldest, detail)


def skew_of(stamps_ns: Mapping[str, int]) -> float:
    """Return the spread between the oldest and the newest stamp in milliseconds."""
    if not stamps_ns:
        return 0.0
    return (max(stamps_ns.values()) - min(stamps_ns.values())) / NS_PER_MS
