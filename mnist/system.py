"""What is asked of the operating system: whole files, signals, an end with the parent process."""

import ctypes
import errno
import hashlib
import itertools
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil

_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PARENT = os.getppid()  # when this process began


def die_with_parent(by: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel signal this process when its parent ends (on Linux; elsewhere do nothing)."""
    if _LIBC is not None:
        _LIBC.prctl(1, by)  # PR_SET_PDEATHSIG


def die_with_launcher(by: signal.Signals = signal.SIGKILL) -> None:
    """The same, if the parent is a launcher of jobs; a shell may end without its own.

    Also if it has ended already, as it may while this process imports torch: nobody would ever end
    this process then, which waits for the launcher to bring the processes together.
    """
    elastic = "TORCHELASTIC_RUN_ID" in os.environ  # nobody sets it but a launcher
    if elastic or "ACCELERATE_MIXED_PRECISION" in os.environ:
        die_with_parent(by)
        if os.getppid() != _PARENT or (elastic and _is_adopted()):
            os.kill(os.getpid(), by)


def _is_adopted() -> bool:
    """Whether the parent is what takes over the processes whose parent has ended: the first process
    of the system, or systemd of a user's session; and no launcher, for these are Python."""
    parent = os.getppid()
    try:
        if os.readlink("/proc/self") != str(os.getpid()):  # it lists another system's processes
            return False
        command = Path(f"/proc/{parent}/cmdline").read_bytes()
    except OSError:
        return False
    name = Path(os.fsdecode(command.partition(b"\0")[0])).name
    return (parent == 1 or name == "systemd") and not name.startswith(("python", "pypy"))


class StopRequest:
    """Whether a signal has asked this process to save its work and to end, from now on.

    Launchers and schedulers send several signals for one request: what comes within 5 s of the
    first is the same one, what comes later ends the process at once. So does, after 4 s, the end
    of the parent process. Signals are read by a thread, because the main one may be waiting for
    another process inside a collective.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> "StopRequest":
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._wakeup = signal.set_wakeup_fd(self._writer)
        # What Python calls may do nothing: only with a handler does the signal reach the pipe.
        self._handlers = {number: signal.signal(number, _ignore) for number in stop_signals()}
        watch = partial(self._watch, reader, os.getppid(), open_terminals())
        threading.Thread(target=watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._writer)  # ends the thread

    def _watch(self, reader: int, parent: int, terminals: list[int]) -> None:
        first = None
        while received := os.read(reader, 1):
            now = time.monotonic()
            first = first or now
            if received[0] == signal.SIGHUP:
                leave(terminals)
            self.requested = True
            if os.getppid() != parent:
                threading.Timer(4, os._exit, (128 + received[0],)).start()
            elif now - first > 5:
                os._exit(128 + received[0])
        os.close(reader)


def stop_signals() -> list[signal.Signals]:
    """The signals by which this process is asked to stop: all but a SIGHUP that it was started to
    ignore, as ``nohup`` does."""
    numbers = StopRequest.SIGNALS
    return [n for n in numbers if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]


def shows_bars() -> bool:
    """Whether standard error is a terminal on which progress is a bar. A notebook's cells look like
    one to what they start, but keep every state of it."""
    notebook = "JPY_PARENT_PID" in os.environ or "inline" in os.environ.get("MPLBACKEND", "")
    return sys.stderr.isatty() and not notebook


def open_terminals() -> list[int]:
    """The descriptors of output that is shown on a terminal."""
    return [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]


def leave(terminals: list[int]) -> None:
    """Write to nowhere what would go to a terminal that has gone, on which writing is an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in terminals:
        os.dup2(nowhere, descriptor)


def end_quietly_when_interrupted() -> None:
    """Let Ctrl-C end this process at once, without Python's traceback, while it imports modules."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def kill_tree(pid: int) -> None:
    """Kill a process and all that descend from it, which may be in other process groups."""
    with suppress(psutil.Error):
        root = psutil.Process(pid)
        for process in (*root.children(recursive=True), root):
            with suppress(psutil.Error):
                process.kill()


def give_way(nice: int) -> None:
    """Let the processes of other sessions go first: 19 most of all, 0 no more.

    Unlike the nice value of a process, a session's can be taken back without privileges. Does
    nothing where a session has none: where Linux does not group by session, and elsewhere.
    """
    path = Path("/proc/self/autogroup")
    with suppress(OSError):
        try:
            path.write_text(str(nice))
        except BlockingIOError:  # it takes one change in a tenth of a second
            time.sleep(0.2)
            path.write_text(str(nice))


def _ignore(number: int, frame: object) -> None:
    pass


def warn(line: str) -> None:
    """Say it to whoever reads the job's messages, at once."""
    print(f"warning: {line}", file=sys.stderr, flush=True)


def write_file(path: Path, contents: bytes | str) -> None:
    """Replace ``path`` in one step; a reader, or a crash, meets the old contents or the new."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("wb") as file:
            file.write(contents.encode() if isinstance(contents, str) else contents)
            file.flush()
            _flush(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Of a file's contents, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def source_digest() -> str:
    """SHA-256 of this package's source, whether it is installed or runs from a tree with changes
    that are not committed."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def move_aside(path: Path) -> Path:
    """Rename it to the first of NAME.1, NAME.2, … that is free; return that."""
    names = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
    aside = next(name for name in names if not name.exists())
    path.rename(aside)
    print(f"{path} is kept as {aside}", flush=True)
    return aside


def flush_to_disk(path: Path) -> None:
    """Wait until a file's contents, or a folder's entries, would survive a power cut.

    Where the file system cannot do that there is one warning: what is written is no less whole.

    Raises:
        OSError: the disk is full or broken, or nothing is there.
    """
    global _warned
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        if not (path.is_dir() and error.errno in _CANNOT_OPEN_FOLDERS):
            raise
        flushed = False
    else:
        try:
            flushed = _flush(descriptor)
        finally:
            os.close(descriptor)
    if not (flushed or _warned):
        _warned = True
        warn(
            f"{path}: its file system cannot flush this to disk; a crash loses nothing, a power "
            "cut may lose what was written last"
        )


_warned = False  # of a file system that cannot flush; once in a process is enough

# What file systems say that have no fsync, as some network and FUSE ones have none for folders; and
# those that open no folder at all. Others, such as EIO and ENOSPC, say that data are lost.
_CANNOT_FLUSH = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY}
_CANNOT_OPEN_FOLDERS = _CANNOT_FLUSH | {errno.EACCES, errno.EISDIR, errno.EPERM}


def _flush(descriptor: int) -> bool:
    """Whether the file system can."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        # EBADF, of a descriptor that is open: some servers take folders opened for reading for that
        if error.errno not in _CANNOT_FLUSH | {errno.EBADF}:
            raise
        return False
    return True
