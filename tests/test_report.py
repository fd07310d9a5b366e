"""``slimspec report``: whatever was measured becomes one page that needs nothing else and says what it lacks."""

import base64
import re
import sys
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from vllm_slimspec import cli
from vllm_slimspec.errors import CheckpointError, OutputError
from vllm_slimspec.measure.report import KINDS, read, write_report
from vllm_slimspec.measure.results import (
    AcceptanceResults,
    AcceptanceRow,
    HeadResults,
    HeadRow,
    ServeResults,
    ServeRow,
    StatesResults,
    StatesRow,
)

ROOT = Path(__file__).parent.parent
SHAPE, HIDDEN, VOCAB = "llama-3.2-1b", 2048, 128256
COMMON = {"command": "slimspec bench x", "time": datetime(2026, 1, 2, tzinfo=UTC), "versions": {"vllm": "0"}}


def heads(device="one CPU"):
    rows = [
        HeadRow(
            head=head,
            shape=SHAPE,
            batch=batch,
            dtype="bfloat16",
            p20_us=us,
            p50_us=us * batch,
            p80_us=us,
            bytes=1,
            percent_of_copy_bandwidth=1,
        )
        for head, us in (("full", 30e3), ("trim-32k", 8e3), ("low-rank", 4e3))
        for batch in (1, 8)
    ]
    return HeadResults(**COMMON, device=device, threads=2, repeats=3, copy_gb_s=1, read_gb_s=1, rows=rows)


def acceptances(device="one CPU", hidden_size=HIDDEN, **accepted):
    """Ten cycles for each of four prompts; ``accepted``: drafts of each prompt, by head."""
    rows = [
        AcceptanceRow(
            head=head.replace("_", "-"),
            prompt_set="held-out",
            temperature=0,
            num_speculative_tokens=3,
            rank=None,
            draft_vocab_size=VOCAB,
            rerank=None,
            head_bytes=1,
            dense_bytes=1,
            length=1 + sum(drafts) / 40,
            low=1,
            high=4,
            per_position=[0.5, 0.3, 0.1],
            cycles=[10] * 4,
            accepted=drafts,
            tokens=99,
            equal=4,
            near_ties=0,
            largest_gap=0,
        )
        for head, drafts in accepted.items()
    ]
    return AcceptanceResults(
        **COMMON,
        device=device,
        target="the-target",
        hidden_size=hidden_size,
        vocab_size=VOCAB,
        dtype="float32",
        max_tokens=32,
        rows=rows,
    )


def serving():
    rows = [
        ServeRow(
            head=head,
            concurrency=n,
            completed=8,
            failed=0,
            output_tokens=99,
            duration_s=1,
            tokens_per_s=speed * n,
            ttft_ms_p50=1,
            ttft_ms_p80=2,
            itl_ms_p50=3,
            itl_ms_p80=4,
            tpot_ms_p50=1e3 / speed,
            tpot_ms_p80=6,
            length=None if head == "none" else 2.0,
        )
        for head, speed in (("none", 10), ("low-rank", 17))
        for n in (1, 4)
    ]
    return ServeResults(
        **COMMON,
        device="one CPU",
        target="the-target",
        hidden_size=HIDDEN,
        vocab_size=VOCAB,
        prompt_set="held-out",
        num_speculative_tokens=3,
        max_tokens=32,
        rows=rows,
    )


def states():
    row = {"rank": None, "draft_vocab_size": VOCAB, "rerank": None, "dense_bytes": 9, "alpha": [0.5, 0.4]}
    row |= {"per_position": [0.6, 0.4], "cycles": [1, 1], "accepted": [1, 1], "num_speculative_tokens": 2}
    heads = {"full": (9_000_000, 2.0, None), "low-rank": (1_000_000, 1.9, 0.9)}
    return StatesResults(
        **COMMON,
        device="one CPU",
        target="t",
        hidden_size=128,
        vocab_size=VOCAB,
        max_tokens=9,
        rows=[
            StatesRow(
                head=head,
                prompt_set=prompt_set,
                head_bytes=size,
                length=length,
                low=length - 0.1,
                high=length + 0.1,
                accepted_of_full=share,
                accepted_of_full_low=share,
                accepted_of_full_high=share,
                **row,
            )
            for prompt_set in ("one", "all sets")
            for head, (size, length, share) in heads.items()
        ],
    )


