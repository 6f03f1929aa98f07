"""Train and evaluate a five-layer MLP on MNIST as a batch job, and read numbers by it."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mnist.reading.reader import read as read

__all__ = ["read"]


def __getattr__(name: str) -> Any:
    if name == "read":  # torch takes seconds, which `import mnist` does not
        from mnist.reading.reader import read

        return read
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
