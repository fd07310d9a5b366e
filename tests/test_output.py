"""Outputs of commands: refused before any work or written whole, never over another run's output, and never half."""

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from vllm_slimspec.common import output
from vllm_slimspec.common.output import beside, check_free, claim_file, claim_folder, claim_work, write_whole
from vllm_slimspec.errors import OutputError

FILES = {"model.safetensors": "weights", "README.md": "card", "config.json": "{}"}


def fill(new: Path) -> None:
    for name, text in FILES.items():
        (new / name).write_text(text)


def contents(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.iterdir()}


def dot(work: Path) -> str:
    (work / "empty").mkdir()
    os.chdir(work / "empty")
    return "."


def dot_slash(work: Path) -> str:
    dot(work)
    return "./"


def empty_name(work: Path) -> str:
    dot(work)
    return ""


def dots(work: Path) -> str:
    (work / "empty" / "below").mkdir(parents=True)
    os.chdir(work / "empty")
    return "below/../below/x/../../out"


def new(work: Path) -> str:
    return str(work / "new")


def deep(work: Path) -> str:
    return str(work / "a" / "b" / "new")


def empty(work: Path) -> str:
    (work / "empty").mkdir()
    return str(work / "empty")


def link(work: Path) -> str:
    (work / "real").mkdir()
    (work / "link").symlink_to("real")
    return str(work / "link")


def through_a_link(work: Path) -> str:
    link(work)
    return str(work / "link" / "new")


def long_name(work: Path) -> str:
    return str(work / ("n" * 230))


WORK = [dot, dot_slash, empty_name, dots, new, deep, empty, link, through_a_link, long_name]


@pytest.mark.parametrize("place", WORK, ids=lambda place: place.__name__)
def test_output_folder_is_written_whole(place, tmp_path, monkeypatch):
    """Catches: a bare errno after hours of work, an output somewhere else, or anything left beside it or in it."""
    monkeypatch.chdir(tmp_path)
    path = place(tmp_path)
    real = Path(os.path.realpath(path))
    with claim_folder(path, run=beside(Path(path), ".run")) as claim:
        claim.write(fill)
    assert contents(real) == FILES
    left = {file for file in tmp_path.rglob("*") if not file.is_relative_to(real) and not file.is_symlink()}
    assert left == {folder for folder in real.parents if folder.is_relative_to(tmp_path) and folder != tmp_path} | {
        folder for folder in (tmp_path / "empty", tmp_path / "empty" / "below") if folder.exists() and folder != real
    }


@pytest.mark.parametrize("place", WORK, ids=lambda place: place.__name__)
def test_claimed_output_that_is_never_written_leaves_nothing(place, tmp_path, monkeypatch):
    """Catches: folders left behind by a run that was refused for another reason."""
    monkeypatch.chdir(tmp_path)
    path = place(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ZeroDivisionError), claim_folder(path, run=beside(Path(path), ".run")):
        raise ZeroDivisionError
    assert sorted(tmp_path.rglob("*")) == before


def full_folder(work: Path) -> str:
    (work / "full").mkdir()
    (work / "full" / "mine").write_text("mine")
    return str(work / "full")


def root(work: Path) -> str:
    return "/"


def a_file(work: Path) -> str:
    (work / "file").write_text("mine")
    return str(work / "file")


def below_a_file(work: Path) -> str:
    return f"{a_file(work)}/new"


def far_below_a_file(work: Path) -> str:
    return f"{a_file(work)}/a/b/new"


def link_to_nowhere(work: Path) -> str:
    (work / "link").symlink_to("nowhere")
    return str(work / "link")


def below_a_link_to_nowhere(work: Path) -> str:
    return f"{link_to_nowhere(work)}/new"


def link_to_itself(work: Path) -> str:
    (work / "link").symlink_to("link")
    return str(work / "link")


def too_long(work: Path) -> str:
    return str(work / ("n" * 231))


