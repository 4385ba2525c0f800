"""The app in a real browser: drop photos, work, predict, close the browser in the middle and open it again.

Needs Chromium with its driver, selenium and Voilà; without one of them the tests say so and are skipped. What lies
below the widgets is tested in the notebooks 82b to 82i, without a browser.
"""

import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import SCRIPT, command, photo

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
PARTS = dict(chromium=BROWSER, chromedriver=DRIVER)
PARTS |= {name: importlib.util.find_spec(name) for name in ("selenium", "voila", "anywidget", "ipywidgets")}
MISSING = [name for name, found in PARTS.items() if not found]
in_browser = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --use-fake-device-for-media-stream "
    "--use-fake-ui-for-media-stream"
)
PATIENCE = 300  # Seconds; a busy machine takes a minute to load the libraries


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def served(home, *more):
    "The command, and the address that it says."
    port = free_port()
    with open(home.parent / "server.log", "wb") as log:
        words = [str(SCRIPT), "app", str(home), "--port", str(port), *more]
        server = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT)
    try:
        url = f"http://127.0.0.1:{port}/"
        for _ in range(PATIENCE):
            assert server.poll() is None, (home.parent / "server.log").read_text()
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(1)
        yield url
    finally:
        server.terminate()
        server.wait(30)


@contextlib.contextmanager
def browser(folder, url, size=(1000, 1400)):
    "A new browser on a page, once it is there."
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in [*FLAGS.split(), f"--user-data-dir={folder}", f"--window-size={size[0]},{size[1]}"]:
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        driver.set_page_load_timeout(PATIENCE)
        driver.get(url)
        wait(driver, ".tn-app h1")
        yield driver
    finally:
        driver.quit()


def wait(driver, selector, text="", patience=PATIENCE):
    "The first element that a selector finds and that is seen, once it holds a text."
    end = time.time() + patience
    while time.time() < end:
        with contextlib.suppress(Exception):  # elements are replaced while they are looked at
            for e in driver.find_elements("css selector", selector):
                if e.is_displayed() and text in e.text:
                    return e
        time.sleep(0.3)
    shot = os.environ.get("TINY_NBDEV_SHOTS")
    if shot:
        driver.save_screenshot(f"{shot}/failed.png")
    seen = [e.text for e in driver.find_elements("css selector", ".tn-app")]
    raise AssertionError(f"{selector} with {text!r} was not seen within {patience} s; the page says {seen}")


def click(driver, selector):
    e = wait(driver, selector)
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", e)
    e.click()


def type_into(driver, selector, text):
    e = wait(driver, f"{selector} input")
    e.clear()
    e.send_keys(text)
    e.send_keys("\t")


def drop(driver, selector, *files):
    "Choose files as a person does in the dialogue; returns at once."
    driver.find_element("css selector", f"{selector} input[type=file]").send_keys("\n".join(map(str, files)))


def shoot(driver, name):
    "A picture of the page, if TINY_NBDEV_SHOTS names a folder."
    if folder := os.environ.get("TINY_NBDEV_SHOTS"):
        driver.save_screenshot(f"{folder}/{name}.png")


def box(n):
    return f".tn-inner:nth-of-type({n})"


@in_browser
@pytest.mark.slow
def test_from_photos_to_prediction_with_the_browser_closed_in_between(tmp_path):
    home, given = tmp_path / "apps", tmp_path / "given"
    digits_like(given)
    with served(home) as url:
        with browser(tmp_path / "first", url) as d:
            type_into(d, ".tn-new-project", "digits")
            click(d, ".tn-make")
            for n, name in enumerate(("five", "six"), 1):
                type_into(d, ".tn-new-class", name)
                click(d, ".tn-add-class")
                wait(d, f"{box(n)} h3", name)
                drop(d, box(n), *sorted((given / name).glob("*.png")))
                wait(d, box(n), "4 photos")
            (given / "bad.jpg").write_bytes(b"no picture")
            drop(d, box(1), given / "bad.jpg")
            wait(d, ".tn-note", "bad.jpg is not an image that can be read")
            assert len(list((home / "digits" / "photos").rglob("*.png"))) == 8
            shoot(d, "photos")
            choose(d, "smoke", "tint", 40)
            click(d, ".tn-start")
            wait(d, ".tn-state", "images drawn")
            shoot(d, "working")
        state = (home / "digits" / "run" / "run.json").read_text()
        assert '"report"' not in state, "the browser was closed in the middle"
        with browser(tmp_path / "second", url, (420, 1400)) as d:  # the width of a phone
            wait(d, ".tn-state", "Done.")
            wide = d.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
            assert wide[0] <= wide[1] + 1, "nothing sticks out on a phone"
            drop(d, ".tn-try", next((given / "six").glob("*.png")))
            answer = wait(d, ".tn-answer h3").text
            assert answer in ("five", "six")
            wait(d, ".tn-answer .bar .val", "%")
            shoot(d, "phone")
            take_away(d, home / "digits" / "run")


def digits_like(folder):
    for c, name in enumerate(("five", "six")):
        for i in range(4):
            photo(folder / name / f"{i}.png", 100 * c + i, (32, 32))


def choose(d, preset, generator, number):
    "What is drawn, in the choices that unfold."
    click(d, ".tn-choices .jupyter-widget-Collapse-header")
    for selector, value in ((".tn-preset", preset), (".tn-generator", generator)):
        wait(d, f"{selector} select")
        end = time.time() + PATIENCE
        while value not in [o.text for o in d.find_elements("css selector", f"{selector} option")]:
            assert time.time() < end, "the names that are registered have not come"
            time.sleep(0.5)
        next(o for o in d.find_elements("css selector", f"{selector} option") if o.text == value).click()
    type_into(d, ".tn-number", str(number))


def take_away(d, run):
    "Two drawn images are wrong; the student learns again without them."
    wait(d, ".tn-drawn-count", "40 images of this class")
    for k in (0, 1):
        click(d, f".tn-drawn .tn-gallery button:nth-child({k + 1})")
    click(d, ".tn-take-away")
    wait(d, ".tn-drawn-count", "38 images of this class, 2 of all taken away")
    click(d, ".tn-learn-again")
    wait(d, ".tn-state", "At work")
    wait(d, ".tn-state", "Done.")
    assert len(list((run / "synthetic").rglob("*.png"))) == 78


@in_browser
@pytest.mark.slow
def test_no_file_is_handed_out_and_nobody_else_is_served(tmp_path):
    home = tmp_path / "apps"
    photo(home / "secret.png", 1)
    with served(home) as url:
        for path in ("voila/files/secret.png", "voila/files/app.ipynb", "files/secret.png"):
            with pytest.raises(urllib.error.HTTPError) as e:
                urllib.request.urlopen(url + path, timeout=60)
            assert e.value.code in (403, 404), path
        said = (tmp_path / "server.log").read_text()
        assert url in said and "token" not in said


def test_without_voila_one_sentence_says_what_to_do(tmp_path):
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "voila.py").write_text("raise ImportError('not installed')\n")
    hide = "import sys; sys.path.insert(0, 'hidden'); from tiny_nbdev.run.cli import main; sys.exit(main(['app', 'x']))"
    done = subprocess.run([sys.executable, "-c", hide], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "voila" in done.stderr and "[app]" in done.stderr and not (tmp_path / "x").exists()


@pytest.mark.skipif("voila" in MISSING or "anywidget" in MISSING, reason="needs voila and anywidget")
def test_a_port_in_use_is_one_sentence(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        done = command("app", tmp_path / "apps", "--port", s.getsockname()[1])
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "--port" in done.stderr and not Path(tmp_path / "apps").exists()
