"""The report as a browser shows it: complete, without the network, whatever the artifact's strings hold."""

import dataclasses
import functools
import re
import time
from unittest import mock

import pytest
from safetensors import safe_open
from typer.testing import CliRunner

from hif4c.compiler import inspection, journal, report_page
from hif4c.compiler.amounts import format_bytes
from hif4c.compiler.report_page import PageContent, render_page, write_report_page
from hif4c.runtime.artifact import open_artifact
from hif4c.runtime.errors import Hif4Error
from hif4c.tools.cli import app
from tests.support.browser import click, console_errors, count, open_browser, requested_urls, text_of, visit, wait

EVIL = "</script><img src=x onerror=window.hacked=1><!--<script>"
LAYERS = 40
LOAD_SECONDS = 3.0
PAGE_BYTES = 10e6


@pytest.fixture(scope="module")
def path(mixed):
    return mixed


@pytest.fixture(scope="module", autouse=True)
def layouts():
    """Pages of one program have the same drawings: made once."""
    with mock.patch.object(report_page, "lay_out", functools.cache(report_page.lay_out)):
        yield


@pytest.fixture(scope="module")
def written(path, calibrated, captures, tmp_path_factory):
    """(the page as the command writes it, what is on it, what the command printed)."""
    output = tmp_path_factory.mktemp("page") / "report.html"
    contents = []

    def render(content):
        contents.append(content)
        return render_page(content)

    with mock.patch.object(inspection, "capture", captures), mock.patch.object(report_page, "render_page", render):
        arguments = ["inspect", str(path), "--html", str(output), "--calibration", str(calibrated.path)]
        result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    (content,) = contents
    return output, content, result


@pytest.fixture(scope="module")
def page(written):
    return written[0]


@pytest.fixture(scope="module")
def content(written):
    return written[1]


@pytest.fixture(scope="module")
def browser():
    with open_browser() as driver:
        yield driver


@pytest.fixture
def opened(browser, page):
    return visit(browser, page)


def deep(content):
    """The same model with 40 blocks, twice: what is in block 1 stands for all that follow."""
    path = re.compile(r"^blocks\.1\.")

    def repeated(items, **names):
        copies = [
            dataclasses.replace(
                item, block=block, **{name: path.sub(f"blocks.{block}.", getattr(item, name)) for name in names}
            )
            for block in range(2, LAYERS)
            for item in items
            if item.block == 1
        ]
        return (*items, *copies)

    (expert,) = content.numbers.experts
    first = dataclasses.replace(
        expert, linears=repeated(expert.linears, path=1), groups=repeated(expert.groups, name=1)
    )
    second = dataclasses.replace(first, name="transformer_2")
    (program,) = content.programs
    more = [
        {
            **one,
            "blocks": {**one["blocks"], **{f"blocks.{block}": one["blocks"]["blocks.1"] for block in range(2, LAYERS)}},
        }
        for one in program["passes"]
    ]
    program = {**program, "passes": more}
    return PageContent(
        dataclasses.replace(content.numbers, experts=(first, second)),
        [program, {**program, "expert": "transformer_2"}],
        content.calibrated,
    )


def show_pass(browser, name):
    browser.execute_script(
        """const select = document.getElementById("step");
        select.value = [...select.options].find((option) => option.text.includes(arguments[0])).value;
        select.dispatchEvent(new Event("change"));""",
        name,
    )


def find(browser, words):
    field = browser.find_element("id", "search")
    field.clear()
    field.send_keys(words)
    # An empty field has no count.
    wait(browser, "document.getElementById('search-count').textContent !== ''")


def test_every_section_is_drawn_without_a_word_on_the_console_and_without_the_network(opened, page):
    for section in ("summary", "graph", "linear-table", "histograms", "outliers", "left-out"):
        opened.execute_script("document.getElementById(arguments[0]).scrollIntoView({behavior: 'instant'})", section)
        time.sleep(0.1)
    places = opened.execute_script(
        "return [...document.querySelectorAll('[data-plot]')].map((place) => place.dataset.plot)"
    )
    assert places == ["sqnr", "errors", "masks", "tails", "bytes", "outliers"]
    for name in places:
        selector = f'[data-plot="{name}"]'
        opened.execute_script("document.querySelector(arguments[0]).scrollIntoView({behavior: 'instant'})", selector)
        wait(opened, "document.querySelector(arguments[0]).children.length > 0", selector)
    wait(opened, "document.getElementById('histogram-note').textContent.includes('unit scales')")
    click(opened, '[data-region="blocks.0"] summary')
    wait(opened, "document.querySelectorAll('.node').length > 20")
    assert console_errors(opened) == []
    assert requested_urls(opened, page) == []


