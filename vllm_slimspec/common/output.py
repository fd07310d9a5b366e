"""The one place that decides where a command writes: claimed before any work, written whole or not at all.

A claim is a folder of its own: ``.NAME.partial`` beside an output that is a file or is not there yet, and
``.slimspec.partial`` inside a folder that is there (an empty one, the current one, a mount point). Its file ``lock``
names the owner, who holds a lock on it that ends with the process. What is written grows beside that file and takes its
place when it is whole. So two runs never share an output, only what a dead owner left behind is removed, and a place
that cannot be written is refused before hours of work instead of after them.
"""

import errno
import fcntl
import logging
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vllm_slimspec.errors import OutputError

logger = logging.getLogger(__name__)

_LONGEST = 230  # bytes of a name: file systems take 255, and what is written beside it has a longer one
_INSIDE = ".slimspec.partial"
_LOCK, _FILLING = "lock", "filling"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_FOLDER = (errno.ENOTDIR, errno.EEXIST)

Kind = Literal["folder", "file", "work"]


@dataclass
class Claim:
    """An output that this process, and no other one, may write."""

    path: Path  # as the user gave it
    real: Path  # without links, dots and dot-dots
    place: Path  # the folder of the claim
    kind: Kind
    earlier: str | None
    lock: int  # the descriptor that holds the lock
    thread: int
    made: list[Path]  # folders above the place that were made for it
    keep: bool = False  # whether the place outlives the claim, because a finished output is left in it

    def write(self, make: Callable[[Path], Any], *, last: str = "config.json") -> None:
        """Let ``make`` write a file, or fill an empty folder, that takes the output's place when it is whole.

        Args:
            make: called with the path to write: a folder that is there, or a file that is not.
            last: of a folder that is there already, the file that comes last: without it nothing is taken for whole.

        Raises:
            Exception: what ``make`` raises; nothing of the new output is left, so a full disk gets its room back.
            OutputError: the finished output cannot take its place; the message says where it is.
        """
        new = self.place / f"new{self.real.suffix}"
        try:
            make(new)
            for path in (*(new.rglob("*") if new.is_dir() else ()), new):
                sync(path)
        except BaseException:
            _remove(new)
            raise
        try:
            if self.kind == "folder":  # somebody may have filled it meanwhile
                check_free(self.path, earlier=self.earlier)
            self._publish(new, last)
        except (OSError, OutputError) as error:
            self.keep = True
            reason = error.strerror if isinstance(error, OSError) else error
            raise OutputError(
                f"{self.path}: the finished output cannot take this place ({reason}); it is kept in {new}, move it "
                "from there"
            ) from None

    def write_folder(self, fill: Callable[[Path], Any], *, last: str = "config.json") -> None:
        """Like :meth:`write`, for a folder: ``fill`` is called with a new, empty one."""

        def make(new: Path) -> None:
            new.mkdir()
            fill(new)

        self.write(make, last=last)

    def _publish(self, new: Path, last: str) -> None:
        if new.is_dir() and self.real.is_dir():
            # Not replaced by a rename: it may be a mount point, or the folder that somebody's shell is in.
            self._fill(sorted(new.iterdir(), key=lambda file: file.name == last))
        else:
            try:
                new.rename(self.real)
            except OSError as error:
                if new.is_dir() or error.errno not in (errno.EBUSY, errno.EXDEV):  # a single file may be mounted, too
                    raise
                shutil.copyfile(new, self.real)
        sync(self.real if self.real.is_dir() else self.real.parent)

    def _fill(self, files: list[Path]) -> None:
        """Move files into the folder, all of them or none."""
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
    """Leave the claims to the parent: a forked child that lives on must not keep its locks."""
    for claim in _held.values():
        os.close(claim.lock)
    _held.clear()


os.register_at_fork(after_in_child=_forget)


@contextmanager
def claim_folder(
    path: str | os.PathLike[str], *, run: Path | None = None, earlier: str | None = None
) -> Iterator[Claim]:
    """Claim a folder that is written once, by :meth:`Claim.write_folder`; it must not exist, or be empty.

    A claim inside a claim of the same thread on the same output is that claim.

    Args:
        path: the output.
        run: a folder beside it for work in progress, which is claimed too.
        earlier: a folder that holds a file of this name is an earlier output, which may be replaced.

    Raises:
        OutputError: the folder is taken, cannot be written, or another process writes it.
    """
    with ExitStack() as stack:
        claim = stack.enter_context(_claim(Path(path), "folder", earlier))
        if run is not None:
            stack.enter_context(claim_work(run))
        yield claim


@contextmanager
def claim_file(path: str | os.PathLike[str], *, run: Path | None = None) -> Iterator[Claim]:
    """Claim a file, which may exist and is then replaced; arguments and errors as for :func:`claim_folder`."""
    with ExitStack() as stack:
        claim = stack.enter_context(_claim(Path(path), "file"))
        if run is not None:
            stack.enter_context(claim_work(run))
        yield claim


@contextmanager
def claim_work(path: str | os.PathLike[str]) -> Iterator[Claim]:
    """Claim a folder that a later run goes on with, whatever is in it; errors as for :func:`claim_folder`."""
    with _claim(Path(path), "work") as claim:
        yield claim


def check_free(path: str | os.PathLike[str], *, earlier: str | None = None) -> None:
    """Refuse an output folder that exists and is not empty; nothing is written.

    Raises:
        OutputError: it is not empty, or it is a file.
    """
    if os.path.isdir(path):
        names = set(os.listdir(path)) - {_INSIDE}
        if names and earlier is None:
            raise OutputError(f"{path}: exists and is not an empty folder; remove it or choose another output")
        if names and earlier not in names:
            raise OutputError(f"{path}: exists and holds other files, but no {earlier}; choose another output")
    elif os.path.exists(path):
        raise OutputError(f"{path}: exists and is not an empty folder but a file; remove it or choose another output")


