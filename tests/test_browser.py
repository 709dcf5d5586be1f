"""The notebooks as a person meets them: JupyterLab in a real Chromium, every cell run at scale tiny, the panels worked by keys.

A message on the browser's console fails the test. What the page looked like when a test failed is kept in results/browser/.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from urllib.parse import urlsplit

import nbformat
import papermill
import psutil
import pytest
from papermill.parameterize import parameterize_notebook

from rankmamba.batch.parameters import ROOT, declared, notebooks, settle

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("no Chromium here (Debian, Ubuntu: apt-get install chromium)", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install 'rankmamba[e2e]'")
pytest.importorskip("jupyterlab", reason="JupyterLab is not installed: pip install 'rankmamba[e2e]'")
expect = playwright.expect

SCREENSHOTS = ROOT / "results" / "browser"
STEMS = [path.stem for path in notebooks()]
SECONDS_TO_RUN_ALL, SECONDS_TO_STOP = 30, 1  # on an idle machine, a `Stopwatch`'s
SECONDS_OF_LOOP = 0.08  # of a processor, for the loop in `Stopwatch` on that machine
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync --disable-dev-shm-usage"
)
KERNEL_IS_READY = """async () => {
    const notebook = window.jupyterapp.shell.currentWidget, session = notebook.sessionContext;
    await notebook.context.ready; await session.ready;
    const kernel = () => session.session?.kernel;
    while (kernel()?.status !== 'idle' || kernel()?.connectionStatus !== 'connected') await new Promise(r => setTimeout(r, 50));
}"""


class Stopwatch:
    """Seconds since it was made, as an idle machine counts them: less where a host took the processors, they are slower, or shared."""

    def __init__(self):
        self.started, self.stolen = time.monotonic(), self._stolen()

    @staticmethod
    def _stolen() -> float:
        """Seconds that a host took from this machine's processors, all together."""
        return getattr(psutil.cpu_times(), "steal", 0.0)

    def seconds(self) -> float:
        passed = (time.monotonic() - self.started) - (self._stolen() - self.stolen) / os.cpu_count()
        started = time.process_time()
        sum(i * i for i in range(1_000_000))
        slower = (time.process_time() - started) / SECONDS_OF_LOOP
        return passed / max(1.0, slower) / max(1.0, os.getloadavg()[0] / os.cpu_count())


class Sheet:
    """An open notebook: its page, what the browser's console said, and the seconds that its first Run All took."""

    def __init__(self, page, url: str):
        self.page, self.complaints, self.seconds = page, [], None
        page.set_default_timeout(300_000)
        expect.set_options(timeout=120_000)
        page.on("console", self._listen)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.goto(url)
        page.locator(".jp-Notebook .jp-Cell").first.wait_for()
        page.evaluate(KERNEL_IS_READY)

    def _listen(self, message):
        # Of a kernel that is just being started the server knows no last activity, and the list of kernels that every page asks for
        # from time to time then fails, some milliseconds long (jupyter/notebook#5345).
        listing = urlsplit(message.location["url"]).path == "/api/kernels" and "status of 500" in message.text
        if message.type == "error" and not listing:
            self.complaints.append(message.text)

    def run_all(self) -> float:
        """Run all cells; seconds until the last one is done."""
        watch = Stopwatch()
        self.page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")
        return watch.seconds()

    @property
    def panel(self):
        return self.page.locator(".rankmamba")

    def slider(self, name: str):
        """The part of a slider that has the focus when its value is moved by keys."""
        return self.panel.locator(".widget-hslider", has_text=name).locator(".noUi-handle")

    def readout(self, name: str):
        """The number beside a slider, which can be typed over."""
        return self.panel.locator(".widget-hslider", has_text=name).locator(".widget-readout")

    def button(self, name: str):
        return self.panel.get_by_role("button", name=name, exact=True)

    def first(self) -> None:
        """Put the focus on the first widget of the panel."""
        self.panel.locator("button, input, .noUi-handle").first.focus()

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def tab_to(self, locator, most: int = 30) -> None:
        """Move the focus with the Tab key alone until it is on an element."""
        for _ in range(most):
            if locator.evaluate("element => element === document.activeElement"):
                return
            self.press("Tab")
        raise AssertionError(f"{most} times Tab did not reach {locator}")

    def type_into(self, locator, text: str) -> None:
        """Reach a field with the Tab key, type over what is in it, and press Enter."""
        self.tab_to(locator)
        self.press("Control+a")
        self.page.keyboard.type(text)
        self.press("Enter")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def server(tmp_path_factory, results):
    """A JupyterLab with nothing of the user's own in it, on notebooks that have the parameters of scale tiny."""
    home = tmp_path_factory.mktemp("lab")
    values = settle("tiny") | {"scale": "tiny", "results": str(results), "interactive": True}
    for path in notebooks():
        given = {name: value for name, value in values.items() if name in declared(path)}
        nbformat.write(parameterize_notebook(papermill.iorw.load_notebook_node(str(path)), given), home / path.name)
    settings = home / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
    places = {"JUPYTER_CONFIG_DIR": "config", "JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces"}
    places |= {"JUPYTER_RUNTIME_DIR": "runtime", "JUPYTER_DATA_DIR": "data", "IPYTHONDIR": "ipython"}
    environment = os.environ | {name: str(home / folder) for name, folder in places.items()} | {"JUPYTER_TOKEN": "token"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}"]  # or another, if it is taken by now
    options += [f"--ServerApp.root_dir={home}", "--expose-app-in-browser"]
    options += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--LabApp.news_url=None"]
    with open(home / "server.log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options], env=environment, stdout=log, stderr=log, start_new_session=True
        )
    running, end = home / "runtime" / f"jpserver-{process.pid}.json", time.monotonic() + 120
    while True:
        with contextlib.suppress(OSError, ValueError):  # not written yet, or only half, or not answering
            url = f"http://127.0.0.1:{json.loads(running.read_text())['port']}"
            status = urllib.request.Request(f"{url}/api/status", headers={"Authorization": "token token"})
            urllib.request.urlopen(status, timeout=1)
            break
        assert process.poll() is None and time.monotonic() < end, (home / "server.log").read_text()
        time.sleep(0.1)
    yield url
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(20)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS.split())
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def sheets():
    """{stem: its sheet}, filled by the tests as they open notebooks."""
    return {}