def test_the_browser_fixture_sees_errors_and_requests(browser, tmp_path):
    """What the test above relies on."""
    file = tmp_path / "bad.html"
    file.write_text("<script>fetch('http://example.com/x'); throw new Error('seen')</script>")
    visit(browser, file)
    assert any("seen" in message for message in console_errors(browser))
    assert requested_urls(browser, file) == ["http://example.com/x"]


def test_regions_open_and_close(opened):
    assert count(opened, "details.region") == 3
    assert count(opened, "details[open]") == 0
    click(opened, '[data-region="blocks.1"] summary')
    assert count(opened, '[data-region="blocks.1"][open] .node') > 20
    click(opened, '[data-region="outside"] summary')
    assert count(opened, "details[open]") == 1
    assert count(opened, '[data-region="outside"][open] .node') > 20
    click(opened, '[data-region="outside"] summary')
    assert count(opened, "details[open]") == 0
    assert count(opened, ".node") == 0


def test_a_node_shows_its_details_and_the_figures_of_its_linear(opened, path, content):
    click(opened, '[data-region="blocks.0"] summary')
    name = opened.execute_script(
        """const linears = [...document.querySelectorAll(".node.w4a4")];
        return linears.find((node) => node.title.startsWith("blocks.0.ffn.net.2\\n")).dataset.node;"""
    )
    opened.execute_script('document.querySelector(`.node[data-node="${arguments[0]}"]`).click()', name)
    shown = text_of(opened, "#details")
    assert "hif4.linear" in shown
    assert "blocks.0.ffn.net.2" in shown
    assert "ffn.net.2.weight.codes: uint8[" in shown
    with safe_open(path / "transformer" / "weights.safetensors", "pt") as file:
        tensors = [key for key in file.keys() if key.startswith("blocks.0.ffn.net.2.") and "mask" not in key]  # noqa: SIM118
        size = sum(file.get_tensor(key).nbytes for key in tensors)
    assert f"{size / 1e3:.3g} kB" in shown
    linear = next(item for item in content.numbers.experts[0].linears if item.path == "blocks.0.ffn.net.2")
    assert f"{linear.sqnr:.1f} dB" in shown
    assert count(opened, '.node[aria-pressed="true"]') == 1


def test_search_marks_nodes_of_all_blocks_and_goes_through_them(opened):
    find(opened, "attn2.to_q")
    assert text_of(opened, "#search-count").endswith("in 2 regions")
    assert count(opened, "details.region:not([hidden])") == 2
    click(opened, "#search-next")
    assert count(opened, '[data-region="blocks.0"][open]') == 1
    assert count(opened, ".node.hit") >= 1
    assert "blocks.0.attn2.to_q" in text_of(opened, "#details")
    click(opened, "#search-previous")
    assert "blocks.1.attn2.to_q" in text_of(opened, "#details")
    find(opened, "hif4.norm_quantize attn")
    find(opened, "no such operator")
    wait(opened, "document.getElementById('search-count').textContent === '0 nodes in 0 regions'")


def changed_lines(content, name, region):
    """How many nodes a pass took from a region, and brought to it."""
    (program,) = content.programs
    at = next(index for index, one in enumerate(program["passes"]) if one["name"] == name)
    before, after = (
        set(program["structures"][program["passes"][index]["blocks"][region]]["nodes"]) for index in (at - 1, at)
    )
    return len(before - after), len(after - before)


def test_before_and_after_a_pass(opened, content):
    show_pass(opened, "fuse_activation")
    assert changed_lines(content, "fuse_activation", "outside") == (0, 0)
    assert "unchanged" in text_of(opened, '[data-region="outside"] summary')
    show_pass(opened, "lower_linears")
    click(opened, '[data-region="blocks.0"] summary')
    went = opened.execute_script("return [...document.querySelectorAll('#text .went')].map((line) => line.innerText)")
    came = opened.execute_script("return [...document.querySelectorAll('#text .came')].map((line) => line.innerText)")
    assert (len(went), len(came)) == changed_lines(content, "lower_linears", "blocks.0")
    assert any("aten.linear.default" in line for line in went)
    assert any("hif4.linear.default" in line or "hif4.linear(" in line for line in came)
    assert not any("aten.linear" in line for line in came)
    click(opened, "#tabs button:nth-child(2)")
    assert count(opened, ".node.went") == len(went)
    assert count(opened, ".node.came") == 0
    click(opened, "#tabs button:nth-child(3)")
    assert count(opened, ".node.came") == len(came)
    # What changed is in view, however wide the drawing is.
    places = opened.execute_script(
        """const box = (element) => element.getBoundingClientRect().toJSON();
        return [box(document.getElementById("canvas")), box(document.querySelector(".node.came"))];"""
    )
    (canvas, node) = places
    assert canvas["left"] <= node["left"] < node["right"] <= canvas["right"]
    assert canvas["top"] <= node["top"] < node["bottom"] <= canvas["bottom"]
    show_pass(opened, "bf16")
    click(opened, "#tabs button:first-child")
    assert count(opened, ".node.w4a16") > 0
    assert count(opened, ".node.w4a4") == 0


