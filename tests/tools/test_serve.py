"""The server: its answers against Detector.predict, what it refuses, load, its end, its page in a browser."""

import copy
import io
import json
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
pytest.importorskip("prometheus_client")
pytest.importorskip("python_multipart")

from prometheus_client.parser import text_string_to_metric_families

from benchmarks import serving as benchmark
from detr import Detections, Detector, UserError
from detr.drawing import draw_detections
from detr.images import jpeg
from detr.masks import Masks
from detr.reporting.attention import overlay
from tests.helpers.browser import COMMAND, Page
from tests.helpers.commands import REPOSITORY, TINY_MODEL, save_untrained
from tools import serve
from tools.serving.options import Options

HOSTILE = "<img src=x onerror='document.title=1'>&amp;"
JPEG = {"Content-Type": "image/jpeg"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("serve") / "best.pt"
    return save_untrained(path, [*TINY_MODEL, "data.size=64", "data.max_size=96"], (HOSTILE, "b", "c"), first=7)


@pytest.fixture(scope="module")
def detector(checkpoint: Path) -> Detector:
    return Detector.from_checkpoint(checkpoint)


@pytest.fixture(scope="module")
def photograph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """97 x 61 pixels as stored, to be turned by a quarter."""
    path, exif = tmp_path_factory.mktemp("photographs") / "photo.jpg", Image.Exif()
    exif[0x0112] = 6
    picture(0, 97, 61).save(path, quality=95, exif=exif)
    return path


def picture(seed: int, width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, form)
    return stream.getvalue()


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def content(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        assert self.content.keys() == {"error"} and self.headers["content-type"] == "application/json"
        return self.content["error"]


@dataclass
class Client:
    port: int

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body, headers or {}, encode_chunked=True)
        response = connection.getresponse()
        headers = {name.lower(): value for name, value in response.getheaders()}
        answer = Answer(response.status, headers, response.read())
        connection.close()
        return answer

    def detect(self, body: Any, query: str = "threshold=0", headers: dict[str, str] = JPEG) -> Answer:
        return self.ask("POST", f"/detect?{query}", body, headers)

    def metric(self, name: str, **labels: str) -> float:
        families = text_string_to_metric_families(self.ask("GET", "/metrics").body.decode())
        samples = [one for family in families for one in family.samples if one.name == name]
        return sum(one.value for one in samples if labels.items() <= one.labels.items())

    def wait(self, ready: Callable[[], bool]) -> None:
        end = time.monotonic() + 30
        while not ready():
            assert time.monotonic() < end
            time.sleep(0.02)


@contextmanager
def running(detector: Any, **options: Any) -> Iterator[Client]:
    """A server in a thread of this process, on a real socket."""
    server = serve.make_server(detector, "best.pt", Options(**options))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield Client(listener.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join()


class Gate(Detector):
    """A detector that waits until it may go on, and notes how many images came together."""

    def __init__(self, detector: Detector) -> None:
        vars(self).update(vars(detector))
        self.free, self.batches = threading.Event(), []
        self.free.set()  # the server tries the detector before it starts

    def predict(self, images: Any, threshold: float, *more: Any) -> list[Detections]:
        self.free.wait(30)
        if isinstance(images, list):
            self.batches.append(len(images))
        return super().predict(images, threshold, *more)


def rows_of(found: Detections, ids: Sequence[int] = (7, 8, 9)) -> list[dict[str, Any]]:
    return [
        {"name": one.name, "score": one.score, "box": list(one.box), "label": one.label, "category_id": ids[one.label]}
        for one in found
    ]


def test_answers_equal_predict(detector: Detector, photograph: Path) -> None:
    everything = detector.predict(photograph, threshold=0.0)[0]
    threshold = float(everything.scores[3])
    content = photograph.read_bytes()
    form = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n' + content + b"\r\n--x--\r\n"
    with running(detector, threshold=threshold) as client:
        answer = client.detect(content)
        assert answer.status == 200 and answer.content == {
            "image": {"width": 61, "height": 97},  # upright
            "threshold": 0.0,
            "detections": rows_of(everything),
        }
        fewer = client.detect(content, "").content
        assert fewer["threshold"] == threshold and fewer["detections"] == rows_of(everything)[:4]
        for body, kind in ((content, "application/octet-stream"), (form, "multipart/form-data; boundary=x")):
            assert client.detect(body, headers={"Content-Type": kind}).body == answer.body
        assert client.detect(iter([content[:999], content[999:]])).body == answer.body, "without a length"
        drawn = client.detect(content, "threshold=0&format=image")
        assert drawn.headers["content-type"] == "image/jpeg"
        assert drawn.body == jpeg(draw_detections(upright(photograph), everything), 92)


def upright(path: Path) -> Image.Image:
    return Image.open(path).transpose(Image.Transpose.ROTATE_270)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "BMP", "TIFF", "GIF", "16-bit PNG", "16-bit TIFF", "gray PNG"])