@pytest.fixture
def sheet(request, server, browser, sheets):
    """Open a notebook and run it, or take the one that an earlier test has. A picture is kept if the test fails."""
    used, failed_before = [], request.session.testsfailed

    def take(stem: str) -> Sheet:
        if stem not in sheets:
            context = browser.new_context(viewport={"width": 1300, "height": 1600})
            sheets[stem] = Sheet(context.new_page(), f"{server}/lab/tree/{stem}.ipynb?token=token&reset")
        used.append(sheets[stem])
        if sheets[stem].seconds is None:
            sheets[stem].seconds = sheets[stem].run_all()
        return sheets[stem]

    yield take
    if request.session.testsfailed > failed_before:
        for number, one in enumerate(used):
            SCREENSHOTS.mkdir(parents=True, exist_ok=True)
            one.page.screenshot(path=SCREENSHOTS / f"{request.node.name}-{number}.png", full_page=True)


def sources(stem: str) -> str:
    """The code of a notebook."""
    cells = nbformat.read(next(path for path in notebooks() if path.stem == stem), as_version=4).cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "code")


@pytest.mark.parametrize("stem", STEMS)
def test_run_all_shows_every_figure_and_panel_and_no_error_within_thirty_seconds(stem, sheet):
    notebook = sheet(stem)
    assert notebook.seconds < SECONDS_TO_RUN_ALL
    outputs = notebook.page.locator(".jp-OutputArea-output")
    assert outputs.filter(has_text="Traceback").count() == 0
    pictures = outputs.locator("img")
    # an indented one draws once for each long collection and recorded GPU, of which scale tiny has none; the report's three draw
    # what tiny has: lengths, its transfers and the speeds of this machine
    indented = 3 if stem == "07_report" else 0
    assert pictures.count() == len(re.findall(r"^display\(figure\b", sources(stem), re.MULTILINE)) + indented
    for picture in pictures.all():
        assert picture.evaluate("image => image.complete && image.naturalWidth > 300")
    assert notebook.panel.count() == sources(stem).count("display(panels.")
    assert notebook.complaints == []


def train_with(notebook: Sheet, steps: int, seed: int) -> None:
    """Set steps and seed and press Train, by keys alone, from the first widget on."""
    notebook.first()
    notebook.type_into(notebook.panel.get_by_label("steps"), str(steps))
    notebook.type_into(notebook.panel.get_by_label("seed"), str(seed))
    notebook.tab_to(notebook.button("Train"))
    notebook.press("Enter")


def test_a_run_has_the_settings_that_were_made_by_keys_and_by_typing(sheet):
    notebook = sheet("02_train")
    notebook.first()
    before = float(notebook.readout("learning rate").inner_text())
    notebook.tab_to(notebook.slider("learning rate"))
    notebook.press("ArrowLeft", "ArrowLeft")
    expect(notebook.readout("learning rate")).not_to_have_text(f"{before:.3f}")
    notebook.type_into(notebook.readout("group size"), "6")
    train_with(notebook, steps=7, seed=11)
    row = notebook.panel.locator("tr.rm-now")
    expect(row).to_have_count(1)
    cells = row.locator("td").all_inner_texts()
    assert cells[2] == "6" and cells[4] == "11" and cells[5] == "7" and float(cells[1]) < before
    expect(notebook.panel.locator("svg polyline")).not_to_have_count(0)
    assert notebook.complaints == []