class Page(HTMLParser):
    """What a page asks for, and what it says to those who do not see."""

    VOID = frozenset({"meta", "link", "img", "br", "hr", "input", "path", "use", "rect"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag, f"</{tag}> closes another element"

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


MADE = {
    "head": heads,
    "acceptance": lambda: acceptances(full=[20] * 4, low_rank=[18] * 4),
    "states": states,
    "serve": serving,
}


def sections(kind, results):
    return list(KINDS[kind][1](results))


def charts(text):
    """Return the charts of a page as SVG text."""
    start = "data:image/svg+xml;base64,"
    sources = [attrs["src"] for attrs in Page(text).all("img")]
    assert all(source.startswith(start) for source in sources)
    return [base64.b64decode(source.removeprefix(start)).decode() for source in sources]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A report of every kind of file, and of two kinds that it does not show."""
    folder = tmp_path_factory.mktemp("report")
    for name, make in MADE.items():
        make().write(folder / f"{name}.json")
    files = [folder / f"{name}.json" for name in MADE]
    others = [ROOT / "docs/results/convert-8b.json", ROOT / "docs/results/cycle-cpu.json"]
    left_out = write_report([*files, *others], folder / "report")
    assert left_out == [(others[0], "convert-real-size"), (others[1], "cycle")]
    return folder / "report"


def test_the_page_needs_nothing_else(written):
    """Catches: an address to load from, a script, a picture or style outside the page, a second file."""
    assert [file.name for file in written.iterdir()] == ["index.html"]
    text = (written / "index.html").read_text()
    page = Page(text)
    assert page.open == []
    assert not re.search(r"(https?:)?//|@import|url\(", re.sub(r'src="data:[^"]*"', "", text))
    assert not page.all("script")
    assert not page.all("link")
    for chart in charts(text):
        assert "<script" not in chart
        assert not re.search(r'href="(?!#)|@import|url\((?!#)', chart)


def test_page_has_words_for_charts_and_fits_a_phone(written):
    """Catches: charts without words, a page that a phone shows as a desk's, a dark page with dark charts."""
    text = (written / "index.html").read_text()
    page = Page(text)
    assert len(page.all("img")) == len(page.all("table")) == len(MADE)
    assert all(len(attrs["alt"] or "") > 40 for attrs in page.all("img"))
    assert all(attrs["tabindex"] == "0" for attrs in page.all("div"))  # tables are scrolled by keyboard
    assert page.all("html")[0]["lang"] == "en"
    metas = {attrs.get("name"): attrs.get("content") for attrs in page.all("meta")}
    assert metas["viewport"] == "width=device-width, initial-scale=1"
    assert metas["color-scheme"] == "light"


def test_every_table_says_where_it_comes_from(written):
    """Catches: numbers without the command, the versions and the device that they were measured with."""
    text = (written / "index.html").read_text()
    parts = re.findall(r"<section>.*?</section>", text, re.S)
    assert len(parts) == len(MADE)
    for part, name in zip(parts, MADE, strict=True):
        assert f"{name}.json, written by <code>slimspec bench x</code> on one CPU, 2026-01-02 00:00, vllm 0." in part
    assert "convert-8b.json (convert-real-size)" in text


HOSTILE = "</td><script>alert('$x^$')</script>\n\x00&amp;"


def test_nothing_in_a_file_becomes_markup(tmp_path):
    """Catches: a name that ends its element, that is read as a formula, or that makes its chart no XML."""
    made = {name: make() for name, make in MADE.items()}
    for results in made.values():
        results.device = results.command = HOSTILE
        results.versions = {HOSTILE: HOSTILE}
        results.rows[-1].head = HOSTILE
    made["head"].rows[-1].shape = made["head"].rows[0].shape
    for name in ("acceptance", "states", "serve"):
        made[name].target = HOSTILE
    for row in (*made["acceptance"].rows, *made["states"].rows):
        row.prompt_set = HOSTILE
    made["serve"].prompt_set = made["serve"].acceptance = HOSTILE
    for name, results in made.items():
        results.write(tmp_path / f"{name}.json")
    (tmp_path / "odd.json").write_text('{"kind": "<script>\\ud800"}')
    write_report([tmp_path / f"{name}.json" for name in (*made, "odd")], tmp_path / "report")
    text = (tmp_path / "report/index.html").read_text()
    page = Page(text)
    assert page.open == []
    assert not page.all("script")
    drawn = charts(text)
    assert len(drawn) == len(MADE)
    for chart in drawn:
        assert "script" not in {node.tag.rpartition("}")[2] for node in ElementTree.fromstring(chart).iter()}


def test_what_the_project_measured_can_be_reported():
    """Catches: a result in docs/results over which `slimspec report docs/results/*.json` stumbles."""
    devices, left_out = read(sorted((ROOT / "docs/results").glob("*.json")), mixed_devices=True)
    assert {"head", "acceptance"} <= {source.results.kind for sources in devices.values() for source in sources}
    assert {"demo", "cycle"} <= {kind for _, kind in left_out}


def test_devices_are_not_mixed_by_accident(tmp_path):
    """Catches: a GPU's head beside a CPU's server on one page, without a word."""
    heads().write(tmp_path / "one.json")
    heads(device="another GPU").write(tmp_path / "two.json")
    files = [tmp_path / "one.json", tmp_path / "two.json"]
    with pytest.raises(CheckpointError, match=r"one\.json was measured on 'one CPU' and .*two\.json on 'another GPU'"):
        write_report(files, tmp_path / "report")
    assert not (tmp_path / "report").exists()
    write_report(files, tmp_path / "report", mixed_devices=True)
    page = (tmp_path / "report/index.html").read_text()
    first, second = page.index("Measured on one CPU"), page.index("Measured on another GPU")
    assert first < page.index("one.json") < second < page.index("two.json")


def test_heads_are_compared_with_the_full_one():
    """Catches: the ratio upside down, or of two batches; a missing head as a zero; no table without a full head."""
    results = heads()
    results.rows.pop()
    (section,) = sections("head", results)
    assert section.columns == ["head", "MB read", "ms at batch 1", "times faster", "ms at batch 8", "times faster"]
    assert section.rows[-1] == ["low-rank", "0.0", "4.00", "7.50x", "", ""]
    results.rows = [row for row in results.rows if row.head != "full"]
    (section,) = sections("head", results)
    assert section.picture is None
    assert section.rows[0] == ["trim-32k", "0.0", "8.00", "", "64.00", ""]


def test_acceptance_is_compared_on_the_same_prompts():
    """Catches: an interval as wide as those of two separate sets of prompts, which cancel here; a ratio to the head
    of other prompts, or of other counts."""
    ours = acceptances(full=[0, 10, 20, 30], low_rank=[0, 10, 20, 30])
    (section,) = sections("acceptance", ours)
    assert section.columns[3] == "of full (95%)"
    assert [cells[3] for cells in section.rows] == ["", "1.000 (1.00-1.00)"]
    assert "Every greedy answer is the target's own" in section.words[-1]
    ours.rows[1].equal = 3
    (section,) = sections("acceptance", ours)
    assert section.rows[1][-1] == "3 of 4"
    assert len(section.words) == 1
    ours.rows[1].cycles = [10] * 3
    (section,) = sections("acceptance", ours)
    assert "of full (95%)" not in section.columns
    ours = acceptances(full=[20] * 4, low_rank=[18] * 4)
    ours.rows[1].prompt_set = "others"
    (section,) = sections("acceptance", ours)
    assert "of full (95%)" not in section.columns


def test_states_show_all_sets_together():
    """Catches: heads of one prompt set beside those of another in one chart."""
    (section,) = sections("states", states())
    assert "(prompts: all sets)" in section.words[0]
    assert [cells[:2] for cells in section.rows] == [["full", "9"], ["low-rank", "1"]]
    assert section.rows[1][3] == "90.0% (90.0%-90.0%)"


def test_servers_that_failed_are_seen():
    """Catches: throughput of a server that refused requests, or of acceptance that it did not have itself."""
    served = serving()
    (section,) = sections("serve", served)
    assert section.columns[-1] == "acceptance length"
    served.rows[2].failed = 3
    served.acceptance = "some-model"
    (section,) = sections("serve", served)
    assert [cells[-1] for cells in section.rows] == ["", "", "3", ""]
    assert "that was measured with some-model" in section.words[-1]


@pytest.mark.parametrize("kind", MADE)
def test_report_shows_each_kind_of_result_alone(kind, tmp_path):
    """Catches: a page that needs two kinds of file."""
    MADE[kind]().write(tmp_path / "a.json")
    assert write_report([tmp_path / "a.json"], tmp_path / "report") == []
    assert len(Page((tmp_path / "report/index.html").read_text()).all("table")) == 1


def _nothing(results):
    results.rows = []


def _no_time(results):
    results.rows[1].p50_us = 0


def _endless(results):
    results.rows[1].bytes = 10**400


def _no_alpha(results):
    results.rows[2].alpha = []


@pytest.mark.parametrize(
    ("kind", "spoil", "message"),
    [
        ("head", _nothing, "a.json: holds no rows; measure again"),
        ("head", _no_time, "a.json: rows.1.p50_us is 0.0, which no measurement gives; measure again"),
        ("head", _endless, "a.json: rows.1.bytes is 1000"),
        ("states", _no_alpha, "a.json: holds numbers that cannot be shown (division by zero); measure again"),
    ],
)
def test_report_refuses_impossible_numbers_in_one_line(kind, spoil, message, tmp_path, monkeypatch):
    """Catches: a traceback for a file that holds what its format allows and no measurement gives."""
    monkeypatch.chdir(tmp_path)
    results = MADE[kind]()
    spoil(results)
    results.write(Path("a.json"))
    for output in ("report", "head.png")[: 2 if kind == "head" else 1]:
        run = CliRunner().invoke(cli.app, ["report", "a.json", "--output-path", output])
        assert run.exit_code == 1
        assert f"error: {message}" in run.output
        assert run.output.count("\n") == 1
        assert not Path(output).exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["nowhere.json"], "nowhere.json: no such file"),
        (["text.json"], "text.json: not what a `slimspec bench` command writes"),
        (["deep.json"], "deep.json: not what a `slimspec bench` command writes"),
        (["old.json"], "old.json: not what this version writes as 'head' (threads: Field required)"),
        (["other.json"], "nothing to report in other.json (convert)"),
    ],
)
def test_report_refuses_bad_files_and_writes_nothing(files, message, tmp_path, monkeypatch):
    """Catches: a traceback, or half a report."""
    monkeypatch.chdir(tmp_path)
    Path("text.json").write_text("hello")
    Path("old.json").write_text(heads().model_dump_json(by_alias=True, exclude={"threads"}))
    Path("deep.json").write_text("[" * 100_000)
    Path("other.json").write_text('{"kind": "convert"}')
    run = CliRunner().invoke(cli.app, ["report", *files, "--output-path", "report"])
    assert run.exit_code == 1
    assert message in run.output
    assert not Path("report").exists()


