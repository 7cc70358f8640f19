"""The page of a report: its text, and what a browser makes of it."""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
import subprocess

import keras
import pytest
import zoo

import keras_alds
from keras_alds import CompressionPlan

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
ODD = "<img src=x onerror=parent.pwned=1>"
WIDTHS = (400, 910, 1600)
# What a user does, in frames of different widths. Its results are the text of the page.
DRIVER = """
const results = [];
const settle = () => new Promise((done) => setTimeout(done, 300));
async function drive(frame) {
  const page = frame.contentDocument, $ = (s) => page.querySelector(s);
  const rows = () => [...page.querySelectorAll("#layers tbody tr")]
    .filter((row) => row.getClientRects().length);
  const names = () => rows().map((row) => row.dataset.path);
  const found = { width: frame.clientWidth, first: names() };
  const sort = (n) => page.querySelectorAll("#layers th button")[n].click();
  sort(1); found.up = names();
  sort(1); found.down = names();
  sort(5); found.errors = rows().map((row) => row.cells[5].dataset.key);
  sort(0); found.alphabet = names();
  const search = (text) => {
    $("#search").value = text;
    $("#search").dispatchEvent(new Event("input"));
    return names();
  };
  found.search = search("SECOND dense"); found.count = $("#count").textContent;
  found.nothing = search("no such layer"); search("");
  const light = getComputedStyle(page.body).backgroundColor;
  $("#theme").click();
  found.themes = [light, getComputedStyle(page.body).backgroundColor];
  found.curves = page.querySelectorAll("#layer-chart .curve").length;
  found.dots = page.querySelectorAll("#layer-chart circle:not(.at)").length;
  $("#layers tr[data-path=second] .pick").click();
  found.chosen = $("#layer-chart output").textContent;
  const svg = $("#model-chart svg"), box = svg.getBoundingClientRect();
  svg.dispatchEvent(new PointerEvent("pointermove", {
    clientX: box.left + 44 + 0.2 * (box.width - 60), clientY: box.top + 220 }));
  found.pointed = $("#model-chart output").textContent;
  await settle();
  found.overflow = page.documentElement.scrollWidth - frame.clientWidth;
  found.loaded = frame.contentWindow.performance.getEntriesByType("resource").map((e) => e.name);
  results.push(found);
}
addEventListener("load", async () => {
  await settle();
  for (const frame of document.querySelectorAll("iframe")) await drive(frame);
  results.push({ pwned: window.pwned === 1 });
  document.body.textContent = JSON.stringify(results);
});
"""


@pytest.fixture(scope="module")
def compared():
    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((24,)),
            layers.Dense(48, name=ODD),
            layers.BatchNormalization(name="norm"),
            layers.Dense(64, name="second"),
            layers.Dense(40, name="third"),
            layers.Dense(4, name="head"),
        ],
        name="net",
    )
    plan = keras_alds.select(model, 0.4, method="energy", target="size", exclude="head")
    figures = {"</script><script>parent.pwned=1</script>": ("a & b", None), "accuracy": (0.9, 0.8)}
    return keras_alds.report(model, keras_alds.compress(model, plan=plan), figures, plan=plan)


def test_the_page_tells_all_and_loads_nothing(compared, tmp_path):
    path = tmp_path / "report.html"
    path.write_text("an older report")
    assert compared.to_html(path) is None
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    text = path.read_text(encoding="utf-8")
    assert text == compared.to_html()
    assert len(text) < 100_000
    plan = compared.plan
    for shown in (
        "Compression of net",
        f"{plan.params_before:,}",
        f"{plan.params_after:,}",
        "excluded by exclude=&#x27;head&#x27;",
        "BatchNormalization has no kernel to factorize",
        keras_alds.__version__,
        keras.__version__,
        "CompressionPlan.load(&quot;plan.json&quot;)",
        '<td data-label="before">a &amp; b</td>',
    ):
        assert shown in text, shown
    assert html.escape(ODD) in text
    assert ODD not in text
    # Nothing comes from elsewhere, and the browser is told so.
    assert "default-src 'none'" in text
    assert not re.search(r"(?:src|href|url|import)\s*[=(]\s*[\"']?(?:https?:|//)", text)
    (link,) = re.findall(r'download="plan.json" href="data:application/json;base64,([^"]*)"', text)
    assert CompressionPlan.from_dict(json.loads(base64.b64decode(link))) == plan