def test_changes_of_a_stored_tensor_alone_are_told(opened):
    """The line of a node stays the same where a pass only changes what its tensor is made of."""
    show_pass(opened, "fold_channel_shifts")
    click(opened, '[data-region="blocks.0"] summary')
    lines = [
        opened.execute_script(
            "return [...document.querySelectorAll(arguments[0])].map((line) => line.textContent.slice(2))",
            f"#text .{kind}",
        )
        for kind in ("went", "came")
    ]
    assert len(lines[0]) == len(lines[1]) > 0
    assert not {*lines[0]} & {*lines[1]}
    assert any("less attn1.to_q.shift" in line for line in lines[1])


def test_no_row_of_the_table_is_behind_its_head(opened):
    head, row = opened.execute_script(
        """const table = document.getElementById("linears");
        const parts = [table.tHead.rows[1].cells[0], table.tBodies[0].rows[0]];
        return parts.map((part) => part.getBoundingClientRect().toJSON());"""
    )
    assert head["bottom"] <= row["top"] + 1  # borders are shared


def test_the_table_sorts_and_filters(opened, content):
    def column(index):
        return opened.execute_script(
            """const rows = [...document.querySelectorAll("#linears tbody tr")];
            return rows.map((row) => row.cells[arguments[0]].innerText);""",
            index,
        )

    paths = [linear.path for linear in content.numbers.experts[0].linears]
    assert column(0) == paths
    titles = opened.execute_script(
        "return [...document.querySelectorAll('#linears [data-key]')].map((c) => c.innerText.trim())"
    )
    place = titles.index("SQNR")
    click(opened, f"#linears [data-key]:nth-child({place + 1}) button")
    found = [float(text) for text in column(place) if text]
    expected = sorted(linear.sqnr for linear in content.numbers.experts[0].linears if linear.sqnr is not None)
    assert found == pytest.approx(expected, abs=0.051)  # one decimal is shown
    assert found == sorted(found)
    click(opened, f"#linears [data-key]:nth-child({place + 1}) button")
    assert [float(text) for text in column(place) if text] == sorted(found, reverse=True)
    opened.find_element("id", "linear-filter").send_keys("attn1 to_k")
    wait(opened, "document.getElementById('linear-count').textContent.startsWith('2 of')")
    assert set(column(0)) == {"blocks.0.attn1.to_k", "blocks.1.attn1.to_k"}


def test_a_kind_of_linears_is_hidden_and_shown_in_the_plots(opened):
    def rows():
        """Kinds of the dots in the plot of bytes."""
        return opened.execute_async_script(
            """const done = arguments[0];
            drawn.get("bytes").then((page) => {
              const tables = [...page.roots()[0].references()].filter((model) => model.data?.kind);
              done([...new Set(tables.flatMap((table) => [...table.data.kind]))]);
            });"""
        )

    opened.execute_script("document.querySelector('[data-plot=\"bytes\"]').scrollIntoView({behavior: 'instant'})")
    wait(opened, "drawn.has('bytes')")
    before = rows()
    assert "attn2.to_k" in before
    opened.execute_script("[...document.querySelectorAll('.toggle')].find((b) => b.innerText === 'attn2.to_k').click()")
    assert rows() == [kind for kind in before if kind != "attn2.to_k"]
    opened.execute_script("[...document.querySelectorAll('.toggle')].find((b) => b.innerText === 'attn2.to_k').click()")
    assert rows() == before
    assert console_errors(opened) == []


def test_forty_layers_open_fast_and_stay_small(browser, content, tmp_path):
    file, content = tmp_path / "deep.html", deep(content)
    file.write_text(render_page(content), encoding="utf-8")
    assert file.stat().st_size < PAGE_BYTES
    # Seconds that the page itself works, so that other work on the machine does not count.
    browser.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    visit(browser, file)
    assert count(browser, "details.region") == LAYERS + 1
    assert count(browser, "#linears tbody tr") == len(content.numbers.experts[0].linears)
    metrics = {one["name"]: one["value"] for one in browser.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]}
    assert 0 < metrics["TaskDuration"] < LOAD_SECONDS
    click(browser, '[data-region="blocks.39"] summary')
    assert "blocks 1 to 38" in text_of(browser, "#same-as")
    click(browser, "#experts button:last-child")
    assert count(browser, '[data-region="blocks.39"][open] .node') > 20
    assert console_errors(browser) == []


