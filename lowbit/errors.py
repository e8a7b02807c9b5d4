"""The exceptions that are written for the user."""


class LowbitError(ValueError):
    """A mistake in the given settings, files or data; the message is one sentence that says what to do.

    Everything the library refuses on purpose raises this or a subclass; the command line prints the
    message without a traceback and exits with status 2.
    """


class DataError(LowbitError):
    """Data is missing, truncated, altered or of the wrong kind."""


class CheckpointError(LowbitError):
    """A saved file cannot be trusted: truncated, altered, from a newer version or for another model."""


class StorageError(LowbitError, OSError):
    """A file could not be written: the disk is full, or the folder is not writable. An earlier file is unchanged."""


class DivergedError(LowbitError):
    """A loss is no longer a finite number: the settings do not suit the model."""


class MissingExtraError(LowbitError, ImportError):
    """A feature needs a package of an optional part of the installation; the message says how to install it."""