def test_a_page_without_a_plan_or_curves(compared, small, tmp_path):
    model, compressed = compared.models
    text = keras_alds.report(model, compressed).to_html()
    assert "planned" not in text
    (cr,) = re.findall(r"compress\(model, cr=([\d.]+)\)", text)
    assert 0 <= 1 - compressed.count_params() / model.count_params() - float(cr) < 1e-4
    assert "only the plan knows why" in text
    again = keras_alds.report(compressed, compressed).to_html()
    assert "There are no curves. Expected a model that is not compressed yet" in again
    assert "There is nothing to repeat" in again
    assert "The compressed model is expanded" in (
        keras_alds.report(model, keras_alds.expand(compressed)).to_html()
    )
    for path in (tmp_path, tmp_path / "nowhere" / "report.html"):
        with pytest.raises(ValueError, match="Expected the path of a file for the report"):
            compared.to_html(path)
    with pytest.raises(ValueError, match="Expected a plan made for the model"):
        keras_alds.report(small, small, plan=compared.plan)
    with pytest.raises(ValueError, match="Expected `plan` to be a CompressionPlan"):
        keras_alds.report(model, compressed, plan=0.5)


def test_pages_of_every_kind_of_model(keras_module):
    for make in (zoo.subclassed, zoo.nested, zoo.wrapped):
        model = make(keras_module)
        text = keras_alds.report(model, keras_alds.compress(model, 0.4, target="size")).to_html()
        assert '"layers":[{' in text
        assert keras_module.__version__ in text


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome")
def test_in_a_browser(compared, tmp_path):
    frames = "".join(
        f'<iframe srcdoc="{html.escape(compared.to_html())}" style="border:0;width:{width}px;'
        'height:900px"></iframe>'
        for width in WIDTHS
    )
    harness = tmp_path / "harness.html"
    harness.write_text(f"<!DOCTYPE html><body>{frames}<script>{DRIVER}</script>", encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    flags += ["--window-size=1700,2000", "--virtual-time-budget=10000", "--dump-dom"]
    run = subprocess.run(
        [BROWSER, *flags, f"--user-data-dir={tmp_path / 'profile'}", harness.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in run.stderr, run.stderr
    body = re.search(r"<body>(.*)</body>", run.stdout, flags=re.S)
    *pages_found, last = json.loads(html.unescape(body.group(1)))
    assert last == {"pwned": False}
    assert [found["width"] for found in pages_found] == list(WIDTHS)
    layers = {c.layer: c for c in compared.plan.choices if c.has_kernel}
    errors = sorted(c.error for c in layers.values() if c.factorized)
    assert len(errors) > 1
    for found in pages_found:
        assert found["overflow"] <= 0
        assert found["loaded"] == []
        assert found["first"] == [*layers]
        by_size = sorted(layers, key=lambda name: layers[name].params_after)
        assert found["up"] == by_size
        assert found["down"] == by_size[::-1]
        # Numbers by value; layers without one come last.
        assert [float(key) ** 2 for key in found["errors"] if key] == pytest.approx(
            errors, rel=1e-3
        )
        assert found["errors"][len(errors) :] == [""] * (len(layers) - len(errors))
        assert found["alphabet"] == sorted(layers)
        assert found["search"] == ["second"]
        assert found["count"] == f"1 of {len(layers)} layers"
        assert found["nothing"] == []
        assert len(set(found["themes"])) == 2
        assert found["curves"] == len(layers)
        assert found["dots"] == len(errors)
        assert re.fullmatch(
            r"second: [\d.]+ % of the weights kept, error 0\.\d+ .*", found["chosen"]
        )
        assert found["pointed"].endswith(tuple("0123456789"))