def far_too_long(work: Path) -> str:
    return str(work / ("n" * 300) / "new")


def device(work: Path) -> str:
    return "/dev/null"


def run_is_a_file(work: Path) -> str:
    (work / "new.run").write_text("mine")
    return str(work / "new")


REFUSED = [
    (full_folder, "exists and is not an empty folder; remove it or choose another output"),
    (root, "exists and is not an empty folder; remove it or choose another output"),
    (a_file, "exists and is not an empty folder but a file; remove it or choose another output"),
    (below_a_file, "file is not a folder, so nothing can be written in it; choose another output"),
    (far_below_a_file, "is not a folder, so nothing can be written in it; choose another output"),
    (link_to_nowhere, "is a link to nowhere, which is not there; make that folder or choose another output"),
    (below_a_link_to_nowhere, "link is a link to nowhere, which is not there; make that folder or choose another"),
    (link_to_itself, "is a link to link, which is not there"),
    (too_long, "its name has 231 bytes, at most 230 are allowed; choose a shorter output"),
    (far_too_long, "the path is too long; choose a shorter output"),
    (device, "exists and is not an empty folder but a file"),
    (run_is_a_file, "is a file where a folder for work in progress must be; choose another output"),
]


@pytest.mark.parametrize(("place", "message"), REFUSED, ids=lambda case: getattr(case, "__name__", ""))
def test_folder_that_cannot_be_written_is_refused_before_any_work(place, message, tmp_path):
    """Catches: hours of work for an output folder that cannot be written, or somebody else's files touched by the
    check."""
    path = place(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputError) as error, claim_folder(path, run=beside(Path(path), ".run")):
        pytest.fail("the work began")
    assert str(error.value).startswith(f"{path}")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (empty, "is a folder, and a file is to be written; give the name of a file as the output"),
        (device, "is a device or pipe, and a file is to be written; give the name of a file as the output"),
        (below_a_file, "is not a folder, so nothing can be written in it"),
        (link_to_nowhere, "is a link to nowhere, which is not there"),
        (too_long, "its name has 231 bytes"),
    ],
    ids=lambda case: getattr(case, "__name__", ""),
)
def test_file_that_cannot_be_written_is_refused_before_any_work(place, message, tmp_path):
    """Catches: hours of work for an output file that cannot be written, or a device replaced by a file."""
    path = place(tmp_path)
    with pytest.raises(OutputError, match=message), claim_file(path):
        pytest.fail("the work began")


@pytest.mark.parametrize("place", [new, deep, a_file, through_a_link, long_name], ids=lambda place: place.__name__)
def test_output_file_is_replaced_whole(place, tmp_path):
    """Catches: a file that is half the old one, or a folder left beside it."""
    path = Path(place(tmp_path))
    with claim_file(path) as claim:
        claim.write(lambda file: file.write_text("one"))
        with pytest.raises(ZeroDivisionError):
            claim.write(lambda file: (file.write_text("half"), 1 / 0))
        assert path.read_text() == "one"
        with claim_file(path) as again:
            again.write(lambda file: file.write_text("two"))
    assert path.read_text() == "two"
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_output_behind_a_link_is_written_through_the_link(tmp_path):
    """Catches: the link replaced by a file, so that its owner goes on reading the old results."""
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to("real.json")
    with claim_file(tmp_path / "link.json") as claim:
        claim.write(lambda file: file.write_text("new"))
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "real.json").read_text() == "new"


def test_mounted_file_is_written_in_place(tmp_path, monkeypatch):
    """Catches: a result lost because a container mounts its file, which no rename can replace."""
    (tmp_path / "f.json").write_text("old")
    with monkeypatch.context() as patched, claim_file(tmp_path / "f.json") as claim:
        patched.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError(errno.EBUSY, "busy")))
        claim.write(lambda file: file.write_text("new"))
    assert contents(tmp_path) == {"f.json": "new"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EIO])
