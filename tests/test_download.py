"""Downloads of models and data, from a server on this machine that breaks, lies and wanders."""

import hashlib
import http.server
import io
import json
import re
import socket
import sys
import threading
import time
import zlib
from pathlib import Path

import pytest

import data
import gpt
from data import data_file, load_examples
from gpt import download, model_folder

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
BODY = bytes(range(256)) * 1000
SHA256 = hashlib.sha256(BODY).hexdigest()
PAGE = b"\n <!DOCTYPE html><html><body>Please log in to the airport's network</body></html>"


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` (path -> bytes); `behave` (path -> function of handler and body) replaces the usual answer."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.files, self.behave, self.requests = {}, {}, []


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.close_connection = True
        self.server.requests.append((self.path, self.headers.get("Range")))
        body = self.server.files.get(self.path)
        if self.path in self.server.behave:
            self.server.behave[self.path](self, body)
        elif body is None:
            self.answer(404, b"not here")
        else:
            self.partial(body)

    def answer(self, status, body, length=None, sent=None, **headers):
        """Claim a length (None: the true one), send so many bytes (None: all)."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if length != "none":
            self.send_header("Content-Length", len(body) if length is None else length)
        self.end_headers()
        self.wfile.write(body[:sent])

    def partial(self, body, sent=None, **headers):
        """The usual answer: all, or what Range asks for; of either only the first `sent` bytes."""
        if asked := self.headers.get("Range"):
            begin = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            if begin >= len(body):
                return self.answer(416, b"")
            content_range = f"bytes {begin}-{len(body) - 1}/{len(body)}"
            return self.answer(206, body[begin:], sent=sent, Content_Range=content_range, **headers)
        self.answer(200, body, sent=sent, **headers)


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """Nobody waits for a second attempt; what would have been waited is kept."""
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


def fetch(server, tmp_path, behave=None, body=BODY, sha256=None):
    """Download /file into an empty folder; afterwards there is the whole file and nothing else, or nothing."""
    server.files["/file"] = body
    if behave:
        server.behave["/file"] = behave
    folder = tmp_path / "cache"
    try:
        download(f"{server.url}/file", folder / "file", sha256)
    except (OSError, ValueError) as error:
        assert not list(folder.iterdir()), "something half-written stayed"
        assert "\n" not in str(error) and "/file" in str(error)
        raise
    assert [p.name for p in folder.iterdir()] == ["file"]
    return (folder / "file").read_bytes()


def hub(handler, body, sha256=None, size=None, code=302, cdn=None):
    """As the Hugging Face hub: its answer names size and sha256 and leads to a CDN whose ETag is another hash."""
    handler.server.files["/cdn"] = body  # before the answer: the next request may come at once
    handler.server.behave["/cdn"] = cdn or (lambda h, body: h.partial(body, ETag='"' + "ab" * 32 + '"'))
    handler.answer(code, b"", Location="/cdn", X_Linked_Size=str(size or len(body)),
                   X_Linked_Etag=f'"{sha256 or hashlib.sha256(body).hexdigest()}"')


# ------------------------------------------------------------------------------ one file


def test_a_file_arrives_whole_and_alone(server, tmp_path):
    assert fetch(server, tmp_path) == BODY
    assert server.requests == [("/file", None)]


def test_a_broken_transfer_goes_on_where_it_ended(server, tmp_path, waits):
    assert fetch(server, tmp_path, lambda h, body: h.partial(body, sent=100_000)) == BODY
    assert server.requests == [("/file", None), ("/file", "bytes=100000-"), ("/file", "bytes=200000-")]
    assert waits == [1, 1]  # what makes progress is not given up


def test_a_server_that_does_not_know_range_sends_all_again(server, tmp_path):
    breaks = [1000, None]
    assert fetch(server, tmp_path, lambda h, body: h.answer(200, body, sent=breaks.pop(0))) == BODY
    assert [r for _, r in server.requests] == [None, "bytes=1000-"]


@pytest.mark.parametrize("breaks", ["before the answer", "503", "429"])
def test_a_server_that_is_busy_at_first_is_asked_again(server, tmp_path, breaks, waits):
    def behave(handler, body):
        if len(server.requests) > 2:
            handler.partial(body)
        elif breaks != "before the answer":
            handler.answer(int(breaks), b"busy")
    assert fetch(server, tmp_path, behave) == BODY
    assert waits == [1, 2]


@pytest.mark.parametrize("behave, requests, message", [
    (lambda h, body: h.answer(503, b"busy"), 5, "503"),
    (lambda h, body: h.partial(body[:0] if h.headers.get("Range") else body, sent=1000), 2, "416"),
    (lambda h, body: h.answer(200, body, length=len(body) + 1), 5, f"only {len(BODY)} of {len(BODY) + 1} bytes"),
    (lambda h, body: h.answer(404, b"no"), 1, "404"),
    (lambda h, body: h.answer(403, b"no"), 1, "403"),
    (lambda h, body: h.answer(200, body, length="none"), 1, "0 of 0"),
    (lambda h, body: h.answer(200, b""), 1, "0 of 0"),
    (lambda h, body: h.answer(200, body, X_Linked_Size=str(len(body) + 1)), 1, f"{len(BODY)} of {len(BODY) + 1}"),
    (lambda h, body: h.answer(200, body, length=len(body) - 1, X_Linked_Size=str(len(body))), 1, f"{len(BODY) - 1} of {len(BODY)}"),
    (lambda h, body: h.answer(206, body[50:], Content_Range=f"bytes 50-{len(body) - 1}/{len(body)}"), 1, "bytes 50 to"),
    (lambda h, body: h.answer(206, body[:500], Content_Range=f"bytes 0-499/{len(body)}"), 1, f"bytes 0 to 500 of {len(BODY)}"),
    (lambda h, body: h.answer(206, body), 1, "does not say which bytes"),
    (lambda h, body: h.answer(200, body, sent=1000) if not h.headers.get("Range") else h.answer(206, body[1000:1500], Content_Range=f"bytes 1000-1499/{len(body)}"),
     2, f"bytes 1000 to 1500 of {len(BODY)}"),
    (lambda h, body: h.answer(200, body, sent=1000) if not h.headers.get("Range") else h.answer(206, body[1000:]), 2, "does not say which bytes"),
    (lambda h, body: h.answer(200, zlib.compress(body), Content_Encoding="deflate"), 1, "as deflate"),
    (lambda h, body: h.answer(200, body, X_Linked_Etag=f'"{"0" * 64}"'), 1, f"sha256 {SHA256} came, expected {'0' * 64}"),
    (lambda h, body: hub(h, body, sha256="0" * 64), 2, "expected 0000"),
    (lambda h, body: hub(h, body, size=len(body) - 1), 2, "announces"),
    (lambda h, body: h.answer(200, PAGE, Content_Type="application/octet-stream"), 1, "web page"),
    (lambda h, body: h.server.files.update({"/login": PAGE}) or h.answer(302, b"", Location="/login"), 2, "web page"),
    (lambda h, body: h.answer(302, b"", Location=Path(__file__).as_uri()), 1, "302.*not allowed"),
    (lambda h, body: h.answer(302, b"", Location="ftp://127.0.0.1/file"), 1, "redirected to ftp"),
    (lambda h, body: h.answer(302, b"", Location="/file"), 5, "infinite loop"),
])
def test_an_answer_that_is_not_the_file_is_one_clear_error_and_leaves_nothing(server, tmp_path, behave, requests, message):
    with pytest.raises((OSError, ValueError), match=message):
        fetch(server, tmp_path, behave)
    assert len(server.requests) == requests


def test_https_is_never_left_for_http():
    request = gpt.urllib.request.Request("https://a.example/file")
    follow = lambda url: gpt.Redirects().redirect_request(request, io.BytesIO(), 302, "Found", {}, url)
    assert follow("https://b.example/file").full_url == "https://b.example/file"
    with pytest.raises(OSError, match="redirected to http://b.example/file"):
        follow("http://b.example/file")


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_the_hub_s_own_sha256_counts_and_not_the_etag_of_its_cdn(server, tmp_path, code):
    assert fetch(server, tmp_path, lambda h, body: hub(h, body, code=code)) == BODY


def test_a_resumed_file_is_held_to_the_hub_s_sha256(server, tmp_path):
    cdn = lambda h, body: h.partial(bytes(len(body)) if h.headers.get("Range") else body, sent=200_000)
    with pytest.raises(ValueError, match=f"expected {SHA256}"):
        fetch(server, tmp_path, lambda h, body: hub(h, body, cdn=cdn))


def test_a_sha256_that_is_given_is_held_to(server, tmp_path):
    assert fetch(server, tmp_path, sha256=SHA256) == BODY
    (tmp_path / "cache" / "file").unlink()
    with pytest.raises(ValueError, match="expected 1111"):
        fetch(server, tmp_path, sha256="1" * 64)


def test_an_etag_as_long_as_a_sha256_is_not_taken_for_one(server, tmp_path):
    assert fetch(server, tmp_path, lambda h, body: h.partial(body, ETag='"' + "ab" * 32 + '"')) == BODY


@pytest.mark.parametrize("url", ["file:///etc/hosts", "ftp://127.0.0.1/file", "huggingface.co/file", "http:///file"])
def test_only_http_addresses_are_fetched(tmp_path, url):
    with pytest.raises(ValueError, match="no http or https"):
        download(url, tmp_path / "file")
    assert not list(tmp_path.iterdir())


def closed_port():
    """An address at which nobody listens."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{s.getsockname()[1]}"


def test_without_a_network_the_error_comes_at_once(tmp_path, waits):
    with pytest.raises(OSError, match="refused"):
        download(f"{closed_port()}/file", tmp_path / "file")
    assert waits == [] and not list(tmp_path.iterdir())


def test_an_interruption_leaves_nothing_and_the_old_file(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("old")
    server.files["/file"] = BODY
    monkeypatch.setattr(gpt.os, "fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        download(f"{server.url}/file", tmp_path / "file")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("file", "old")]


def test_several_at_once_do_not_disturb_each_other(server, tmp_path):
    server.files["/file"] = BODY
    together = threading.Barrier(4)
    def behave(handler, body):
        together.wait(30)  # all four have begun before any goes on
        handler.partial(body)
    server.behave["/file"] = behave
    threads = [threading.Thread(target=download, args=(f"{server.url}/file", tmp_path / "file")) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_bytes() == BODY


def test_proxies_of_the_environment_are_used_but_not_to_this_machine(server, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", closed_port())
    monkeypatch.delenv("no_proxy", raising=False)
    assert fetch(server, tmp_path) == BODY
    monkeypatch.setenv("http_proxy", server.url)
    server.files["http://models.example/file"] = BODY[:100]
    download("http://models.example/file", tmp_path / "other")
    assert (tmp_path / "other").read_bytes() == BODY[:100]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream, expected", [
    (Terminal, r"(fetching file: \d+ of 2 MiB\r){10,}\n"), (io.StringIO, r"(fetching file: \d+ of 2 MiB\n){1,3}"),
])
def test_a_long_download_shows_one_line_on_a_terminal_and_few_in_a_log(server, tmp_path, monkeypatch, stream, expected):
    clock = iter(range(10**9))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))  # each look at the clock takes a second
    monkeypatch.setattr(sys, "stderr", stream())
    fetch(server, tmp_path, body=BODY * 12)
    assert re.fullmatch(expected, sys.stderr.getvalue())


def test_a_quick_download_says_nothing(server, tmp_path, capfd):
    fetch(server, tmp_path)
    assert capfd.readouterr() == ("", "")


# ------------------------------------------------------------------------------ models


FILES = {"config.json": b"{}", "vocab.json": b'{"a": 0}', "merges.txt": b"#version: 0.2\n", "model.safetensors": BODY}


@pytest.fixture
def models(server, tmp_path, monkeypatch):
    """A hub with gpt2-medium and distilgpt2, and an empty cache."""
    monkeypatch.setenv("HF_ENDPOINT", server.url + "/hub/")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for repo in ("openai-community/gpt2-medium", "distilbert/distilgpt2"):
        for name, body in FILES.items():
            server.files[f"/hub/{repo}/resolve/main/{name}"] = body
    server.behave["/hub/openai-community/gpt2-medium/resolve/main/model.safetensors"] = hub
    return server


@pytest.mark.parametrize("name", ["gpt2-medium", "distilgpt2"])
def test_a_model_is_fetched_once_and_then_without_any_request(models, tmp_path, name):
    folder = model_folder(name)
    assert folder == tmp_path / "home" / "gpt2-finetune" / name
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == FILES
    models.requests.clear()
    assert model_folder(name) == folder
    assert models.requests == []


def test_the_tokenizer_of_a_name_is_the_one_beside_its_weights(models, tmp_path):
    home = tmp_path / "home" / "gpt2-finetune" / "gpt2"
    home.mkdir(parents=True)
    for name in ("vocab.json", "merges.txt"):
        (home / name).write_bytes((data.TINY / "model" / name).read_bytes())
    assert data.load_tokenizer("gpt2").n_vocab == data.load_tokenizer("tiny").n_vocab
    assert models.requests == []


def test_only_what_is_missing_of_a_model_is_fetched(models):
    folder = model_folder("distilgpt2")
    (folder / "merges.txt").unlink()
    models.requests.clear()
    model_folder("distilgpt2")
    assert models.requests == [("/hub/distilbert/distilgpt2/resolve/main/merges.txt", None)]


def test_a_model_that_cannot_be_had_is_one_line_that_says_what_to_put_where(models, tmp_path):
    del models.files["/hub/distilbert/distilgpt2/resolve/main/merges.txt"]
    with pytest.raises(FileNotFoundError) as caught:
        model_folder("distilgpt2")
    message = str(caught.value)
    assert "\n" not in message and "404" in message and str(tmp_path / "home" / "gpt2-finetune" / "distilgpt2") in message
    assert all(name in message for name in FILES) and "distilbert/distilgpt2" in message
    assert not (tmp_path / "home" / "gpt2-finetune" / "distilgpt2" / "model.safetensors").exists()


def test_offline_the_scripts_end_in_one_line_and_exit_code_1(tmp_path, monkeypatch, capsys):
    for name, value in {"HF_ENDPOINT": closed_port(), "DATA_ENDPOINT": closed_port(), "HF_HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    line = r"error: .*refused; or put .* into .*"
    assert gpt.main(["--model", "gpt2", "--prompt", "x"]) == 1
    assert re.fullmatch(line + "\n", capsys.readouterr().err)
    with pytest.raises(SystemExit, match=line) as caught:
        data.main(["--data", "alpaca"])
    assert "\n" not in caught.value.code


def test_the_cache_is_where_the_hub_s_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    for name in ("gpt2", "data"):
        folder = tmp_path / ".cache" / "huggingface" / "gpt2-finetune" / name
        folder.mkdir(parents=True)
        for file in (*FILES, "book.json"):
            (folder / file).write_text("{}")
    assert model_folder("gpt2") == tmp_path / ".cache" / "huggingface" / "gpt2-finetune" / "gpt2"
    assert data_file("book") == tmp_path / ".cache" / "huggingface" / "gpt2-finetune" / "data" / "book.json"


# ------------------------------------------------------------------------------ data


BOOK, ALPACA = (f"/{source}" for source, _, _ in data.DATASETS.values())


@pytest.fixture
def sets(server, tmp_path, monkeypatch):
    """A server with both data sets in small, and an empty cache."""
    monkeypatch.setenv("DATA_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    records = [{"instruction": f"Say {n}", "input": "", "output": f"{n}"} for n in range(7)]
    records[2]["output"] = records[5]["output"] = ""
    server.files[ALPACA] = json.dumps(records).encode()
    server.files[BOOK] = json.dumps(records[:2]).encode()
    known = {"book": (BOOK[1:], 2, hashlib.sha256(server.files[BOOK]).hexdigest()), "alpaca": (ALPACA[1:], 7, None)}
    monkeypatch.setattr(data, "DATASETS", known)
    return server


def test_the_two_sets_go_into_files_of_their_own_once(sets, tmp_path):
    assert len(load_examples("book")) == 2 and len(load_examples("alpaca")) == 5
    folder = tmp_path / "home" / "gpt2-finetune" / "data"
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {"book.json": sets.files[BOOK], "alpaca.json": sets.files[ALPACA]}
    assert sets.requests == [(BOOK, None), (ALPACA, None)]
    assert data_file("book") == folder / "book.json" and data_file("alpaca") == folder / "alpaca.json"
    assert len(sets.requests) == 2


def test_alpaca_s_records_without_an_output_are_left_out_and_counted_aloud(sets, capsys):
    assert [e["output"] for e in load_examples("alpaca")] == ["0", "1", "3", "4", "6"]
    assert "2 of 7 records of alpaca have no output and are left out; the first is record 3" in capsys.readouterr().err
    with pytest.raises(ValueError, match="record 3: output is empty"):
        load_examples(data_file("alpaca"))  # a user's own file is never cut in silence


def test_a_set_with_another_number_of_records_is_refused(sets):
    data.DATASETS["alpaca"] = (ALPACA[1:], 52002, None)
    with pytest.raises(ValueError, match="alpaca.json: 7 records, 52002 expected; delete it"):
        load_examples("alpaca")


def test_a_wrong_file_put_in_alpaca_s_place_is_a_clear_error(sets):
    sets.files[ALPACA] = b'["text", "more"]'
    with pytest.raises(ValueError, match="alpaca.json: record 1: a record is an object"):
        load_examples("alpaca")


@pytest.mark.parametrize("behave, message", [
    (lambda h, body: None, "Remote end closed connection"),
    (lambda h, body: h.answer(200, body, sent=20), "IncompleteRead.20 bytes read"),
    (lambda h, body: h.answer(200, body, length=len(body) + 1), "IncompleteRead"),
    (lambda h, body: h.answer(200, body, length=len(body) - 1), "not JSON"),
    (lambda h, body: h.answer(200, b""), "not JSON"),
    (lambda h, body: h.answer(200, PAGE), "not JSON"),
    (lambda h, body: h.server.files.update({"/login": PAGE}) or h.answer(302, b"", Location="/login"), "not JSON"),
    (lambda h, body: h.answer(503, b"busy"), "Service Unavailable"),
    (lambda h, body: h.answer(404, b"no"), "Not Found"),
])
def test_an_answer_that_is_not_the_data_is_one_line_and_the_next_run_fetches_it_anew(sets, tmp_path, behave, message):
    sets.behave[ALPACA] = behave
    with pytest.raises(FileNotFoundError, match=rf"alpaca: .*{message}.* or put .* into .*alpaca.json") as caught:
        data_file("alpaca")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "home").rglob("*.*"))
    del sets.behave[ALPACA]
    assert data_file("alpaca").read_bytes() == sets.files[ALPACA]


def test_data_by_https_does_not_come_by_http(sets, tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_ENDPOINT", "https://data.example")
    there = data.urllib.request.urlopen(f"{sets.url}{BOOK}")  # where a redirect of https has led
    monkeypatch.setattr(data.urllib.request, "urlopen", lambda request, timeout: there)
    with pytest.raises(FileNotFoundError, match="book: https://data.example/.*: redirected to http://127"):
        data_file("book")
    assert not list((tmp_path / "home").rglob("*.*"))


def test_a_disk_without_room_leaves_no_part_of_the_data(sets, tmp_path, monkeypatch):
    def full(path, content):
        path.touch()
        raise OSError(28, "No space left on device", str(path))
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(FileNotFoundError, match="No space left on device"):
        data_file("book")
    assert not list((tmp_path / "home").rglob("*.*"))


def test_a_book_that_is_not_the_book_is_refused(sets, tmp_path):
    sets.files[BOOK] = sets.files[ALPACA]
    with pytest.raises(FileNotFoundError, match="book: .*sha256 .* or put .* into .*book.json"):
        data_file("book")
    assert not list((tmp_path / "home").rglob("*.*"))


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data beside the project")
def test_the_book_s_records_are_those_whose_sha256_is_written_down(server, tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    server.files[BOOK] = (SHARED / "instruction-data.json").read_bytes()
    assert load_examples("book") == load_examples(SHARED / "instruction-data.json")
    assert len(load_examples("book")) == data.DATASETS["book"][1] == 1100


def test_of_a_file_that_has_become_shorter_meanwhile_nothing_old_stays(server, tmp_path):
    def behave(handler, body):
        first = len(handler.server.requests) == 1
        handler.answer(200, BODY if first else BODY[:1000], sent=200_000 if first else None)
    assert fetch(server, tmp_path, behave) == BODY[:1000]


def test_an_interruption_of_the_data_s_last_step_leaves_no_file(sets, tmp_path, monkeypatch):
    def interrupt(source, target):
        assert Path(source).read_bytes() == sets.files[BOOK] and not Path(target).exists()
        raise KeyboardInterrupt
    monkeypatch.setattr(data.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        data_file("book")
    assert not list((tmp_path / "home").rglob("*.*"))