def test_stop_ends_a_training_within_a_second_and_keeps_it_marked_partial(sheet):
    notebook = sheet("02_train")
    train_with(notebook, steps=3_000, seed=12)
    expect(notebook.panel.locator(".rm-status")).to_contain_text("left")  # after some steps it knows what remains
    notebook.first()
    notebook.tab_to(notebook.button("tiny-neox"))
    notebook.press("Enter")  # the kernel hears this while it trains, and sets the steps of the other backbone
    expect(notebook.panel.get_by_label("steps")).not_to_have_value("3000")
    notebook.tab_to(notebook.button("Stop"))
    pressed = Stopwatch()
    notebook.press("Enter")
    expect(notebook.button("Train")).to_be_enabled()
    assert pressed.seconds() < SECONDS_TO_STOP
    expect(notebook.panel.locator("tr.rm-now")).to_contain_text("(partial)")
    expect(notebook.panel.locator(".rm-status")).to_contain_text("stopped")
    assert notebook.complaints == []


def test_a_second_run_all_ends_the_panel_of_the_first_and_shows_one_that_works(sheet):
    notebook = sheet("02_train")
    train_with(notebook, steps=3_000, seed=13)
    expect(notebook.panel.locator(".rm-status")).to_contain_text("left")
    assert notebook.run_all() < SECONDS_TO_RUN_ALL
    expect(notebook.panel).to_have_count(1)
    expect(notebook.panel.locator(".rm-table")).to_contain_text("(partial)")
    expect(notebook.button("Train")).to_be_enabled()
    assert notebook.page.locator(".jp-OutputArea-output").filter(has_text="Traceback").count() == 0
    assert notebook.complaints == []


def test_after_a_restart_of_the_kernel_the_panel_is_there_again_and_works(sheet):
    notebook = sheet("02_train")
    notebook.page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()")
    notebook.page.evaluate(KERNEL_IS_READY)
    assert notebook.run_all() < SECONDS_TO_RUN_ALL
    expect(notebook.panel).to_have_count(1)
    train_with(notebook, steps=3, seed=14)
    expect(notebook.panel.locator("tr.rm-now td").nth(4)).to_have_text("14")
    assert notebook.complaints == []


def test_a_typed_query_is_ranked_by_every_system_and_its_text_stays_text(sheet):
    notebook = sheet("03_rerank")
    notebook.first()
    typed = "why does the outer bank of a river wear away <img src=x onerror='window.broken = true'>"
    notebook.type_into(notebook.panel.get_by_label("or type"), typed)
    expect(notebook.panel.locator(".rm-document")).to_be_visible()
    lists = notebook.panel.locator(".rm-lists section")
    ticked = notebook.panel.locator("input[type=checkbox]:checked").count()
    expect(lists).to_have_count(1 + ticked)
    expect(lists.first.locator("mark").first).to_be_visible()
    expect(notebook.panel.locator(".rm-document sup").first).to_have_text(re.compile(r"[+-]\d\.\d\d"))
    assert notebook.page.evaluate("() => window.broken") is None and notebook.panel.locator("img").count() == 0
    assert notebook.complaints == []


def test_states_stored_by_keys_answer_the_next_query(sheet):
    notebook = sheet("03_rerank")
    notebook.first()
    notebook.tab_to(notebook.button("Store states"))
    notebook.press("Enter")
    expect(notebook.panel.locator(".rm-lists")).to_contain_text("from states")
    assert notebook.complaints == []


def test_a_picked_query_shows_judgements_and_another_document_is_read_by_keys(sheet):
    notebook = sheet("03_rerank")
    notebook.first()
    notebook.press("ArrowRight")
    expect(notebook.panel.locator(".rm-lists section").first).to_contain_text(
        "relevant"
    )  # where the first one is, or that none is
    expect(notebook.panel.locator(".rm-document")).to_be_visible()
    before = notebook.panel.locator(".rm-document").inner_text()
    notebook.slider("document").focus()
    notebook.press("ArrowRight")
    expect(notebook.panel.locator(".rm-document")).not_to_have_text(before)
    assert notebook.complaints == []


def test_the_numbers_of_stored_states_follow_the_sliders(sheet):
    notebook = sheet("06_state_cache")
    cards = notebook.panel.locator(".rm-cards")
    before = cards.inner_text()
    notebook.slider("format").focus()
    notebook.press("ArrowRight")
    expect(cards).not_to_have_text(before)
    assert notebook.complaints == []


def test_a_measurement_made_by_keys_joins_the_table(sheet):
    notebook = sheet("05_profile")
    notebook.first()
    notebook.tab_to(notebook.slider("length"))
    notebook.press("ArrowRight")
    length = notebook.readout("length").inner_text()
    notebook.tab_to(notebook.button("Measure"))
    notebook.press("Enter")
    row = notebook.panel.locator(".rm-costs tbody tr").first
    expect(row).to_contain_text("training")  # inference came first
    expect(row.locator("td").nth(1)).to_have_text(f"{int(length):,}")
    assert notebook.complaints == []
