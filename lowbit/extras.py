"""Optional packages: if one is missing, the error says which extra of the installation brings it."""

from collections.abc import Iterator
from contextlib import contextmanager

from lowbit.errors import MissingExtraError


@contextmanager
def extra(name: str, what: str) -> Iterator[None]:
    """Turn a failing import in the ``with`` block into one sentence that says what to install.

    Example:
        with extra("speech", "reading sound"):
            import soundfile

    Args:
        name: the extra of pyproject.toml that brings the packages imported in the block.
        what: the feature that needs the packages; begins the message.

    Raises:
        MissingExtraError: a package is missing, or is installed but cannot be imported.
    """
    try:
        yield
    except (ImportError, OSError, RuntimeError) as error:  # a build for another torch fails with any of them
        package = (getattr(error, "name", None) or "").partition(".")[0]
        if isinstance(error, MissingExtraError) or package == "lowbit":
            raise
        if isinstance(error, ModuleNotFoundError) and package:
            raise MissingExtraError(f"{what} needs {package}: pip install 'lowbit[{name}]'") from error
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise MissingExtraError(
            f"{what} needs {package or 'packages'} that cannot be imported here ({said}): "
            f"pip install --force-reinstall 'lowbit[{name}]'"
        ) from error
