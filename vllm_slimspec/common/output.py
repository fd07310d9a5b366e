"""Claims on the outputs of commands: an output is claimed before any work, and written completely or not at all.

A claim is a folder: ``.NAME.partial`` beside an output that is a file or does not exist yet, ``.slimspec.partial`` in
one that is an existing folder (an empty one, the current one, a mount point). Its file ``lock`` names the process that
owns it and holds a file lock on it, which ends with the process. New files are written into the claim, and move to the
output when they are complete.
"""

import errno
import fcntl
import logging
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vllm_slimspec.errors import OutputError

logger = logging.getLogger(__name__)

_LONGEST = 230  # bytes of a name; file systems allow 255, and the claim's name is longer than the output's
_INSIDE = ".slimspec.partial"
_LOCK, _FILLING = "lock", "filling"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)

Kind = Literal["folder", "file", "work"]


@dataclass
class Claim:
    """An output that only this process may write."""

    path: Path  # as the user gave it
    real: Path  # the absolute path, with links resolved
    place: Path  # the folder of the claim
    kind: Kind
    earlier: str | None  # see claim_folder
    lock: int  # the file descriptor that holds the lock
    thread: int  # the thread that made the claim
    made: list[Path]  # parent folders that were created for the claim
    keep: bool = False  # whether `place` stays after the claim ends, because a finished output is still in it

    def write(self, make: Callable[[Path], Any], *, last: str = "config.json") -> None:
        """Call ``make`` to write the output beside its place, then move the output there.

        Args:
            make: called with the path of a file that does not exist yet, or of a new, empty folder.
            last: if the output is an existing folder, the file that is moved into it last. A reader takes the folder
                for complete once this file is there.

        Raises:
            OutputError: the finished output cannot move to its place; the message says where it is. If ``make`` raises,
                nothing of the new output is left on the disk.
        """
        new = self.place / f"new{self.real.suffix}"
        try:
            if self.kind != "file":
                new.mkdir()
            make(new)
            for path in (*new.rglob("*"), new):
                sync(path)
        except BaseException:
            _remove(new)
            raise
        try:
            if self.kind == "folder":  # Something else may have filled the folder meanwhile.
                check_free(self.path, earlier=self.earlier)
            self._publish(new, last)
        except (OSError, OutputError) as error:
            self.keep = True
            reason = error.strerror if isinstance(error, OSError) else error
            raise OutputError(
                f"{self.path}: the finished output cannot take this place ({reason}); it is kept in {new}, move it "
                "from there"
            ) from None

    def _publish(self, new: Path, last: str) -> None:
        if new.is_dir() and self.real.is_dir():
            # A rename must not replace this folder: it may be a mount point or the current folder of a shell.
            self._fill(sorted(new.iterdir(), key=lambda file: file.name == last))
        else:
            try:
                new.rename(self.real)
            except OSError as error:
                # A mounted file cannot be replaced by a rename, but its content can.
                if new.is_dir() or error.errno not in (errno.EBUSY, errno.EXDEV):
                    raise
                shutil.copyfile(new, self.real)
        sync(self.real if self.real.is_dir() else self.real.parent)

    def _fill(self, files: list[Path]) -> None:
        """Move all files into the output folder. If one fails, move the others back."""
        names, moved = self.place / _FILLING, []
        names.write_text("\n".join(file.name for file in files))
        try:
            for file in files:
                file.replace(self.real / file.name)
                moved.append(file)
        except OSError:
            for file in moved:
                (self.real / file.name).replace(file)
            raise
        finally:
            names.unlink()


_held: dict[Path, Claim] = {}


def _forget() -> None:
    """Drop all claims in a forked child, which must not keep the locks of its parent."""
    for claim in _held.values():
        os.close(claim.lock)
    _held.clear()


os.register_at_fork(after_in_child=_forget)


