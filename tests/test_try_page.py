"""The page to try a classifier: its script against onnxruntime in Node.js, and the whole page in a real browser.

What the machine lacks, Node.js or Chromium with its driver and selenium, is named by the test that is skipped.
"""

import contextlib
import json
import shutil
import subprocess
import time

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from test_app import BROWSER, DRIVER, FLAGS, PARTS, shoot

from tiny_nbdev.classify.export import export_onnx
from tiny_nbdev.classify.students import create_student
from tiny_nbdev.predict import Predictor, read_pixels
from tiny_nbdev.run.network_pack import fit_network, pack_network, read_graph
from tiny_nbdev.run.network_script import NETWORK_JS
from tiny_nbdev.run.try_page import MOST_BYTES, write_try_page

NODE = shutil.which("node")
in_node = pytest.mark.skipif(not NODE, reason="not installed: node")
MISSING = [name for name in ("chromium", "chromedriver", "selenium") if not PARTS[name]]
in_browser = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
TOLERANCE = 1e-3
NAMES = ("cup", "Vögel & <b>co</b>", "knife", "plate", "spoon")
RUN = """
const read = name => require("fs").readFileSync(name), text = name => read(name).toString();
const run = loadNetwork(text("graph.json"), text("weights.txt"));
const ask = ([h, w], i) => run(new Uint8Array(read(`${i}.rgb`)), h, w);
console.log(JSON.stringify(JSON.parse(text("sizes.json")).map(ask)));
"""


def a_model(path, name="conv4", views=False, **kwargs):
    "A student with random weights and a head that has opinions."
    torch.manual_seed(0)
    student = create_student(name, len(NAMES), **kwargs).eval()
    student.tta_flip = student.tta_shift = views
    with torch.no_grad():
        student.head.weight.mul_(15)
    export_onnx(student, path, NAMES)
    return path


def pictures(folder, n=100):
    "PNG files of odd sizes: noise, gradients, grey, transparent, with a palette."
    rng, files = np.random.default_rng(0), []
    for i in range(n):
        h, w = rng.integers(1, 200, 2)
        y, x = np.mgrid[:h, :w]
        smooth = [(x * rng.integers(1, 5) + y * rng.integers(1, 5)) % 256 for _ in range(4)]
        a = np.stack(smooth, -1) if i % 2 else rng.integers(0, 256, (h, w, 4))
        image = Image.fromarray(a.astype(np.uint8)[..., : 4 if i % 10 == 3 else 3])
        image = image.convert({5: "L", 6: "P", 7: "1"}.get(i % 10, image.mode))
        files.append(folder / f"{i:03d}.png")
        image.save(files[-1])
    return files


