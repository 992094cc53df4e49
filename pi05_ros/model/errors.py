"""The root of every error that a user can cause; other packages derive their own from it."""


class Pi05Error(Exception):
    """A mistake that the person at the robot can mend.

    The message is one line or a short list: what was found, what was expected, what to do.
    The node logs it as the cause of a refused transition; the command line prints it and exits 2.
    """


class ConfigError(Pi05Error):
    """Model dimensions are missing, unknown or contradict each other."""


class CheckpointError(Pi05Error):
    """A checkpoint directory is missing, incomplete, corrupt or of other dimensions."""