def claim_folder(
    path: str | os.PathLike[str], *, run: Path | None = None, earlier: str | None = None
) -> AbstractContextManager[Claim]:
    """Claim an output folder, which must be empty or not exist. Fill it with :meth:`Claim.write`.

    If the same thread already holds a claim on the same output, that claim is returned.

    Args:
        path: the output.
        run: a folder for work in progress, which is claimed too.
        earlier: if the folder holds a file of this name, it is an earlier output and may be replaced.

    Raises:
        OutputError: the folder is not empty, it cannot be written, or another process is writing it.
    """
    return _claim(Path(path), "folder", run, earlier)


def claim_file(path: str | os.PathLike[str], *, run: Path | None = None) -> AbstractContextManager[Claim]:
    """Claim an output file, which is replaced if it exists. Arguments and errors are those of :func:`claim_folder`."""
    return _claim(Path(path), "file", run)


def claim_work(path: str | os.PathLike[str]) -> AbstractContextManager[Claim]:
    """Claim a folder for work in progress, which may hold files of an earlier run. See :func:`claim_folder`."""
    return _claim(Path(path), "work")


def check_free(path: str | os.PathLike[str], *, earlier: str | None = None) -> None:
    """Raise OutputError if a folder is a file, or holds anything but an earlier output; see :func:`claim_folder`."""
    if os.path.isdir(path):
        names = set(os.listdir(path)) - {_INSIDE}
        if names and earlier is None:
            raise OutputError(f"{path}: exists and is not an empty folder; remove it or choose another output")
        if names and earlier not in names:
            raise OutputError(f"{path}: exists and holds other files, but no {earlier}; choose another output")
    elif os.path.exists(path):
        raise OutputError(f"{path}: exists and is not an empty folder but a file; remove it or choose another output")


def beside(output: Path, suffix: str) -> Path:
    """Return the path of ``output`` with ``suffix`` added to its name, also if the path ends in ``.`` or ``..``."""
    return Path(f"{output if output.name not in ('', '..') else os.path.realpath(output)}{suffix}")