def said_by_node(folder, packed, images):
    "Probabilities of images, from the script."
    for i, x in enumerate(images):
        (folder / f"{i}.rgb").write_bytes(x.tobytes())
    (folder / "sizes.json").write_text(json.dumps([x.shape[:2] for x in images]))
    (folder / "graph.json").write_text(packed.graph)
    (folder / "weights.txt").write_text(packed.weights)
    (folder / "run.js").write_text(NETWORK_JS + RUN)
    done = subprocess.run([NODE, "run.js"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def off(said, want):
    return max(float(np.abs(np.array(a["probabilities"]) - p).max()) for a, p in zip(said, want, strict=True))


def from_python(model, files):
    predictor = Predictor(model)
    return [predictor(read_pixels(f)[None])[0] for f in files]


@in_node
@pytest.mark.parametrize(
    "name, kwargs",
    [("conv4", dict(image_size=64)), ("conv4", dict(image_size=48, views=True)), ("lite_student", dict(image_size=96))],
    ids=["conv4", "views", "lite"],
)
def test_the_script_says_what_onnxruntime_says(tmp_path, name, kwargs):
    model = a_model(tmp_path / "model.onnx", name, **kwargs)
    files = pictures(tmp_path, 100 if kwargs == dict(image_size=64) else 20)
    packed = pack_network(onnx.load(str(model)))
    said = said_by_node(tmp_path, packed, [read_pixels(f) for f in files])
    want = from_python(model, files)
    assert off(said, want) < 1e-5
    assert np.ptp(want, axis=0).max() > 0.05, "the answers differ from image to image"


@in_node
def test_a_second_output_comes_as_well(tmp_path):
    model = read_graph(a_model(tmp_path / "model.onnx"))
    text = """<ir_version: 8, opset_import: ["" : 18]> g (float[n, C] p) => (float[n] unlike)
    <int64[1] last = {-1}, float a = {3.0}, float b = {0.1}, float one = {1.0}> {
    l = Log (p) m = Mul (l, a) e = ReduceLogSumExp <keepdims = 0> (m, last) s = Mul (e, b) t = Sigmoid (s)
    small = Less (t, one) unlike = Where (small, t, one) }"""
    more = onnx.parser.parse_model(text)
    both = onnx.compose.merge_models(
        model,
        onnx.compose.add_prefix(more, "u/", rename_outputs=False),
        io_map=[("probabilities", "u/p")],
        outputs=["probabilities", "unlike"],
    )
    image = np.random.default_rng(0).integers(0, 256, (41, 33, 3), dtype=np.uint8)
    (said,) = said_by_node(tmp_path, pack_network(both), [image])
    (tmp_path / "both.onnx").write_bytes(both.SerializeToString())
    want = Predictor(tmp_path / "both.onnx").session.run(["unlike"], {"image": image[None]})[0]
    assert abs(said["unlike"][0] - float(want[0])) < 1e-5 and 0 < want[0] < 1


@in_node
def test_fewer_bits_stay_within_a_thousandth(tmp_path):
    model = read_graph(a_model(tmp_path / "model.onnx", image_size=64))
    packed, difference = fit_network(model, [], 260_000)
    assert packed.bits < 16 and packed.size <= 260_000 and 0 < difference <= 8e-4
    files = pictures(tmp_path, 20)
    images = [read_pixels(f) for f in files]
    assert off(said_by_node(tmp_path, packed, images), from_python(tmp_path / "model.onnx", files)) < TOLERANCE


@contextlib.contextmanager
def opened(folder, page, size=(900, 1100)):
    "The page in a new browser, from the disk."
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in [*FLAGS.split(), f"--user-data-dir={folder}", f"--window-size={size[0]},{size[1]}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        driver.get(page.as_uri())
        yield driver
        bad = [e["message"] for e in driver.get_log("browser") if e["level"] in ("SEVERE", "WARNING")]
        assert not [m for m in bad if "Content Security" in m or "Uncaught" in m], bad
    finally:
        driver.quit()


def ask(driver, files, patience=240):
    "What the page says to files that are given through its button, by file name."
    names = json.dumps([f.name for f in files])
    driver.find_element("id", "files").send_keys("\n".join(map(str, files)))
    end, found = time.time() + patience, {}
    while time.time() < end and len(found) < len(files):
        found = driver.execute_script(f"""
        const cards = Array.from(document.querySelectorAll(".card[data-done]"), c => [c.dataset.done,
          c.querySelector(".answer").dataset.said || c.querySelector(".answer").textContent]);
        return Object.fromEntries(cards.filter(([n]) => {names}.includes(n)));""")
        time.sleep(0.2)
    return [json.loads(t) if (t := found[f.name]).startswith("{") else t for f in files]


@in_browser
@pytest.mark.slow
@pytest.mark.parametrize(
    "name, kwargs, n", [("conv4", dict(image_size=64), 100), ("lite_student", dict(image_size=128), 20)]
)
def test_the_page_says_what_python_says(tmp_path, name, kwargs, n):
    model = a_model(tmp_path / "model.onnx", name, **kwargs)
    made = write_try_page(tmp_path / "try.html", model)
    assert made["bytes"] <= MOST_BYTES
    files = pictures(tmp_path, n)
    with opened(tmp_path / "profile", tmp_path / "try.html") as d:
        said = ask(d, files)
        shoot(d, f"try_{name}")
        assert "<b>co</b>" in d.find_element("tag name", "h1").text, "names are text"
        ms = sorted(int(e.text.split()[0].replace(",", "")) for e in d.find_elements("css selector", ".time"))
    difference = off(said, from_python(model, files))
    print(f"{name}: {made}, differs by {difference:.1e} on {n} images, median {ms[len(ms) // 2]} ms")
    assert difference < TOLERANCE


@in_browser
@pytest.mark.slow
def test_photos_as_people_have_them(tmp_path):
    model, files = a_model(tmp_path / "model.onnx", image_size=64), []
    write_try_page(tmp_path / "try.html", model)
    y, x = np.mgrid[:600, :800]
    photo = Image.fromarray(np.stack([x * 255 // 800, y * 255 // 600, (x + y) % 256], -1).astype(np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    for file, about in (("plain.jpg", {}), ("turned.jpg", dict(exif=turned)), ("photo.webp", dict(lossless=True))):
        files.append(tmp_path / file)
        photo.save(files[-1], **about)
    files.append(tmp_path / "large.png")
    photo.resize((5001, 4001)).save(files[-1])
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    with opened(tmp_path / "profile", tmp_path / "try.html", (420, 1000)) as d:
        said = ask(d, files)
        wide = d.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
        assert wide[0] <= wide[1] + 1, "nothing sticks out on a phone"
        bad = ask(d, [tmp_path / "text.jpg", tmp_path / "empty.png"])
        shoot(d, "try_phone")
        d.find_element("id", "camera").click()  # the browser's own moving picture
        end = time.time() + 60
        while time.time() < end and not d.find_elements("css selector", "#live-answer .bar"):
            time.sleep(0.3)
        assert len(d.find_elements("css selector", "#live-answer .bar")) == len(NAMES)
        d.find_element("id", "camera").click()
        assert not d.find_element("id", "live").is_displayed()
    for file, answer, want in zip(files, said, from_python(model, files)):
        difference = off([answer], [want])
        print(f"{file.name}: differs by {difference:.1e}")
        assert difference < (TOLERANCE if file.suffix != ".jpg" else 1e-2), file.name
    assert "text.jpg is not an image that this browser can read" in bad[0] and "empty.png is empty (0 bytes)" in bad[1]
