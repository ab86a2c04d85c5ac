"""A JupyterLab server and a browser that shows one of its notebooks."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

BROWSERS = ["chromium", "chromium-browser", "google-chrome"]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--disable-dev-shm-usage"]
SCREENSHOTS = Path(__file__).parent / "screenshots"


@pytest.fixture(scope="module")
def lab(request, tmp_path_factory):
    """The notebook made of the module's CELLS, open in a browser. Nothing has run yet."""
    pytest.importorskip("jupyterlab", reason="needs JupyterLab")
    pytest.importorskip("ipywidgets", reason="needs ipywidgets")
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not browser or not os.path.exists("/proc/self/environ"):
        pytest.skip(f"needs Linux and one of {', '.join(BROWSERS)}")
    import nbformat
    from playwright.sync_api import sync_playwright

    folder = tmp_path_factory.mktemp("lab")
    cells = [nbformat.v4.new_code_cell(source.strip()) for source in request.module.CELLS]
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(notebook, folder / "test.ipynb")
    with server(folder) as (url, token), sync_playwright() as playwright:
        with playwright.chromium.launch(executable_path=browser, args=FLAGS) as chromium:
            page = chromium.new_page(viewport={"width": 1100, "height": 1500})
            page.set_default_timeout(60_000)
            page.goto(f"{url}doc/tree/test.ipynb?token={token}")
            lab = Lab(page, folder)
            lab.kernel("Idle").wait_for()
            yield lab


@contextmanager
def server(folder):
    """JupyterLab in this folder, with settings of its own. Yields its URL and its token."""
    env = {**os.environ, "IPYTHONDIR": f"{folder}/ipython", "JUPYTER_PATH": ""}
    env |= {f"JUPYTER_{kind.upper()}_DIR": f"{folder}/{kind}"
            for kind in ("config", "data", "runtime")}
    env.pop("ZERO_REF_TIMEOUT", None)  # a reader has not set it either
    settings = folder / "config/lab/user-settings/@jupyterlab/apputils-extension"
    settings.mkdir(parents=True)  # without it, a question about news lies over the page
    (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false"}')
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root",
               "--expose-app-in-browser", f"--ServerApp.root_dir={folder}"]
    log = folder / "server.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=env, stdout=file, stderr=file,
                                   start_new_session=True)

    def started():
        assert process.poll() is None, log.read_text()
        for written in folder.glob("runtime/jpserver-*.json"):
            with suppress(ValueError):  # only half of it is written
                return json.loads(written.read_text())

    try:
        info = wait_for(started, 60)
        yield info["url"], info["token"]
    finally:
        for how in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, how)
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
                break


def wait_for(condition, seconds):
    """What `condition` returns, as soon as that is true."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{condition} is not true within {seconds} s"
        time.sleep(0.02)
    return value


class Lab:
    """One notebook in the browser. A cell is meant by its index."""

    def __init__(self, page, folder):
        self.page, self.folder = page, folder

    def cell(self, index):
        return self.page.locator(".jp-Notebook .jp-Cell").nth(index)

    def output(self, index):
        return self.cell(index).locator(".jp-Cell-outputArea")

    def press(self, index, key):
        self.cell(index).locator(".cm-content").press(key)

    def command(self, name):
        self.page.evaluate("name => void window.jupyterapp.commands.execute(name)", name)

    def kernel(self, status):
        return self.page.locator(f".jp-StatusBar-Widget >> text=/[|] {status}$/")

    def screenshot(self, name):
        self.page.mouse.move(0, 0)  # away from what shows a tooltip
        self.page.screenshot(path=SCREENSHOTS / name)

    def processes(self):
        """Ids of the fork server and of the ranks that it has forked. They have our folder in their
        environment, whoever their parent is by now."""
        ours = f"JUPYTER_RUNTIME_DIR={self.folder}/".encode()
        found = set()
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended, or is somebody else's
                if (b"forkserver" in (process / "cmdline").read_bytes()
                        and ours in (process / "environ").read_bytes()):
                    found.add(process.name)
        return found

    def wait_until_no_process(self):
        wait_for(lambda: not self.processes(), 10)