def test_full_or_read_only_disk_is_refused_in_one_line_before_the_work(number, tmp_path, monkeypatch):
    """Catches: a full or read-only disk discovered only after the work, or reported as a bare errno."""

    def refuse(path, *_, **__):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OutputError, match="choose another output") as error, claim_folder(tmp_path / "new"):
        pytest.fail("the work began")
    assert os.strerror(number) in str(error.value)
    assert "Errno" not in str(error.value)


@pytest.mark.parametrize("name", ["d", "d/new", "d/a/new"])
def test_folder_without_write_permission_is_refused(name, tmp_path):
    """Catches: a folder that may not be written, discovered only after the work."""
    (tmp_path / "d").mkdir(mode=0o555)
    child = os.fork()
    if child == 0:
        message = "the work began"
        try:
            if os.getuid() == 0:  # whom no permission stops
                os.setuid(65534)
            with claim_folder(tmp_path / name):
                pass
        except OutputError as error:
            message = str(error)
        os._exit(0 if "you may not write there (Permission denied: " in message else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_folder_that_cannot_be_synced_is_written(tmp_path, monkeypatch):
    """Catches: a finished output called lost on a network file system that cannot sync folders."""
    original = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with claim_folder(tmp_path / "d") as claim:
        claim.write(fill)
    assert contents(tmp_path / "d") == FILES


def test_disk_without_room_for_a_byte_is_refused(tmp_path, monkeypatch):
    """Catches: a disk that has room for names but not for bytes, discovered only after the work."""

    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", refuse)
    with pytest.raises(OutputError, match="its disk has no room"), claim_folder(tmp_path / "new"):
        pytest.fail("the work began")
    assert not list(tmp_path.iterdir())


def test_result_is_kept_apart_when_the_output_was_filled_meanwhile(tmp_path):
    """Catches: hours of work lost, or somebody's files overwritten, because the output was created during the run."""
    with claim_folder(tmp_path / "d") as claim:
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / "config.json").write_text("mine")
        with pytest.raises(OutputError, match=r"it is kept in .*, move it from there"):
            claim.write(fill)
    assert contents(tmp_path / "d") == {"config.json": "mine"}
    (kept,) = (tmp_path / ".d.partial").glob("new*")
    assert contents(kept) == FILES


OTHER = """
import sys, pathlib
from vllm_slimspec.common import output
with getattr(output, sys.argv[1])(sys.argv[2]) as claim:
    (claim.place / "new").mkdir()
    (claim.place / "new" / "model.safetensors").write_text("of the living")
    print("claimed", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """Start another process that claims an output, and works on it until it is told to end or is killed."""
    started = []

    def start(kind: str, path: str) -> subprocess.Popen:
        command = [sys.executable, "-c", OTHER, kind, path]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path)
        started.append(process)
        assert process.stdout.readline() == b"claimed\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_result_kept_apart_survives_the_next_run(tmp_path):
    """Catches: a finished result that was kept apart, removed by the next run although that is refused as well."""
    with claim_folder(tmp_path / "d") as claim:
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / "mine").write_text("mine")
        with pytest.raises(OutputError, match="it is kept in"):
            claim.write(fill)
    with pytest.raises(OutputError, match="not an empty folder"), claim_folder(tmp_path / "d"):
        pytest.fail("the work began")
    assert contents(next((tmp_path / ".d.partial").glob("new*"))) == FILES


def test_result_stays_whole_when_moving_it_fails(tmp_path, monkeypatch):
    """Catches: half of the files in the output and half elsewhere, or a next run that removes both."""
    replace = Path.replace

    def fail(file, target):
        if file.name == "config.json" and Path(target).parent == tmp_path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return replace(file, target)

    with claim_folder(tmp_path) as claim, monkeypatch.context() as patched:
        patched.setattr(Path, "replace", fail)
        with pytest.raises(OutputError, match=r"Input/output error\); it is kept in"):
            claim.write(fill)
    (kept,) = (tmp_path / ".slimspec.partial").glob("new*")
    assert contents(kept) == FILES
    assert [file.name for file in tmp_path.iterdir()] == [".slimspec.partial"]


def test_foreign_folder_with_the_name_of_a_claim_is_left_alone(tmp_path):
    """Catches: somebody's folder removed as the leftovers of a dead run, because of its name."""
    (tmp_path / ".d.partial").mkdir()
    (tmp_path / ".d.partial" / "thesis.tex").write_text("mine")
    with (
        pytest.raises(OutputError, match=r"\.d\.partial is in the way, with other files in it"),
        claim_folder(tmp_path / "d"),
    ):
        pytest.fail("the work began")
    assert contents(tmp_path / ".d.partial") == {"thesis.tex": "mine"}


