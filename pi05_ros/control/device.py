"""What a failing GPU leaves behind: a process that can go on, or one that has to end.

Decided from the error's text alone, as PyTorch, Triton and the CUDA driver write it, so that
nothing here imports them.
"""

from __future__ import annotations

import traceback

from pi05_ros.model.errors import Pi05Error

# Of these the CUDA runtime's reference (cudaError_t) says that the process has to be ended and
# started again: every later call of CUDA in it returns the same error.
_FATAL = (
    'illegal memory access',
    'illegal instruction',
    'misaligned address',
    'invalid program counter',
    'hardware stack error',
    'operation not supported on global/shared address space',
    'unspecified launch failure',
    'the launch timed out and was terminated',
    'device-side assert triggered',
    'uncorrectable ECC error',
    'uncorrectable NVLink error',
    'unknown error',
)
_OUT_OF_MEMORY = 'CUDA out of memory'


class DeviceLostError(Pi05Error):
    """CUDA does not work in this process any more."""


class DeviceMemoryError(Pi05Error):
    """The GPU had too little memory for one call; a later one may work."""


class DeviceWatch:
    """Remembers, for the whole life of the process, that its CUDA context is dead.

    Attributes:
        lost: what happened and what to do; empty while CUDA may be used.
    """

    def __init__(self) -> None:
        self.lost = ''

    def check(self, device: str) -> None:
        """Refuse to use a GPU after its context died.

        Args:
            device: the parameter; only ``cpu`` names no GPU.
        Raises:
            DeviceLostError: what happened and what to do.
        """
        if self.lost and device != 'cpu':
            raise DeviceLostError(self.lost)

    def explain(self, error: Exception) -> Exception:
        """Return the error as one that says what to do, or itself where that is not known.

        What the failed call held on the device is let go: its frames, which the error keeps, are
        emptied.
        """
        traceback.clear_frames(error.__traceback__)
        found = f'{type(error).__name__}: {first_line(error)}'
        if is_fatal(error):
            remedy = 'restart the process of the node'
            self.lost = self.lost or f'CUDA is dead in this process ({found}); {remedy}'
            return DeviceLostError(self.lost)  # the first cause; all later ones follow from it
        if _OUT_OF_MEMORY in str(error) and not isinstance(error, Pi05Error):
            return DeviceMemoryError(
                f'the GPU has too little memory ({found}); end what else uses it, configure again'
            )
        return error


def is_fatal(error: BaseException) -> bool:
    """Tell whether no call of CUDA can work in this process after the error."""
    text = str(error)
    return 'CUDA' in text and any(cause in text for cause in _FATAL)


def first_line(error: BaseException) -> str:
    """Return what an error says; PyTorch adds lines on how to debug it."""
    return next(iter(str(error).splitlines()), '')