def write_whole(file: Path, write: Callable[[Path], Any], *, durable: bool = True) -> None:
    """Write a file of a claimed folder beside its place, then rename it, so that it never has half of its content.

    Args:
        file: the file, which is replaced if it exists.
        write: called with the path to write. If it raises, nothing is left on the disk.
        durable: whether to wait until the bytes are on the disk. Otherwise a power failure may leave a damaged file.
    """
    part = file.with_name(f".{file.name}.partial")
    try:
        write(part)
        if durable:
            sync(part)
        part.replace(file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk. Some file systems cannot do this for folders, which is ignored."""
    fd = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError) if path.is_dir() else nullcontext():
            os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _claim(path: Path, kind: Kind, run: Path | None = None, earlier: str | None = None) -> Iterator[Claim]:
    with ExitStack() as stack:
        with _refusals(path):
            real = _resolve(path, kind)
            inside = kind == "work" or real.is_dir()
            place = real / _INSIDE if inside else real.with_name(f".{real.name}.partial")
            claim = _held.get(place)
            if claim is None or claim.thread != threading.get_ident():
                claim = _acquire(path, real, place, kind, earlier)
                stack.callback(_release, claim)
        if run is not None:
            stack.enter_context(claim_work(run))
        yield claim


def _acquire(path: Path, real: Path, place: Path, kind: Kind, earlier: str | None) -> Claim:
    if kind == "folder" and not (place / _FILLING).exists():  # if it exists, the folder is emptied first
        check_free(path, earlier=earlier)
    made = [folder for folder in (place.parent, *place.parent.parents) if not folder.exists()]
    with ExitStack() as undo:
        undo.callback(_remove_empty, made)
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock(path, place)
        claim = _held[place] = Claim(path, real, place, kind, earlier, lock, threading.get_ident(), made)
        undo.callback(_release, claim)
        filling = place / _FILLING
        if filling.exists():  # A dead owner has filled the output folder by half.
            for name in filling.read_text().splitlines():
                (real / name).unlink(missing_ok=True)
            filling.unlink()
        if kind == "folder":
            check_free(path, earlier=earlier)
        _remove_leftovers(claim)
        os.ftruncate(lock, 0)
        os.write(lock, f"pid {os.getpid()} on {socket.gethostname()}".encode())
        os.fsync(lock)  # A full disk fails here, before any work.
        undo.pop_all()
        return claim


def _release(claim: Claim) -> None:
    if _held.pop(claim.place, None) is None:  # in a forked child
        return
    if not claim.keep:
        with suppress(OSError):  # The next run removes what is left.
            _remove_leftovers(claim)
            (claim.place / _LOCK).unlink(missing_ok=True)
    os.close(claim.lock)
    _remove_empty([claim.place, *claim.made])


def _remove_leftovers(claim: Claim) -> None:
    for left in claim.place.iterdir():
        if left.name != _LOCK:
            _remove(left)


def _resolve(path: Path, kind: str) -> Path:
    """Return the absolute path without links, and refuse one that cannot be an output of this kind."""
    for part in (path, *path.parents):
        if part.is_symlink() and not part.exists():
            raise OutputError(
                f"{path}: {part} is a link to {os.readlink(part)}, which is not there; "
                "make that folder or choose another output"
            )
    real = Path(os.path.realpath(path))
    if kind != "work" and (size := len(os.fsencode(real.name))) > _LONGEST:
        raise OutputError(f"{path}: its name has {size} bytes, at most {_LONGEST} are allowed; choose a shorter output")
    if kind == "file" and real.exists() and not real.is_file():
        what = "folder" if real.is_dir() else "device or pipe"
        raise OutputError(f"{path}: is a {what}, and a file is to be written; give the name of a file as the output")
    if kind == "work" and real.exists() and not real.is_dir():
        raise OutputError(f"{path}: is a file where a folder for work in progress must be; choose another output")
    return real


def _lock(path: Path, place: Path) -> int:
    """Lock the claim's folder and return the file descriptor, which holds the lock as long as it is open."""
    if place.is_dir() and not (place / _LOCK).exists() and any(place.iterdir()):
        raise OutputError(f"{path}: {place} is in the way, with other files in it; remove it or choose another output")
    while True:
        place.mkdir(exist_ok=True)
        with suppress(FileNotFoundError), ExitStack() as stack:  # The previous owner has just removed folder or file.
            lock = os.open(place / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
            stack.callback(os.close, lock)
            _lock_or_refuse(path, place, lock)
            if os.path.samestat(os.stat(place / _LOCK), os.fstat(lock)):
                stack.pop_all()
                return lock


def _lock_or_refuse(path: Path, place: Path, lock: int) -> None:
    try:
        if place in _held:  # Another thread holds it, and on some network file systems the lock would not show that.
            raise BlockingIOError
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(lock, 300, 0).decode(errors="replace") or "a process that has just begun"
        raise OutputError(
            f"{path}: another run writes this output ({owner}); wait for it, end it, or choose another output"
        ) from None
    except OSError as error:
        logger.warning(
            f"{path}: its file system cannot lock files ({error.strerror}), so nothing keeps a second run from this "
            "output; start only one"
        )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """Turn errors of the file system into an OutputError for ``path``, with the cure."""
    try:
        yield
    except OSError as error:
        reason = f"{error.strerror}: {error.filename}"
        if error.errno in _NO_ROOM:
            why = f"its disk has no room ({error.strerror}); make room or choose another output"
        elif error.errno in _FORBIDDEN:
            why = f"you may not write there ({reason}); choose another output"
        elif error.errno in (errno.ENOTDIR, errno.EEXIST):
            file = next((folder for folder in path.parents if folder.exists() and not folder.is_dir()), error.filename)
            why = f"{file} is not a folder, so nothing can be written in it; choose another output"
        elif error.errno == errno.ENAMETOOLONG:
            why = "the path is too long; choose a shorter output"
        else:
            why = f"cannot be written ({reason}); choose another output"
        raise OutputError(f"{path}: {why}") from None
