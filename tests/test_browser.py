"""The notebooks as a person meets them: JupyterLab in a real Chromium, every cell run at scale tiny, the panels worked by keys.

A message on the browser's console fails the test. What the page looked like when a test failed is kept in results/browser/.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import papermill
import pytest
from papermill.parameterize import parameterize_notebook

from rankmamba.parameters import ROOT, declared, notebooks, settle
from rankmamba.results import read_records

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("no Chromium here (Debian, Ubuntu: apt-get install chromium)", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install 'rankmamba[e2e]'")
pytest.importorskip("jupyterlab", reason="JupyterLab is not installed: pip install 'rankmamba[e2e]'")
expect = playwright.expect

SCREENSHOTS = ROOT / "results" / "browser"
STEMS = [path.stem for path in notebooks()]
SECONDS_TO_RUN_ALL, SECONDS_TO_STOP = 30, 1.0
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


class Sheet:
    """An open notebook: its page, and what the browser's console said."""

    def __init__(self, page, url: str):
        self.page, self.complaints = page, []
        page.on("console", lambda message: message.type == "error" and self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.goto(url)
        page.locator(".jp-Notebook .jp-Cell").first.wait_for()
        page.evaluate(KERNEL_IS_READY)

    def run_all(self) -> float:
        """Run all cells; seconds until the last one is done."""
        started = time.monotonic()
        self.page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")
        return time.monotonic() - started

    def press(self, key: str, times: int = 1) -> None:
        for _ in range(times):
            self.page.keyboard.press(key)

    def tab_to(self, locator, most: int = 40) -> None:
        """Move the focus with the Tab key alone until it is on an element."""
        for _ in range(most):
            if locator.evaluate("element => element === document.activeElement"):
                return
            self.press("Tab")
        raise AssertionError(f"not reached with {most} times Tab: {locator}")


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
    options = ["--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0"]
    options += [f"--ServerApp.root_dir={home}", "--expose-app-in-browser"]
    options += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--LabApp.news_url=None"]
    with open(home / "server.log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options], env=environment, stdout=log, stderr=log, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    status = urllib.request.Request(f"{url}/api/status", headers={"Authorization": "token token"})
    for _ in range(300):
        try:
            urllib.request.urlopen(status, timeout=1)
            break
        except OSError:
            assert process.poll() is None, (home / "server.log").read_text()
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
def sheets(server, browser):
    """{stem: its sheet}, filled by the tests as they open notebooks."""
    yield (opened := {})
    assert opened


@pytest.fixture
def sheet(request, server, browser, sheets):
    """Open a notebook, or take the one that an earlier test has opened and run. A picture is kept if the test fails."""
    used, failed_before = [], request.session.testsfailed

    def take(stem: str) -> Sheet:
        if stem not in sheets:
            context = browser.new_context(viewport={"width": 1300, "height": 1600})
            sheets[stem] = Sheet(context.new_page(), f"{server}/lab/tree/{stem}.ipynb?token=token&reset")
        used.append(sheets[stem])
        return sheets[stem]

    yield take
    if request.session.testsfailed > failed_before:
        for number, one in enumerate(used):
            SCREENSHOTS.mkdir(parents=True, exist_ok=True)
            one.page.screenshot(path=SCREENSHOTS / f"{request.node.name}-{number}.png", full_page=True)


@pytest.mark.parametrize("stem", STEMS)
def test_run_all_shows_every_figure_and_no_error_within_thirty_seconds(stem, sheet, results):
    notebook = sheet(stem)
    seconds = notebook.run_all()
    page = notebook.page
    expect(page.locator('[data-mime-type="application/vnd.jupyter.stderr"] :text("Traceback")')).to_have_count(0)
    assert page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.error']").count() == 0
    assert seconds < SECONDS_TO_RUN_ALL
    assert notebook.complaints == []