def test_nobody_elses_folder_is_replaced(tmp_path):
    """Catches: --output-path . and the work in it is gone, or somebody's web page is."""
    heads().write(tmp_path / "head.json")
    with pytest.raises(OutputError, match=r"exists and holds other files, but no index\.html"):
        write_report([tmp_path / "head.json"], tmp_path)
    (tmp_path / "site").mkdir()
    (tmp_path / "site/index.html").write_text("<h1>My cats</h1>")
    with pytest.raises(OutputError, match=r"index\.html: was not written by this `slimspec report`"):
        write_report([tmp_path / "head.json"], tmp_path / "site")
    assert (tmp_path / "site/index.html").read_text() == "<h1>My cats</h1>"
    assert (tmp_path / "head.json").is_file()
    for _ in range(2):  # its own earlier one is
        write_report([tmp_path / "head.json"], tmp_path / "report")


@pytest.mark.parametrize(("name", "start"), [("head.png", b"\x89PNG"), ("head.svg", b"<?xml")])
def test_head_times_as_one_picture(name, start, tmp_path):
    """Catches: the command that makes the README's picture, broken."""
    arguments = ["report", str(ROOT / "docs/results/head-cpu.json"), "--output-path", str(tmp_path / name)]
    run = CliRunner().invoke(cli.app, arguments)
    assert run.exit_code == 0, run.output
    assert (tmp_path / name).read_bytes().startswith(start)
    run = CliRunner().invoke(cli.app, [*arguments, "--batch", "3"])
    assert run.exit_code == 1
    assert "no head 'full' for llama-3.2-1b at batch 3" in run.output


def test_report_names_the_extra_that_is_missing(tmp_path, monkeypatch):
    """Catches: a traceback, or an error without its cure, where the extra was not installed."""
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.delitem(sys.modules, "vllm_slimspec.measure.report", raising=False)
    arguments = ["report", str(ROOT / "docs/results/head-cpu.json"), "--output-path", str(tmp_path / "report")]
    run = CliRunner().invoke(cli.app, arguments)
    assert run.exit_code == 1
    assert "pip install 'vllm-slimspec[bench]'" in run.output