def beside(output: Path, suffix: str) -> Path:
    """The path of ``output`` with ``suffix`` behind its name, also where it ends in a dot or in two."""
    return Path(f"{output if output.name not in ('', '..') else os.path.realpath(output)}{suffix}")


def write_whole(file: Path, write: Callable[[Path], Any], *, durable: bool = True) -> None:
    """Let ``write`` write beside the file and rename, so that a name is there only with all its bytes.

    For files in a folder that is claimed.

    Args:
        file: the file, replaced if it is there.
        write: called with the path to write.
        durable: whether to wait until the bytes are on the disk; without it, a power failure may leave a torn file.

    Raises:
        Exception: what ``write`` raises; nothing is left behind, so a full disk gets its room back.
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
    """Wait until a file or folder is on the disk; some file systems know no waiting for folders, which is no error."""
    fd = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError) if path.is_dir() else nullcontext():
            os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _claim(path: Path, kind: Kind, earlier: str | None = None) -> Iterator[Claim]:
    with _refusals(path):
        real = _resolve(path, kind)
        inside = kind == "work" or real.is_dir()
        place = real / _INSIDE if inside else real.with_name(f".{real.name}.partial")
    claim = _held.get(place)
    if claim is not None and claim.thread == threading.get_ident():
        yield claim
        return
    with _refusals(path):
        claim = _acquire(path, real, place, kind, earlier)
    try:
        yield claim
    finally:
        _release(claim)


def _acquire(path: Path, real: Path, place: Path, kind: Kind, earlier: str | None) -> Claim:
    if kind == "folder" and not (place / _FILLING).exists():  # where it exists, half an output is in the folder
        check_free(path, earlier=earlier)
    made = [folder for folder in (place.parent, *place.parent.parents) if not folder.exists()]
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock(path, place)
    except BaseException:
        _remove_empty(made)
        raise
    claim = _held[place] = Claim(path, real, place, kind, earlier, lock, threading.get_ident(), made)
    try:
        _roll_back(claim)
        if kind == "folder":
            check_free(path, earlier=earlier)
        _remove_leftovers(claim)
        os.ftruncate(lock, 0)
        os.write(lock, f"pid {os.getpid()} on {socket.gethostname()}".encode())
        os.fsync(lock)  # a full disk says so now
    except BaseException:
        _release(claim)
        raise
    return claim


def _release(claim: Claim) -> None:
    if _held.pop(claim.place, None) is None:  # in a forked child
        return
    if not claim.keep:
        with suppress(OSError):  # what is left is removed by the next run
            _remove_leftovers(claim)
            (claim.place / _LOCK).unlink(missing_ok=True)
    os.close(claim.lock)
    _remove_empty([claim.place, *claim.made])


def _roll_back(claim: Claim) -> None:
    """Take half an output out of its folder again, which a dead owner left there."""
    filling = claim.place / _FILLING
    if filling.exists():
        for name in filling.read_text().splitlines():
            (claim.real / name).unlink(missing_ok=True)
        filling.unlink()


def _remove_leftovers(claim: Claim) -> None:
    for left in claim.place.iterdir():
        if left.name != _LOCK:
            _remove(left)


def _resolve(path: Path, kind: str) -> Path:
    """The path without links and dots."""
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
    """Lock the place; the descriptor that is returned holds the lock for as long as it is open."""
    if place.is_dir() and not (place / _LOCK).exists() and any(place.iterdir()):
        raise OutputError(f"{path}: {place} is in the way, with other files in it; remove it or choose another output")
    while True:
        place.mkdir(exist_ok=True)
        try:
            lock = os.open(place / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # the owner before has just gone, and its place with it
            continue
        try:
            _lock_or_refuse(path, place, lock)
        except OutputError:
            os.close(lock)
            raise
        if _is_there(place / _LOCK, lock):
            return lock
        os.close(lock)


def _lock_or_refuse(path: Path, place: Path, lock: int) -> None:
    try:
        if place in _held:  # by another thread, which some network file systems do not tell apart
            raise BlockingIOError
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(lock, 300, 0).decode(errors="replace") or "a process that has just begun"
        raise OutputError(
            f"{path}: another run writes this output ({owner}); wait for it, end it, or choose another output"
        ) from None
    except OSError as error:
        logger.warning(
            "%s: its file system cannot lock files (%s), so nothing keeps a second run from this output; start only "
            "one",
            path,
            error.strerror,
        )


def _is_there(file: Path, descriptor: int) -> bool:
    """Whether an open file still has its name: its owner before may have removed it."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.stat(file), os.fstat(descriptor))
    return False


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
    """Within it, an error of the file system refuses the output."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path}: {_why(error, path)}") from None


def _why(error: OSError, path: Path) -> str:
    """Why an output cannot be written, and the cure."""
    if error.errno in _NO_ROOM:
        return f"its disk has no room ({error.strerror}); make room or choose another output"
    if error.errno in _FORBIDDEN:
        return f"you may not write there ({error.strerror}: {error.filename}); choose another output"
    if error.errno in _NO_FOLDER:
        file = next((folder for folder in path.parents if folder.exists() and not folder.is_dir()), error.filename)
        return f"{file} is no folder, so nothing can be written in it; choose another output"
    if error.errno == errno.ENAMETOOLONG:
        return "the path is too long; choose a shorter output"
    return f"cannot be written ({error.strerror}: {error.filename}); choose another output"