def test_leftovers_of_a_dead_run_are_removed_before_the_disk_is_checked(other, tmp_path, monkeypatch):
    """Catches: a disk that a dead run filled, which the next run calls full instead of clearing it."""
    process = other("claim_folder", "out")
    process.kill()
    process.wait()
    write, seen = os.write, []

    def judge(*arguments):
        seen.append([file.name for file in (tmp_path / ".out.partial").iterdir()])
        return write(*arguments)

    monkeypatch.setattr(os, "write", judge)
    with claim_folder(tmp_path / "out"):
        pass
    assert seen[0] == ["lock"]


@pytest.mark.parametrize("kind", ["claim_folder", "claim_file", "claim_work"])
def test_second_run_of_one_output_is_refused(kind, other, tmp_path, monkeypatch):
    """Catches: two runs that write one output, under one spelling of its name or two."""
    (tmp_path / "link").symlink_to(tmp_path)
    process = other(kind, "out")
    place = next(tmp_path.rglob("*.partial"))
    monkeypatch.chdir(tmp_path)
    for spelled in ("out", f"{tmp_path}/out", "link/out", "x/../out"):
        message = rf"^{spelled}: another run writes this output \(pid {process.pid} on .+\); wait for it, end it, or"
        with pytest.raises(OutputError, match=message), getattr(output, kind)(spelled):
            pytest.fail("the work began")
    assert (place / "new" / "model.safetensors").read_text() == "of the living"
    process.communicate()
    with getattr(output, kind)("out"):
        pass


@pytest.mark.parametrize("kind", ["claim_folder", "claim_file", "claim_work"])
def test_output_of_a_killed_run_can_be_claimed_again(kind, other, tmp_path, injected):
    """Catches: an output that nobody can write any more after a kill, or gigabytes of a dead run left on the disk."""
    process = other(kind, "out")
    process.kill()
    process.wait()
    with getattr(output, kind)(tmp_path / "out") as claim:
        assert [file.name for file in claim.place.iterdir()] == ["lock"]
    assert not list(tmp_path.rglob("*.partial"))
    injected("the owner of an output killed", 1)


def test_unfinished_output_of_a_longer_name_is_left_alone(other, tmp_path):
    """Catches: a run that removes the unfinished work of another one whose name begins like its own."""
    other("claim_folder", "llama-3.1-8b-slim")
    for name in ("llama-3", "llama-3.1-8b-slim.safetensors", "lama-3.1-8b-slim", ".llama-3.1-8b-slim"):
        with claim_folder(tmp_path / name) as claim:
            claim.write(fill)
    found = tmp_path / ".llama-3.1-8b-slim.partial" / "new" / "model.safetensors"
    assert found.read_text() == "of the living"