def test_kinds_of_images(form: str, detector: Detector, tmp_path: Path, served: Client) -> None:
    image = picture(3, 40, 30)
    depth, _, form = form.rpartition(" ")
    if depth == "gray":
        image = image.convert("L")
    if depth == "16-bit":
        image = Image.fromarray(np.asarray(image.convert("L"), dtype=np.uint16) * 257)
    (tmp_path / "image").write_bytes(encoded(image, form))
    answer = served.detect((tmp_path / "image").read_bytes())
    assert answer.content["detections"] == rows_of(detector.predict(tmp_path / "image", threshold=0.0)[0])


@pytest.fixture(scope="module")
def served(detector: Detector) -> Iterator[Client]:
    with running(detector, max_bytes=50_000, max_pixels=10_000, timeout=0.5) as client:
        yield client


@pytest.mark.parametrize(
    "change, status, message",
    [
        ({"query": "threshold=1.5"}, 422, "threshold: wanted a number from 0 to 1, got '1.5'."),
        ({"query": "threshold=nan"}, 422, "wanted a number from 0 to 1"),
        ({"query": "threshold=high"}, 422, "got 'high'"),
        ({"query": "format=xml"}, 422, "format: wanted json or image, got 'xml'."),
        ({"query": "thresold=0.1"}, 422, "no parameter 'thresold' here, but threshold and format"),
        ({"headers": {"Content-Type": "text/plain"}}, 415, "image/jpeg, or in the field image of a multipart form"),
        ({"headers": {"Content-Type": "multipart/form-data"}}, 400, "Missing boundary"),
        ({"headers": {"Content-Type": "multipart/form-data; boundary=x"}}, 400, "Invalid multipart data"),
        ({"body": b""}, 400, "holds no image"),
        ({"body": b"GIF?"}, 415, "no image that can be read"),
        ({"body": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"}, 415, "no image that can be read"),
        ({"body": b"x" * 50_001}, 413, "more than the 50000 bytes"),
        ({"body": iter([b"x" * 30_000, b"x" * 30_000])}, 413, "more than the 50000 bytes"),
        ({"body": encoded(Image.new("1", (101, 100)))}, 413, "more than the 10000 pixels"),
        ({"body": encoded(Image.new("1", (20_000, 20_000)))}, 413, "more than the 10000 pixels"),
        ({"body": encoded(picture(0, 90, 90))[:-600]}, 422, "damaged or cut short"),
    ],
)
def test_what_is_wrong_with_a_request(change: dict[str, Any], status: int, message: str, served: Client) -> None:
    answer = served.detect(**{"body": encoded(picture(0, 9, 9)), **change})
    assert (answer.status, message in answer.error) == (status, True), answer
    assert served.detect(encoded(picture(0, 9, 9))).status == 200


def test_forms_without_an_image(served: Client) -> None:
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    for disposition in ('name="other"; filename="a"', 'name="image"'):
        body = f"--x\r\nContent-Disposition: form-data; {disposition}\r\n\r\nabc\r\n--x--\r\n".encode()
        answer = served.detect(body, headers=headers)
        assert answer.status == 400 and "no file in its field image" in answer.error


def test_wrong_paths_and_methods(served: Client) -> None:
    assert served.ask("GET", "/nothing").error == "There is no /nothing here."
    assert served.ask("GET", "/..%2fapp.py").status == served.ask("GET", "/index.html").status == 404
    answer = served.ask("GET", "/detect")
    assert (answer.status, answer.error) == (405, "/detect takes POST, not GET.")


def request_head(length: int) -> bytes:
    return f"POST /detect HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {length}\r\n\r\n".encode()


def test_slow_senders_get_an_answer_in_time(served: Client) -> None:
    with socket.create_connection(("127.0.0.1", served.port), timeout=30) as sender:
        sender.sendall(request_head(1000) + b"abc")
        answer = b"".join(iter(lambda: sender.recv(2**16), b""))
    assert answer.startswith(b"HTTP/1.1 408 ") and b"did not arrive within 0.5 seconds" in answer


def test_senders_that_go_away_leave_nothing_behind(served: Client) -> None:
    before = served.metric("detr_requests_total", status="499")
    with socket.create_connection(("127.0.0.1", served.port), timeout=30) as sender:
        sender.sendall(request_head(1000) + b"abc")
        served.wait(lambda: served.metric("detr_queue_length") == 1)
    served.wait(lambda: served.metric("detr_requests_total", status="499") == before + 1)
    assert served.metric("detr_queue_length") == 0


def test_what_waits_is_run_together_and_equals_alone(detector: Detector) -> None:
    """Where the model gets images at one size: with padding, it would find other things than in each alone."""
    sizes = [(90, 60), (45, 30), (90, 60), (64, 64), (60, 90), (180, 120), (90, 60)]
    images = [picture(number, *size) for number, size in enumerate(sizes)]
    limits = [0.2, 0.0, 0.1, 0.2, 0.15, 0.05, 0.0]
    gate = Gate(detector)
    with running(gate, batch_size=3) as client, ThreadPoolExecutor(8) as pool:
        gate.free.clear()
        gate.batches.clear()
        first = pool.submit(client.detect, encoded(picture(9, 70, 70)))
        client.wait(lambda: client.metric("detr_batch_size_count") == 1)
        answers = []
        for number, (image, limit) in enumerate(zip(images, limits, strict=True)):
            answers.append(pool.submit(client.detect, encoded(image), f"threshold={limit}"))
            client.wait(lambda waiting=number + 2: client.metric("detr_queue_length") == waiting)
            time.sleep(0.1)  # until it is decoded
        gate.free.set()
        assert first.result().status == 200
        contents = [answer.result().content for answer in answers]
        assert gate.batches == [1, 3, 1, 1, 2]
        assert client.metric("detr_images_total") == client.metric("detr_batch_size_sum") == 8
        assert client.metric("detr_batch_size_bucket", le="1.0") == 3
        assert client.metric("detr_requests_total", endpoint="detect", status="200") == 8
        assert client.metric("detr_request_seconds_count", endpoint="detect") == 8
        assert client.metric("detr_queue_length") == 0
    for image, limit, content in zip(images, limits, contents, strict=True):
        alone = rows_of(detector.predict(image, threshold=limit)[0])
        assert len(alone) == len(content["detections"]) > 0
        for one, other in zip(alone, content["detections"], strict=True):
            score, box = pytest.approx(one["score"], abs=1e-5), pytest.approx(one["box"], abs=1e-3)
            assert other == {**one, "score": score, "box": box}


def test_an_incomplete_batch_may_wait(detector: Detector) -> None:
    gate = Gate(detector)
    with running(gate, batch_size=3, max_wait=60_000) as client, ThreadPoolExecutor(3) as pool:
        gate.batches.clear()
        gate.free.clear()
        answers = [pool.submit(client.detect, encoded(picture(0, 9, 9))) for _ in range(3)]
        gate.free.set()
        assert [answer.result().status for answer in answers] == [200] * 3
    assert gate.batches == [3]


def test_one_image_spoils_no_other(detector: Detector) -> None:
    """The model's outputs are not finite for an image whose first pixel is red, as it may happen in half precision."""

    def spoil(model: Any, arguments: Any, predictions: Any) -> Any:
        red = arguments[0].images[:, :, 0, 0].eq(torch.tensor([255, 0, 0])).all(1)
        return replace(predictions, logits=predictions.logits.masked_fill(red[None, :, None, None], torch.nan))

    good, bad = picture(0, 20, 20), Image.new("RGB", (20, 20), "red")
    expected = detector.predict([good, good], threshold=0.0)
    detector = copy.deepcopy(detector)
    detector.model.register_forward_hook(spoil)
    gate = Gate(detector)
    with running(gate) as client, ThreadPoolExecutor(4) as pool:
        gate.free.clear()
        gate.batches.clear()
        futures = [pool.submit(client.detect, encoded(image)) for image in (good, bad, good)]
        client.wait(lambda: client.metric("detr_queue_length") == 3)
        time.sleep(0.3)
        gate.free.set()
        first, spoilt, last = (future.result() for future in futures)
        assert spoilt.status == 500 and "NaN or infinite for 1 of 1 images" in spoilt.error
        assert [first.status, last.status] == [200, 200] and client.detect(encoded(good)).status == 200
        for answer, found in zip((first, last), expected, strict=True):
            scores = [row["score"] for row in answer.content["detections"]]
            assert scores == pytest.approx(found.scores.tolist(), abs=1e-5)


def test_a_failure_of_ours_is_reported_without_its_details(detector: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(detector) as client:
        monkeypatch.setattr(detector, "predict", lambda *arguments: 1 / 0)
        answer = client.detect(encoded(picture(0, 9, 9)))
        assert (
            answer.status == 500 and answer.error == "The model failed on this image. The log of the server says why."
        )
        assert client.ask("GET", "/healthz").content["ready"]


def test_more_than_the_queue_holds_is_sent_away(detector: Detector) -> None:
    gate, content = Gate(detector), encoded(picture(0, 9, 9))
    with running(gate, batch_size=1, max_queue=3) as client, ThreadPoolExecutor(3) as pool:
        gate.free.clear()
        accepted = [pool.submit(client.detect, content) for _ in range(3)]
        client.wait(lambda: client.metric("detr_queue_length") == 3)
        for _ in range(2):
            answer = client.detect(content)
            assert answer.status == 503 and answer.headers["retry-after"] == "1"
            assert answer.error == "3 images are waiting already. Try again soon."
        gate.free.set()
        assert [one.result().status for one in accepted] == [200] * 3
        assert client.detect(content).status == 200


def test_attention_is_that_of_the_detector(detector: Detector, photograph: Path) -> None:
    maps = detector.attention(photograph, threshold=0.0)
    with running(detector) as client:
        assert client.ask("GET", "/info").content["attention"]
        content = photograph.read_bytes()
        answer = client.ask("POST", "/attention?threshold=0&index=2", content, JPEG)
        assert answer.status == 200 and answer.body == jpeg(overlay(upright(photograph), maps.decoder[2]), 92)
        for query, part in (
            ("threshold=0&index=99", "there are 7 detections of at least 0, got 99"),
            ("threshold=0&index=-1", "index: wanted the number of a detection"),
            ("threshold=0", "index: wanted the number of a detection"),
        ):
            answer = client.ask("POST", f"/attention?{query}", content, JPEG)
            assert answer.status == 422 and part in answer.error


def test_a_model_without_attention_says_so(detector: Detector) -> None:
    """As an exported one: it predicts, and has categories, and nothing else."""

    class Exported:
        categories, predict = detector.categories, staticmethod(detector.predict)

    with running(Exported()) as client:
        info = client.ask("GET", "/info").content
        assert not info["attention"] and not info["masks"] and info["size"] is None
        answer = client.ask("POST", "/attention?index=0", encoded(picture(0, 9, 9)), JPEG)
        assert (answer.status, answer.error) == (501, "This model does not show where it looks.")
        assert client.detect(encoded(picture(0, 9, 9))).status == 200


@pytest.fixture(scope="module")
def with_masks(tmp_path_factory: pytest.TempPathFactory) -> Detector:
    path = tmp_path_factory.mktemp("masks") / "best.pt"
    options = [*TINY_MODEL, "data.size=64", "data.max_size=96", "model/masks=dot_product"]
    return Detector.from_checkpoint(save_untrained(path, options, (HOSTILE, "b")))


def test_masks_are_those_of_the_detector(with_masks: Detector) -> None:
    image = picture(1, 50, 40)
    found = with_masks.predict(image, threshold=0.0)[0]
    with running(with_masks) as client:
        assert client.ask("GET", "/info").content["masks"]
        rows = client.detect(encoded(image)).content["detections"]
        assert [row["segmentation"] for row in rows] == found.masks.rows()
        assert client.detect(encoded(image), "threshold=1").content["detections"] == []


def test_what_the_server_says_of_itself(served: Client) -> None:
    assert served.ask("GET", "/healthz").content == {"ready": True, "model": "best.pt", "classes": [HOSTILE, "b", "c"]}
    info = served.ask("GET", "/info").content
    assert [(one["name"], one["category_id"]) for one in info["classes"]] == [(HOSTILE, 7), ("b", 8), ("c", 9)]
    assert info["threshold"] == 0.5 and info["size"] == "short side 64 and long side at most 96 pixels"
    for path in ("/", "/page.js", "/page.css", "/icon.svg", "/info", "/nothing"):
        headers = served.ask("GET", path).headers
        assert headers["content-security-policy"].startswith("default-src 'self';") and "server" not in headers
        assert headers["x-content-type-options"] == "nosniff"
        assert not any(name.startswith("access-control") for name in headers)
    assert "text/html" in served.ask("GET", "/").headers["content-type"]
    assert "javascript" in served.ask("GET", "/page.js").headers["content-type"]


def test_the_page_loads_nothing_from_elsewhere() -> None:
    for path in (REPOSITORY / "tools" / "serving" / "page").iterdir():
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|//\w+\.|innerHTML|insertAdjacentHTML|document\.write|\beval\b", text), path


@pytest.mark.skipif(COMMAND is None, reason="needs Chromium")
@pytest.mark.parametrize("width, height", [(390, 844), (1280, 900)])
def test_the_page_in_a_browser(width: int, height: int, with_masks: Detector, photograph: Path, tmp_path: Path) -> None:
    count = len(with_masks.predict(photograph, threshold=0.05)[0])
    with running(with_masks, threshold=0.05) as client, Page(tmp_path / "browser", width, height) as page:
        page.open(f"http://127.0.0.1:{client.port}/")
        page.wait("document.title == 'best.pt'")
        page.choose_file("#file", photograph)
        page.wait("!document.getElementById('results').hidden")
        assert page.value("document.documentElement.scrollWidth") <= width
        names = page.value("[...document.querySelectorAll('#list span')].map((name) => name.textContent)")
        assert len(names) == count > 0 and set(names) <= {HOSTILE, "b"} and HOSTILE in names
        assert page.value("document.querySelectorAll('img').length") == 0, "names of classes are text"
        ratio = page.value("document.getElementById('picture').width / document.getElementById('picture').height")
        assert ratio == pytest.approx(61 / 97, rel=0.02), "upright"

        page.value("document.querySelector('#list button').click()")
        page.wait("image.maps.has(0) && document.getElementById('busy').hidden")
        assert page.value("document.querySelectorAll('[aria-pressed=true]').length") == 1
        page.value("dispatchEvent(new KeyboardEvent('keydown', { key: 'Escape' }))")
        assert page.value("document.querySelectorAll('[aria-pressed=true]').length") == 0
        slide = "const slider = document.getElementById('threshold'); slider.value = 1; slider.dispatchEvent(new Event('input'))"
        page.value(f"(() => {{ {slide} }})()")
        assert page.value("document.querySelectorAll('#list li').length") == 0
        assert "Nothing reaches this score" in page.value("document.getElementById('count').textContent")
        assert page.problems() == []

        page.choose_file("#file", REPOSITORY / "README.md")
        page.wait("!document.getElementById('error').hidden")
        assert "no image that can be read" in page.value("document.getElementById('error').textContent")


@pytest.mark.skipif(COMMAND is None, reason="needs Chromium")
def test_the_page_hides_what_a_model_cannot_show(detector: Detector, photograph: Path, tmp_path: Path) -> None:
    class Exported:
        categories, predict = detector.categories, staticmethod(detector.predict)

    with running(Exported(), threshold=0.05) as client, Page(tmp_path, 390, 844) as page:
        page.open(f"http://127.0.0.1:{client.port}/")
        page.choose_file("#file", photograph)
        page.wait("!document.getElementById('results').hidden")
        assert page.value("document.getElementById('attention').hidden")
        assert "to see it alone" in page.value("document.getElementById('hint').textContent")
        page.value("document.querySelector('#list button').click()")
        assert page.value("document.getElementById('hint').textContent") == "Choose it again, or Escape, to see all."
        assert client.metric("detr_requests_total", endpoint="attention") == 0 and page.problems() == []


@pytest.mark.skipif(COMMAND is None, reason="needs Chromium")
def test_the_page_reads_masks_as_coco_writes_them(detector: Detector, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand((3, 37, 53), generator=generator) > 0.5
    masks = torch.cat((masks, torch.zeros(1, 37, 53, dtype=torch.bool), torch.ones(1, 37, 53, dtype=torch.bool)))
    masks[0, :20], masks[0, 30:], masks[0, :, :9] = False, False, False
    script = """(([segmentation]) => {
        const mask = maskOf(segmentation, "#ff8000");
        if (!mask) return null;
        const { picture: { width, height } } = mask;
        const data = mask.picture.getContext("2d").getImageData(0, 0, width, height).data;
        return [mask.left, mask.top, width, height, [...data].filter((_, place) => place % 4 === 3)];
    })"""
    with running(detector) as client, Page(tmp_path, 390, 844) as page:
        page.open(f"http://127.0.0.1:{client.port}/")
        for mask, row in zip(masks.numpy(), Masks.encode(masks).rows(), strict=True):
            drawn = page.value(f"{script}([{json.dumps(row)}])")
            back = np.zeros_like(mask)
            if drawn is not None:
                left, top, width, height, values = drawn
                back[top : top + height, left : left + width] = np.reshape(values, (height, width)) > 0
            assert np.array_equal(back, mask)


@contextmanager
def command(*options: str) -> Iterator[tuple[subprocess.Popen[str], int, list[str]]]:
    """tools/serve.py as a user starts it: its process, its port, and what it logged until then."""
    arguments = [sys.executable, "tools/serve.py", *options, "--port", "0", "--device", "cpu"]
    with subprocess.Popen(arguments, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True) as process:
        try:
            lines: list[str] = []
            assert process.stderr is not None
            while not lines or not re.search("reaches", lines[-1]):
                lines.append(process.stderr.readline())
                assert lines[-1], lines
            (port,) = re.findall(r"http://\S+:(\d+)", "".join(lines))
            yield process, int(port), lines
        finally:
            process.kill()


@pytest.mark.parametrize(
    "number, host, notice",
    [
        (signal.SIGTERM, "127.0.0.1", "INFO: Only this machine reaches it."),
        pytest.param(signal.SIGINT, "0.0.0.0", "there is no authentication", marks=pytest.mark.slow),
    ],
)
def test_a_signal_under_load_loses_no_answer(number: signal.Signals, host: str, notice: str, tmp_path: Path) -> None:
    path = save_untrained(tmp_path / "best.pt", [*TINY_MODEL, "data.size=480", "data.max_size=640"], ("a", "b"))
    content, count = encoded(picture(0, 40, 30)), 10
    options = (str(path), "--host", host, "--batch-size", "2")
    with command(*options) as (process, port, lines), ThreadPoolExecutor(count) as pool:
        assert notice in lines[-1], lines
        client = Client(port)
        futures = [pool.submit(client.detect, content) for _ in range(count)]
        client.wait(lambda: client.metric("detr_queue_length") + client.metric("detr_images_total") >= count)
        process.send_signal(number)
        answers = [future.result() for future in futures]
        assert [answer.status for answer in answers] == [200] * count
        scores = np.array([[row["score"] for row in answer.content["detections"]] for answer in answers])
        assert np.allclose(scores, scores[0], atol=1e-5)
        assert process.wait(30) == 0
        with pytest.raises(ConnectionRefusedError):
            client.ask("GET", "/healthz")


def test_the_commands_of_the_documentation(detector: Detector, photograph: Path, tmp_path: Path) -> None:
    """They are taken as they are written, with the port of this test."""
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    shutil.copy(photograph, tmp_path / "photo.jpg")
    text = (REPOSITORY / "docs" / "serving.md").read_text()
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    commands = [line for language, block in blocks if language == "bash" for line in block.splitlines()]
    starts = [shlex.split(line) for line in commands if line.startswith("python tools/serve.py ")]
    requests = [line for line in commands if line.startswith("curl ")]
    assert len(starts) == 2 and len(requests) == 7 and len(commands) == 9
    assert [serve.read_options(words[2:])[0].checkpoint for words in starts] == ["best.pt"] * 2
    with running(detector, threshold=0.0) as client:
        for line in requests:
            arguments = [*shlex.split(line.replace("127.0.0.1:8000", f"127.0.0.1:{client.port}")), "--fail", "--silent"]
            done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, check=False)
            assert done.returncode == 0 and (done.stdout or "-o" in arguments), line
    for name in ("found.jpg", "looked.jpg"):
        assert Image.open(tmp_path / name).size == (61, 97)


def test_packages_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    monkeypatch.setitem(sys.modules, "python_multipart", None)
    with pytest.raises(UserError, match=r"package python_multipart\. .*pip install 'detr-framework\[serve\]'"):
        serve.main([str(checkpoint)])


def test_an_address_that_is_taken_is_reported_before_the_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(
            UserError, match=rf"Cannot listen on 127\.0\.0\.1, port {port}: .* another --host or --port"
        ):
            serve.main(["missing.pt", "--port", str(port)])
    with pytest.raises(UserError, match=r"missing\.pt"):
        serve.main(["missing.pt", "--port", "0"])


@pytest.mark.parametrize(
    "option, message",
    [
        (["--threshold", "2"], "--threshold: wanted at least 0 and at most 1, got 2"),
        (["--batch-size", "0"], "--batch-size: wanted at least 1, got 0"),
        (["--port", "x"], "--port: invalid number value: 'x'"),
    ],
)
def test_options_have_ranges(option: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        serve.main(["best.pt", *option])
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.slow
def test_the_benchmark_measures_a_server() -> None:
    rows = list(benchmark.run(threads=1, requests=12, clients=3))
    assert [row.ours for row in rows if "lost" in row.name] == [0, 0]
    assert all(row.ours > 0 for row in rows if row.unit)
