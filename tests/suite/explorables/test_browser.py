"""Chromium without a screen drags a control of each explorable: on a static page, and as anywidget loads the module."""

import base64
import http.server
import json
import shutil
import subprocess
import threading
from functools import partial

import pytest
from bs4 import BeautifulSoup

from lowbit_suite import explorables
from lowbit_suite.explorables import pages

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
NAMES = list(explorables.ALT)

# In a frame as narrow as a telephone: wait until all are there, move the first slider of each, and write down what
# they say before and after.
DRAG = """
<pre id="found"></pre><iframe src="narrow.html" style="width: 390px; height: 900px; border: 0"></iframe>
<script type="module">
const frame = document.querySelector("iframe");
await new Promise((loaded) => frame.addEventListener("load", loaded));
const page = frame.contentDocument, wait = () => new Promise((done) => setTimeout(done, 50));
for (let i = 0; i < 100 && page.querySelectorAll(".lowbit-explorable").length < COUNT; i++) await wait();
await wait();
const found = [...page.querySelectorAll(".lowbit-explorable")].map((section) => {
  const said = () => section.querySelector("[role=status]").textContent;
  const picture = () => section.querySelector("svg").parentElement.innerHTML;
  const before = said(), drawn = picture(), inputs = [...section.querySelectorAll("input")];
  const slider = section.querySelector(SLIDER);
  slider.value = slider.min;
  slider.dispatchEvent(new Event("input", { bubbles: true }));
  return { title: section.getAttribute("aria-label"), before, after: said(), redrawn: drawn !== picture(),
    unlabelled: inputs.filter((input) => !input.labels.length).length,
    pictures: page.querySelectorAll("[data-explorable] img").length };
});
document.querySelector("#found").textContent =
  JSON.stringify({ found, width: page.documentElement.scrollWidth, errors: frame.contentWindow.errors });
</script>
"""
ERRORS = "<script>window.errors = []; addEventListener('error', (e) => errors.push(e.message))</script>"


def by_anywidget(name: str) -> str:
    """A page's part that loads the one-file module from a URL of its own, as anywidget does."""
    url = "data:text/javascript;base64," + base64.b64encode(explorables.source(name).encode()).decode()
    return (
        f'<div id="{name}"></div><script type="module">import widget from "{url}"; '
        f'widget.render({{ model: {{}}, el: document.querySelector("#{name}") }});</script>'
    )


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def served(tmp_path):
    """A folder and its address."""
    handler = partial(Quiet, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield tmp_path, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="neither chromium nor google-chrome is installed: nothing is dragged")
@pytest.mark.parametrize("kind", ["static page", "anywidget"])
def test_each_answers_to_a_drag(served, tmp_path_factory, kind):
    folder, address = served
    if kind == "static page":
        pages.copy_modules(folder / "explorables")
        page = pages.page(NAMES).replace("<body>", '<body><div data-explorable="nothing"><img alt="its twin"></div>')
    else:
        page = pages.PAGE.format(body="\n".join(map(by_anywidget, NAMES)), embed="")
    (folder / "narrow.html").write_text(page.replace("<body>", "<body>" + ERRORS))
    slider = json.dumps('label:last-of-type input[type="range"], input[type="range"]')
    (folder / "drag.html").write_text(DRAG.replace("COUNT", str(len(NAMES))).replace("SLIDER", slider))
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000",
        f"--user-data-dir={tmp_path_factory.mktemp('profile')}", "--dump-dom", f"{address}/drag.html",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    told = BeautifulSoup(done.stdout, "html.parser").find(id="found")
    assert told is not None and told.text, f"the page has written nothing:\n{done.stderr[-2000:]}"
    result = json.loads(told.text)
    assert result["errors"] == [] and result["width"] <= 390
    assert len({one["title"] for one in result["found"]}) == len(result["found"]) == len(NAMES)
    for one in result["found"]:
        assert one["before"] and one["after"] and one["after"] != one["before"], one["title"]
        assert one["redrawn"] and one["unlabelled"] == 0, one["title"]
        assert one["pictures"] == (kind == "static page"), "twins go, but for that of a module that is not there"
