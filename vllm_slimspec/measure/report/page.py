"""A report as one HTML page that needs nothing else, and as Markdown with its pictures beside it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_slimspec.common.output import claim_folder
from vllm_slimspec.common.theme import INLINE, LIGHT, css, drawing, inline_svg, save_png
from vllm_slimspec.measure.report.material import LeftOut, Material, read
from vllm_slimspec.measure.report.sections import Chapter, Table, chapter

TITLE = "Draft heads, side by side"


def write_report(paths: Sequence[Path], output: Path, *, mixed_devices: bool = False) -> list[LeftOut]:
    """Write ``index.html``, ``report.md`` and its PNGs into a folder, all of them or none.

    Args:
        paths: what the measuring commands wrote with --json.
        output: the folder; the files of an earlier report in it are replaced.
        mixed_devices: report each device for itself, where there are several.

    Returns:
        the files that there is no figure for.

    Raises:
        ValueError: a file is not one of results, or two are of different devices.
        OutputError: ``output`` holds something else, or cannot be written.
    """
    groups, left_out = read(paths, mixed_devices=mixed_devices)
    with claim_folder(output, earlier="report.md") as claim:
        chapters = [chapter(group, f"{i}-" if len(groups) > 1 else "") for i, group in enumerate(groups)]

        def fill(new: Path) -> None:
            for section in (section for made in chapters for section in made.sections):
                with drawing(LIGHT):
                    save_png(section.draw(LIGHT), new / f"{section.name}.png")
            (new / "index.html").write_text(_html(groups, chapters, left_out), encoding="utf-8")
            (new / "report.md").write_text(_markdown(groups, chapters, left_out), encoding="utf-8")

        claim.write_folder(fill, last="index.html")
    return left_out


def _html(groups: Sequence[Material], chapters: Sequence[Chapter], left_out: Sequence[LeftOut]) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("vllm_slimspec.measure.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pictures = {}
    for section in (section for made in chapters for section in made.sections):
        with drawing(INLINE):
            pictures[section.name] = inline_svg(section.draw(INLINE), section.name, section.alternative)
    return environment.get_template("page.html.jinja").render(
        title=TITLE,
        light=css(dark=False),
        dark=css(dark=True),
        chapters=chapters,
        pictures=pictures,
        provenance=_provenance(groups),
        left_out=left_out,
    )


def _markdown(groups: Sequence[Material], chapters: Sequence[Chapter], left_out: Sequence[LeftOut]) -> str:
    lines = [f"# {TITLE}", ""]
    for made in chapters:
        lines += [f"On {made.device}.", ""]
        lines += [f"- **{tile.value}** {tile.label}" for tile in made.tiles] + [""]
        for section in made.sections:
            lines += [f"## {section.title}", "", *_paragraphs(section.words)]
            lines += [f"![{section.alternative}]({section.name}.png)", "", *_table(section.table), ""]
        if made.missing:
            lines += ["Not measured: " + "; ".join(made.missing) + ".", ""]
    lines += ["## Made from", "", *_table(Table(["file", "command", "when", "versions"], _provenance(groups)))]
    if left_out:
        lines += [
            "",
            "Left out, there is no figure for their kind: " + ", ".join(f"{f.path} ({f.kind})" for f in left_out),
        ]
    return "\n".join(lines) + "\n"


def _paragraphs(words: Sequence[str]) -> list[str]:
    return [line for paragraph in words for line in (paragraph, "")]


def _table(table: Table) -> list[str]:
    def line(cells: Sequence[Any]) -> str:
        return f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |"

    return [line(table.columns), f"|{'---|' * len(table.columns)}", *map(line, table.rows)]


def _provenance(groups: Sequence[Material]) -> list[list[str]]:
    return [
        [
            source.path.as_posix(),
            source.results.command,
            f"{source.results.time:%Y-%m-%d %H:%M}",
            ", ".join(f"{name} {number}" for name, number in source.results.versions.items()),
        ]
        for group in groups
        for source in group.sources
    ]