def test_strings_stay_text(browser, content, tmp_path):
    """A recipe's description, a path, a note: whatever an artifact says, it runs nothing and ends no element."""
    (expert,), (program,) = content.numbers.experts, content.programs
    linears = (dataclasses.replace(expert.linears[0], path=EVIL, reason=EVIL), *expert.linears[1:])
    where = program["node_fields"].index("module")
    nodes = [[EVIL if place == where else value for place, value in enumerate(row)] for row in program["nodes"]]
    left = [{"what": EVIL, "why": EVIL, "pass_name": EVIL}]
    steps = [{**one, "notes": [EVIL]} for one in program["passes"]]
    numbers = dataclasses.replace(
        content.numbers, source=EVIL, files={EVIL: 1}, experts=(dataclasses.replace(expert, linears=linears),)
    )
    file = tmp_path / "evil.html"
    program = {**program, "nodes": nodes, "not_applied": left, "passes": steps}
    file.write_text(render_page(PageContent(numbers, [program], True)), encoding="utf-8")
    visit(browser, file)
    click(browser, '[data-region="blocks.0"] summary')
    click(browser, ".node")
    assert EVIL in text_of(browser, "#details")
    assert text_of(browser, "h1") == EVIL
    assert EVIL in text_of(browser, "#left-out")
    assert EVIL in text_of(browser, "#linears tbody")
    assert "window.hacked" in text_of(browser, "#summary table")
    assert count(browser, "img") == 0
    assert browser.execute_script("return window.hacked") is None
    assert console_errors(browser) == []


def test_nothing_runs_but_the_page_s_own_scripts(browser, page, tmp_path):
    """Should a string ever become markup after all, the policy stops it."""
    file = tmp_path / "planted.html"
    planted = "<img src='data:,' onerror='window.hacked=1'><script>window.hacked=2</script></main>"
    file.write_text(page.read_text(encoding="utf-8").replace("</main>", planted), encoding="utf-8")
    visit(browser, file)
    assert count(browser, "img") == 1
    assert browser.execute_script("return window.hacked") is None


def test_the_command_says_what_it_wrote(written):
    output, content, result = written
    assert f"wrote {output} ({format_bytes(output.stat().st_size)}) in " in result.stdout
    assert "tracing" in result.stderr
    assert [item.name for item in output.parent.iterdir()] == ["report.html"]
    assert content.calibrated


def test_without_a_calibration_the_page_says_what_is_missing(browser, content, tmp_path):
    experts = tuple(dataclasses.replace(expert, groups=()) for expert in content.numbers.experts)
    numbers = dataclasses.replace(content.numbers, experts=experts)
    file = tmp_path / "report.html"
    file.write_text(render_page(PageContent(numbers, content.programs, False)), encoding="utf-8")
    visit(browser, file)
    for section in ("#linear-table", "#outliers"):
        assert "hif4c calibrate" in text_of(browser, section)
        assert "--calibration" in text_of(browser, section)
    click(browser, "#linears tbody tr:nth-child(7)")
    wait(browser, "document.getElementById('histogram-note').textContent.includes('no calibration')")
    assert console_errors(browser) == []


def test_a_calibration_is_for_the_report(path, calibrated):
    result = CliRunner().invoke(app, ["inspect", str(path), "--calibration", str(calibrated.path)])
    assert isinstance(result.exception, Hif4Error)
    assert "--html FILE" in str(result.exception)


def test_nothing_is_left_where_the_page_cannot_be_written(path, content, tmp_path, monkeypatch):
    monkeypatch.setattr(report_page, "render_page", lambda _: "new")
    monkeypatch.setattr(report_page, "artifact_numbers", lambda *_: content.numbers)
    monkeypatch.setattr("hif4c.compiler.report_passes.artifact_passes", lambda *_: {})
    artifact = open_artifact(path)
    with pytest.raises(Hif4Error, match="is a directory"):
        write_report_page(artifact, tmp_path)
    with pytest.raises(Hif4Error, match="inside the artifact, whose files are all listed"):
        write_report_page(artifact, path / "transformer" / "page.html")
    with pytest.raises(Hif4Error, match=r"missing/report\.html cannot be written \(No such file or directory\)"):
        write_report_page(artifact, tmp_path / "missing" / "report.html")
    output = tmp_path / "report.html"
    output.write_text("old")
    with (
        mock.patch.object(journal.os, "fsync", side_effect=OSError(28, "No space left on device")),
        pytest.raises(Hif4Error, match="No space left on device"),
    ):
        write_report_page(artifact, output)
    assert output.read_text() == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["report.html"]
    assert write_report_page(artifact, output) == 3
    assert output.read_text() == "new"


def test_a_missing_library_is_named(path, tmp_path, monkeypatch):
    monkeypatch.setattr(report_page, "_LIBRARIES", ("bokeh", "no_such_library"))
    with pytest.raises(Hif4Error, match=r"needs no_such_library: .*pip install 'hif4c\[report\]'"):
        write_report_page(open_artifact(path), tmp_path / "report.html")