def test_output_claimed_by_another_thread_is_refused(tmp_path):
    """Catches: two threads that write one output, because a file lock belongs to the whole process."""
    seen = []

    def work():
        try:
            with claim_folder(tmp_path / "d"):
                seen.append("claimed")
        except OutputError as error:
            seen.append(str(error))

    with claim_folder(tmp_path / "d"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert f"pid {os.getpid()} on" in seen[0]


def test_forked_child_does_not_keep_the_output_claimed(tmp_path):
    """Catches: a data loader's worker that outlives its parent and keeps the output locked, or removes the parent's
    work."""
    with claim_folder(tmp_path / "d") as claim:
        child = os.fork()
        if child == 0:
            os._exit(1 if output._held else 0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        claim.write(fill)
    assert contents(tmp_path / "d") == FILES


def test_file_system_without_locks_only_warns(tmp_path, monkeypatch, caplog):
    """Catches: an output refused on a network file system only because that cannot lock files."""

    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(output.fcntl, "flock", refuse)
    with claim_folder(tmp_path / "d") as claim:
        claim.write(fill)
    assert contents(tmp_path / "d") == FILES
    assert "cannot lock files (No locks available)" in caplog.text


KILLED = """
import os, signal, sys
from pathlib import Path
from vllm_slimspec.common import output
points = 0
def watched(original):
    def call(*arguments, **options):
        global points
        points += 1
        if points == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)
    return call
for name in ("replace", "rename", "write_text", "unlink", "mkdir"):
    setattr(Path, name, watched(getattr(Path, name)))
os.fsync = watched(os.fsync)
def fill(new):
    for name in ("model.safetensors", "README.md", "config.json"):
        (new / name).write_text(name)
os.chdir(sys.argv[1])
with output.claim_folder(".") as claim:
    claim.write(fill)
"""


def test_mounted_folder_of_a_killed_run_is_no_drafter_until_it_is_whole(tmp_path, injected):
    """Catches: half a drafter in a folder that no rename can replace, or a second run that fails over that half."""
    point, code = 0, -signal.SIGKILL
    while code == -signal.SIGKILL:
        point += 1
        folder = tmp_path / str(point)
        folder.mkdir()
        code = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(point)]).returncode
        names = {file.name for file in folder.iterdir()}
        assert "config.json" not in names or {"model.safetensors", "README.md"} <= names
        if "config.json" not in names:
            check_free(folder / "x")
            subprocess.run([sys.executable, "-c", KILLED, str(folder), "-1"], check=True)
        assert {file.name for file in folder.iterdir()} - {".slimspec.partial"} == set(FILES)
        shutil.rmtree(folder)
    assert code == 0
    assert point > 12
    injected("writing into a mounted folder killed", point)


def test_earlier_report_is_replaced_and_other_files_are_not(tmp_path):
    """Catches: a report that cannot be made twice in one folder, or one that is written over other files."""
    (tmp_path / "config.json").write_text("mine")
    with pytest.raises(OutputError, match=r"holds other files, but no report\.md"):
        check_free(tmp_path, earlier="report.md")
    (tmp_path / "report.md").write_text("old")
    with claim_folder(tmp_path, earlier="report.md") as claim:
        claim.write(lambda new: (new / "report.md").write_text("new"), last="report.md")
    assert contents(tmp_path) == {"config.json": "mine", "report.md": "new"}


def test_work_folder_of_an_earlier_run_is_kept(tmp_path):
    """Catches: the work folder of an earlier run emptied, or refused because it is not empty."""
    (tmp_path / "states").write_text("kept")
    with claim_work(tmp_path) as claim:
        claim.write(lambda new: (new / "more").write_text("new"), last="more")
    assert contents(tmp_path) == {"states": "kept", "more": "new"}


@pytest.mark.parametrize("durable", [True, False])
def test_failed_write_removes_its_temporary_file(durable, tmp_path):
    """Catches: half a file under its final name, or one that still fills the full disk."""
    write_whole(tmp_path / "f", lambda part: part.write_text("one"), durable=durable)
    with pytest.raises(ZeroDivisionError):
        write_whole(tmp_path / "f", lambda part: (part.write_text("half"), 1 / 0), durable=durable)
    assert contents(tmp_path) == {"f": "one"}
