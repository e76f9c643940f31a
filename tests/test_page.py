"""page.py: a report that opens from the disk, looked at in a real browser where there is one."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from run_records import FACTS, evaluation, summary_of, train_record

from mlx_tuner.runs.metrics import Sample
from mlx_tuner.show import page

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium to look at the page with")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --enable-logging=stderr "
    "--virtual-time-budget=2000"
)
NASTY = '</script><script>document.title = "taken over"</script>{{body}}'


@pytest.fixture(scope="module")
def records():
    train = [train_record(n, 1.5 - n / 50, epoch=n / 13) for n in range(1, 40)]
    train[20] = train[20].model_copy(update={"losses": [9.25], "grad_norms": [7.5]})
    return [evaluation(0, 1.42), *train, evaluation(13, 1.1), evaluation(39, 0.9)]


@pytest.fixture(scope="module")
def report(records) -> str:
    samples = [
        Sample(step=step, prompt=NASTY, answer=f"answer {step} " * 30, stopped=step > 0)
        for step in (0, 13, 39)
    ]
    summary = summary_of(records, recipe="a-rather-long-name-of-a-recipe " * 3)
    return page.report(records, summary, Path("adapters/x"), recipe=NASTY, samples=samples)


def looked_at(text: str, folder: Path, width: int, more: str = "") -> tuple[str, str]:
    """The page's DOM after its scripts, and the browser's log, in a frame of some width."""
    frame = f'<iframe style="border:0;height:4000px;width:{width}px"'
    probe = f"<script>onload = () => {{ const d = frames[0].document; {more} }}</script>"
    (folder / "frame.html").write_text(f'{frame} srcdoc="{html.escape(text)}"></iframe>{probe}')
    command = [BROWSER, *FLAGS.split(), f"--user-data-dir={folder}/browser", "--dump-dom"]
    done = subprocess.run(
        [*command, (folder / "frame.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
        env={"HOME": str(folder), "PATH": "/usr/bin:/bin"},
    )
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def test_it_loads_nothing_and_is_small(report):
    assert len(report.encode()) < 1_000_000
    assert "default-src 'none'" in report
    links = re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?([^"\'\s>]+)', report)
    assert links == []


@pytest.mark.slow
def test_a_run_of_many_steps_is_still_small_and_keeps_its_worst_step():
    losses = [1.0 + n % 7 / 10 for n in range(200_000)]
    losses[154_321] = 77.5
    record = train_record(200_000, 1.0, epoch=3.0)
    record = record.model_copy(update={"losses": losses, "grad_norms": [0.5] * 200_000})
    text = page.report([record], summary_of([record]), Path("x"), recipe="")
    assert len(text.encode()) < 1_000_000
    assert [154322.0, 77.5] in json.loads(parts(text)["charts"])[0]["series"][0]["points"]


def parts(text: str) -> dict[str, str]:
    """The JSON in a page, by its id."""
    pattern = r'<script type="application/json" id="(\w+)">(.*?)</script>'
    return dict(re.findall(pattern, text, flags=re.S))


def test_its_numbers_are_those_of_the_summary_and_its_curves_those_of_the_records(records, report):
    summary = summary_of(records, recipe="a-rather-long-name-of-a-recipe " * 3)
    assert json.loads(parts(report)["summary"]) == summary.to_json()
    loss = json.loads(parts(report)["charts"])[0]
    curves = {series["name"]: series["points"] for series in loss["series"]}
    assert [21, 9.25] in curves["training each step"]
    assert curves["validation"] == [[0, 1.42], [13, 1.1], [39, 0.9]]
    assert loss["star"] == [39, 0.9]
    body = re.sub(r"<[^>]+>", " ", report)
    for number in (
        f"{summary.first_epoch_loss:.4f} → {summary.last_epoch_loss:.4f}",
        "1.4200 → 0.9000 at step 39",
        "4,358,144 of 1,548,072,448",
        f"{summary.trained_tokens:,} of them targets",
    ):
        assert number in body


def test_what_others_wrote_stays_text(report):
    assert report.count("<script") == 3
    assert html.escape(NASTY) in report


@needs_browser
@pytest.mark.parametrize("width", [360, 1200])
def test_in_a_browser_it_draws_fits_and_reports_no_error(report, tmp_path, width):
    dom, log = looked_at(
        report,
        tmp_path,
        width,
        "const r = d.documentElement, wide = [...d.querySelectorAll('body *')].filter(e =>"
        " !e.closest('.scroll, pre, svg') && e.getBoundingClientRect().right > r.clientWidth + 1);"
        "const svg = d.querySelector('figure svg'), box = svg.getBoundingClientRect();"
        "svg.dispatchEvent(new PointerEvent('pointermove', {clientX: box.left + box.width / 2}));"
        "document.title = JSON.stringify([r.scrollWidth - r.clientWidth,"
        " wide.map(e => e.outerHTML.slice(0, 80)), d.querySelectorAll('figure polyline').length,"
        " d.querySelector('.tip').innerText, d.title]);",
    )
    assert log == ""
    found = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", dom)[1]))
    overflow, wide, lines, tip, title = found
    assert (overflow, wide) == (0, [])
    assert lines == 9  # loss 3, gradient norm 2, memory 2, one each of LR and tokens/s
    step, *values = tip.splitlines()
    loss = f"{1.5 - int(step.removeprefix('step ')) / 50:g}"
    assert values == [f"training each step {loss}", f"training mean {loss}"]
    assert title.startswith("a-rather-long-name")


def test_a_run_without_a_log_line_has_a_page():
    text = page.report([], summary_of([]), Path("x"), recipe="", samples=[])
    assert "codealpaca" in text
    assert FACTS.model in text
