"""Drafter folders made to do harm: refused in one line, with nothing else opened, written, run or filled.

The bulk is ``fuzz_checkpoint.py``; below it are the cases that it found, and what it cannot see.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import drafters
import fuzz_checkpoint
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_slimspec.drafters.checkpoint import DraftCheckpoint
from vllm_slimspec.drafters.config import flatten, is_low_rank, known_family
from vllm_slimspec.errors import CheckpointError
from vllm_slimspec.head.spec import HeadSpec, head_spec

HERE = Path(__file__).parent
CASES = 10_000


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=HERE, capture_output=True, text=True, timeout=600)


def test_mutated_folder_is_accepted_or_refused_without_harm(tmp_path):
    """Catches: a folder that crashes its reader, makes it hang or fills its memory, or makes it open or write anything
    else."""
    done = _python(
        "fuzz_checkpoint.py", "--cases", str(CASES), "--work", str(tmp_path / "w"), "--json", str(tmp_path / "j")
    )
    assert done.returncode == 0, done.stderr[-4000:]
    rows = json.loads((tmp_path / "j").read_text())["rows"]
    assert sum(row["accepted"] + row["refused"] for row in rows) == CASES
    assert sum(row["accepted"] for row in rows) > CASES / 50  # damage that does not matter is there too


@pytest.mark.parametrize(
    ("sabotage", "finding"),
    [
        (
            "place = files.check_place; "
            "files.check_place = lambda file: '/outside/' in __import__('os').path.realpath(file) or place(file)",
            "outside",
        ),
        ("files._check_size = lambda *a: None", "MiB of memory"),
        ("del errors.SlimSpecError.__init__", "not one readable line"),
        ("spec.positive_int = lambda c, k, w: c[k]", "Traceback"),
        ("checkpoint.is_low_rank = lambda c: exec('')", "compile"),
    ],
)
def test_fuzzer_notices_each_kind_of_harm(tmp_path, sabotage, finding):
    """Catches: a fuzzer that would not notice a file opened outside, too much memory, a traceback, or code that
    runs."""
    code = f"""
import pathlib, fuzz_checkpoint
from vllm_slimspec import errors
from vllm_slimspec.common import files
from vllm_slimspec.drafters import checkpoint
from vllm_slimspec.head import spec
warm = fuzz_checkpoint.Watch.__init__
def start(self, *a):
    warm(self, *a)
    {sabotage}
fuzz_checkpoint.Watch.__init__ = start
fuzz_checkpoint.run(pathlib.Path({str(tmp_path / "w")!r}), 0, 2000, None)
"""
    done = _python("-c", code)
    assert done.returncode == 1
    assert finding in done.stderr


def _config(tmp_path: Path, text: bytes) -> Path:
    folder = drafters.write(tmp_path / "drafter", {}, drafters.tensors())
    (folder / "config.json").write_bytes(text)
    return folder


def _with(**changes) -> bytes:
    return json.dumps(drafters.config() | changes).encode()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param(_with(num_hidden_layers=10**9), "missing", id="a list of a billion layers"),
        pytest.param(_with(eagle_config=["x"], lm_head_rank=4), "lm_head_rank", id="eagle_config is a list"),
        pytest.param(_with(vocab_size=2**63), "below 2**31", id="more tokens than ids"),
        pytest.param(_with(lm_head_quantization=[]), "not known", id="an unhashable name"),
        pytest.param(
            _with(speculators_config={}, transformer_layer_config={"model_type": {}}, model_type=None),
            "model_type",
            id="an unhashable model type",
        ),
        pytest.param(
            _with(lm_head_rank=32, lm_head_quantization="int8", lm_head_quantization_group=32.0),
            "lm_head_quantization_group=32.0",
            id="a group that is no integer",
        ),
        pytest.param(_with(lm_head_rank="\x1b[2J\nerror: none"), r"\x1b[2J\nerror", id="a terminal's commands"),
        pytest.param(_with(architectures=["A" * 900_000]), "allowed are", id="a message of a megabyte"),
        pytest.param(b"[" * 500_000, "not valid JSON", id="nested too deep"),
        pytest.param(b"[" + b"[]," * 500_000 + b"[]]", "bytes of JSON", id="JSON that grows twentyfold"),
        pytest.param(_with(lm_head_rank=float("nan")), "lm_head_rank=nan", id="NaN"),
        pytest.param(b"\xff\xfe" + _with(), "not valid JSON", id="not UTF-8"),
    ],
)
def test_hostile_config_is_refused_in_one_printable_line(tmp_path, text, words):
    """Catches: a config.json made to crash its reader, or to flood or control the terminal by the error message; the
    fuzzer found each of them."""
    with pytest.raises(CheckpointError) as error:
        DraftCheckpoint.open(_config(tmp_path, text))
    message = str(error.value)
    assert words in message
    assert message.isprintable()
    assert len(message) < 2000


@pytest.mark.parametrize(
    "name",
    [
        "../other/model.safetensors",
        "/etc/passwd",
        "..",
        "n" * 300 + ".safetensors",
        "\ud800.safetensors",
        "a\n.safetensors",
    ],
)
def test_index_with_a_path_or_an_impossible_name_is_refused(tmp_path, name):
    """Catches: an index that leads out of the folder, or an OSError for a name that no file can have."""
    folder = drafters.write(tmp_path / "d", drafters.config(), drafters.tensors())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="weight_map names"):
        DraftCheckpoint.open(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_link_out_of_the_folder_is_refused(tmp_path, name):
    """Catches: a file of somebody else read through a link in an unpacked archive."""
    folder = drafters.write(tmp_path / "d", drafters.config(), drafters.tensors())
    other = drafters.write(tmp_path / "other", drafters.config(), drafters.tensors())
    (other / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(other / name)
    with pytest.raises(CheckpointError, match="a link out of its folder"):
        DraftCheckpoint.open(folder)


def test_links_of_the_hub_cache_are_followed(tmp_path):
    """Catches: a drafter refused in the hub's cache, where every file is a link into the blobs."""
    stored = drafters.write(tmp_path / "models--a--b" / "blobs", drafters.config(), drafters.tensors())
    snapshot = tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for file in list(stored.iterdir()):
        blob = file.rename(stored / f"{file.name}-hash")
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    (tmp_path / "link").symlink_to(snapshot)
    assert DraftCheckpoint.open(snapshot).spec == DraftCheckpoint.open(tmp_path / "link").spec


