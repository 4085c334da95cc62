"""Files of weights from elsewhere, from a server on this machine that does all that servers do."""

import hashlib
import io
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save as as_safetensors

from detr.errors import UserError
from detr.published import PUBLISHED, PublishedCheckpoint
from detr.weights import fetching, weights_file
from tests.helpers.commands import REPOSITORY

STATE = {"weight": torch.arange(50_000, dtype=torch.float32)}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def pickled() -> bytes:
    stream = io.BytesIO()
    torch.save({"model": STATE}, stream)
    return stream.getvalue()


@dataclass
class Server:
    """What it serves, by path. `asked` lists the requests for files that it got.

    pause: in seconds, between two parts of a file under /slow/. released: what parts after the first of a file under
    /held/ wait for.
    """

    address: str
    files: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    pause: float = 0.0
    released: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def server() -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(with_content=False)

        def do_GET(self) -> None:
            served.asked.append(self.path)
            self.answer(with_content=True)

        def answer(self, *, with_content: bool) -> None:
            how, _, name = self.path.lstrip("/").rpartition("/")
            if how == "redirected":
                self.send_response(302)
                self.send_header("Location", f"/{name}")
                self.end_headers()
                return
            content = served.files.get(name)
            if content is None:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")  # in the words of the hub
                self.end_headers()
                return
            self.send_response(200)
            if how != "unsized":
                self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if not with_content:
                return
            if how in ("cut", "unsized"):
                content = content[: len(content) // 2]
            for start in range(0, len(content), 20_000):
                try:
                    self.wfile.write(content[start : start + 20_000])
                except OSError:  # the client is gone
                    return
                if how == "slow":
                    time.sleep(served.pause)
                elif how == "held":
                    served.released.wait()

        def log_message(self, format: str, *arguments: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served = Server(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield served
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Torch's cache, which is not there yet."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.fixture
def publish(server: Server, monkeypatch: pytest.MonkeyPatch):
    """Enters a file of the server in the table, as `tiny`, with all that is known of it, or less."""

    def enter(path: str, content: bytes, *, size: int | None = None, sha256: str | None = None) -> None:
        server.files[Path(path).name] = content
        url = path if "://" in path else f"{server.address}/{path}"
        monkeypatch.setitem(
            PUBLISHED, "tiny", PublishedCheckpoint(options="", ap=0.0, url=url, size=size, sha256=sha256)
        )

    return enter


def names(folder: Path) -> list[str]:
    """What a user finds there, and what is left of interrupted work."""
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock")) if folder.is_dir() else []


@pytest.mark.parametrize("path", ["tiny-1.pth", "redirected/tiny-1.pth", "slow/tiny-1.pth"])
def test_a_file_is_fetched_once_and_whole(server: Server, cache: Path, publish, path: str) -> None:
    content = pickled()
    server.pause = 0.02
    publish(path, content, size=len(content), sha256=hashlib.sha256(content).hexdigest()[:8])
    file = weights_file("tiny")
    assert file == cache / "tiny-1.pth" and file.read_bytes() == content
    count = len(server.asked)
    assert weights_file("tiny") == file and len(server.asked) == count
    assert names(cache) == ["tiny-1.pth"]


def test_files_that_all_have_one_name_are_kept_by_that_of_the_checkpoint(cache: Path, publish) -> None:
    publish("model.safetensors", as_safetensors(STATE))
    assert weights_file("tiny") == cache / "tiny.safetensors"


@pytest.mark.parametrize("known", ["sum", "size", "nothing"])
@pytest.mark.parametrize("kind", ["pth", "safetensors"])
@pytest.mark.parametrize("how", ["cut", "unsized"])
def test_a_file_that_is_cut_is_not_taken_for_whole(cache: Path, publish, how: str, kind: str, known: str) -> None:
    """Even where the server does not say how long it is, and no checksum is known."""
    content = pickled() if kind == "pth" else as_safetensors(STATE)
    size = len(content) if known == "size" else None
    publish(
        f"{how}/a.{kind}", content, size=size, sha256=hashlib.sha256(content).hexdigest() if known == "sum" else None
    )
    with pytest.raises(UserError, match=rf"{how}/a\.{kind} could not be fetched: what came is not .*put it to {cache}"):
        weights_file("tiny")
    assert names(cache) == []


def test_another_file_than_the_published_one_is_refused(cache: Path, publish) -> None:
    content = pickled()
    publish("a.pth", content, sha256="0123abcd")
    found = hashlib.sha256(content).hexdigest()
    with pytest.raises(UserError, match=rf"what came is not what was published: sha256 {found}, wanted 0123abcd\."):
        weights_file("tiny")
    assert names(cache) == []


def test_a_page_in_place_of_weights_is_refused(cache: Path, publish) -> None:
    publish("a.pth", b"<html>Sign in</html>")
    with pytest.raises(UserError, match="20 bytes, which are cut short, damaged or no weights"):
        weights_file("tiny")
    assert names(cache) == []


def test_a_server_without_the_file(cache: Path, publish, server: Server) -> None:
    publish("a.pth", b"")
    server.files.clear()
    with pytest.raises(
        UserError, match=r"a\.pth could not be fetched: HTTP Error 404: Not Found\. Start .*or give its path"
    ):
        weights_file("tiny")
    assert names(cache) == []


def test_nobody_answers(cache: Path, publish, free_port: int) -> None:
    publish(f"http://127.0.0.1:{free_port}/a.pth", b"")
    with pytest.raises(
        UserError, match=rf"http://127\.0\.0\.1:{free_port}/a\.pth could not .*Connection refused.*{cache}/a\.pth"
    ):
        weights_file("tiny")
    assert names(cache) == []


def test_a_server_that_falls_silent(cache: Path, publish, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "_SILENCE", 0.2)
    server.pause = 1.0
    publish("slow/a.pth", pickled())
    with pytest.raises(UserError, match=r"a\.pth could not be fetched: .*timed out"):
        weights_file("tiny")
    assert names(cache) == []


def test_a_damaged_file_in_the_cache_is_named_and_stays(cache: Path, publish, server: Server) -> None:
    content = pickled()
    publish("a.pth", content, sha256=hashlib.sha256(content).hexdigest())
    cache.mkdir(parents=True)
    (cache / "a.pth").write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"a\.pth is not tiny as published: sha256 .*Remove or rename it"):
        weights_file("tiny")
    assert (cache / "a.pth").read_bytes() == content[:-1] and not server.asked


def test_a_cache_that_cannot_be_written(tmp_path: Path, cache: Path, publish, server: Server) -> None:
    publish("a.pth", pickled())
    (tmp_path / "torch").write_text("mine")
    with pytest.raises(
        UserError, match=r"checkpoints cannot be written \(.*\), where http://.*a\.pth .*Set TORCH_HOME"
    ):
        weights_file("tiny")
    assert (tmp_path / "torch").read_text() == "mine" and not server.asked


FETCH = """
import sys
from detr.weights import weights_file
from detr.published import PUBLISHED, PublishedCheckpoint
PUBLISHED["tiny"] = PublishedCheckpoint(options="", ap=0.0, url=sys.argv[1], sha256=sys.argv[2])
print(weights_file("tiny"))
"""


@pytest.mark.slow
def test_two_processes_at_once_and_one_that_is_killed(cache: Path, publish, server: Server) -> None:
    content = pickled()
    server.files["a.pth"] = content
    command = [sys.executable, "-c", FETCH, f"{server.address}/held/a.pth", hashlib.sha256(content).hexdigest()]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)

    killed = start()
    while not server.asked:
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    assert not (cache / "a.pth").exists()
    server.released.set()
    server.asked.clear()
    both = [start(), start()]
    assert [process.communicate()[0].strip() for process in both] == [str(cache / "a.pth")] * 2
    assert (cache / "a.pth").read_bytes() == content
    assert server.asked == ["/held/a.pth"], "the second waits for the first"


def test_paths_stay_as_they_are_and_near_names_are_suggested(tmp_path: Path) -> None:
    assert weights_file(tmp_path / "best.pt") == tmp_path / "best.pt"
    with pytest.raises(UserError, match=r"Checkpoint detr-r50-e632da11\.pth does not exist\. The name detr_r50,"):
        weights_file("detr-r50-e632da11.pth")
    with pytest.raises(UserError, match=r"deformable_detr_r5 does not exist\. The name deformable_detr_r50,"):
        weights_file("deformable_detr_r5")


# The hub


@pytest.fixture
def hub(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    pytest.importorskip("huggingface_hub", reason="needs the extra 'huggingface'")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    template = f"{server.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return server


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_repositories_of_the_hub(hub: Server, name: str) -> None:
    content = as_safetensors(STATE) if name.endswith("safetensors") else pickled()
    hub.files |= {name: content, "config.json": b"{}"}
    file = weights_file("hf:someone/some-detr")
    assert file.name == name and file.read_bytes() == content
    assert file.with_name("config.json").read_bytes() == b"{}"
    assert weights_file(f"hf:someone/some-detr/{name}") == file


def test_a_repository_without_weights(hub: Server) -> None:
    with pytest.raises(
        UserError, match=r"hf:a/b: https://huggingface\.co/a/b has no file model\.safetensors or pytorch_model"
    ):
        weights_file("hf:a/b")
    with pytest.raises(UserError, match=r"hf:a: wanted hf:OWNER/REPOSITORY"):
        weights_file("hf:a")


def test_the_hub_is_out_of_reach(hub: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """As huggingface_hub answers after its retries, and at once where HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"hf:a/b could not be fetched from https://huggingface\.co/a/b: .*give its path"
    ):
        weights_file("hf:a/b")


def test_the_extra_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        UserError, match=r"huggingface_hub\. Install it with pip install 'detr-framework\[huggingface\]'"
    ):
        weights_file("hf:facebook/detr-resnet-50")