def test_pipe_in_the_place_of_weights_is_refused(tmp_path):
    """Catches: a reader that waits forever for a named pipe."""
    folder = drafters.write(tmp_path / "d", drafters.config(), drafters.tensors())
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        DraftCheckpoint.open(folder)


LARGE = """
import json, os, struct, sys
from pathlib import Path
import drafters, torch
from fuzz_checkpoint import peak_memory
from safetensors.torch import save
from vllm_slimspec.drafters.checkpoint import DraftCheckpoint

folder, v, r = Path(sys.argv[1]), 1 << 20, 64
small = {n: t.bfloat16() if t.is_floating_point() else t for n, t in drafters.tensors(rank=r).items()}
del small["lm_head.up.weight"]
config = drafters.config(vocab_size=v, draft_vocab_size=v, lm_head_rank=r)
data = save(small)
size = struct.unpack("<Q", data[:8])[0]
header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
header["lm_head.up.weight"] = {"dtype": "BF16", "shape": [v, r], "data_offsets": [len(body), len(body) + 2 * v * r]}
text = json.dumps(header).encode()
folder.mkdir()
(folder / "config.json").write_text(json.dumps(config))
with (folder / "model.safetensors").open("wb") as file:
    file.write(struct.pack("<Q", len(text)) + text + body)
    file.truncate(file.tell() + 2 * v * r)
torch.set_num_threads(1)
before = peak_memory(reset=True)
DraftCheckpoint.open(folder).check_values()
print(peak_memory() - before, (folder / "model.safetensors").stat().st_size)
"""


def test_checking_a_large_head_copies_no_factor(tmp_path):
    """Catches: copies of the factors made just to check them, while the target fills the memory."""
    done = _python("-c", LARGE, str(tmp_path / "d"))
    assert done.returncode == 0, done.stderr
    grown, size = map(int, done.stdout.split())
    assert size > 128 << 20
    assert grown < 2 * size


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["int8", "target"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=500, deadline=None)
@given(changes=st.dictionaries(st.sampled_from([*fuzz_checkpoint.KEYS, "model_type"]), json_values, max_size=4))
def test_any_config_is_refused_or_gives_possible_sizes(changes):
    """Catches: a config.json that is accepted with a rank, a vocabulary or a number of candidates that cannot be."""
    config = drafters.config() | changes
    if not is_low_rank(config):
        return
    try:
        known_family(config, "config.json")
        spec: HeadSpec = head_spec(flatten(config))
    except CheckpointError:
        return
    assert 1 <= spec.rank <= spec.hidden_size
    assert 1 <= spec.draft_vocab_size <= spec.vocab_size
    assert 0 <= spec.frequent < spec.draft_vocab_size
    assert spec.rerank is None or 1 <= spec.rerank <= spec.tail
    assert spec.bytes(2) > 0
