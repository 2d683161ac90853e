"""The HTTP service as a process on loopback: right numbers, what is refused and how, load, and its end."""

import asyncio
import http.client
import io
import json
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT
from ppdensecl.data.picture import decode
from ppdensecl.evaluation import features
from test_deploy import picture

pytest.importorskip("fastapi", reason="fastapi is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")
prometheus = pytest.importorskip("prometheus_client.parser", reason="prometheus_client is not installed")


class Service:
    """A running service; `ask` is one request on a connection of its own."""

    def __init__(self, model, *options):
        self.process = subprocess.Popen([sys.executable, "deploy/service/serve.py", "--model-dir", str(model), "--port", "0",
                                         *map(str, options)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.said = self.process.stdout.readline()
        if not self.said:
            raise RuntimeError(self.process.communicate()[1])
        self.port = int(re.search(r"http://127.0.0.1:(\d+);", self.said)[1])

    def ask(self, method, path, body=None, headers=None):
        """(status, headers, body)"""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def error(self, method, path, body=None, headers=None):
        status, _, text = self.ask(method, path, body, headers)
        return status, json.loads(text)["error"]

    def metrics(self):
        text = self.ask("GET", "/metrics")[2].decode()
        return {(sample.name, *sample.labels.values()): sample.value for family in prometheus.text_string_to_metric_families(text)
                for sample in family.samples}

    def slow(self, length):
        """A connection that has sent the head of a POST, and none of its body."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        connection.sendall(f"POST /features HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode())
        return connection

    def expecting(self, length):
        """The status of a POST, of which the body is sent only if that is asked for: 100, or what it is refused with."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as connection:
            connection.sendall(f"POST /features HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n"
                               "Expect: 100-continue\r\n\r\n".encode())
            return int(connection.recv(1000).split()[1])

    def end(self):
        """(exit status, stderr)"""
        self.process.send_signal(signal.SIGTERM)
        try:
            errors = self.process.communicate(timeout=60)[1]
        finally:
            self.process.kill()
        return self.process.returncode, errors


@pytest.fixture(scope="module")
def service(exported_r18):
    service = Service(exported_r18[1], "--queue", 24, "--timeout", 20, "--max-megabytes", 2, "--max-megapixels", 30)
    yield service
    status, errors = service.end()
    assert status == 0 and errors == "", errors


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("jpegs")
    return [picture(folder / f"{number}.jpg", number, (200, 150)).read_bytes() for number in range(12)]


@pytest.fixture(scope="module")
def right(exported_r18, jpegs):
    """The pooled features of `jpegs` by the training-side model."""
    return pooled(exported_r18[0], jpegs)


def pooled(checkpoint, jpegs):
    views = np.stack([features.centre(decode(data, "jpeg"), (64, 64)) for data in jpegs])
    return features.features(features.load_backbone(checkpoint), views)


def form(**files):
    boundary = "0123456789abcdef"
    head = "--{}\r\nContent-Disposition: form-data; name=\"{}\"; filename=\"picture.jpg\"\r\n\r\n"
    parts = [head.format(boundary, name).encode() + data + b"\r\n"
             for name, data in files.items()]
    return b"".join(parts) + f"--{boundary}--\r\n".encode(), {"Content-Type": f"multipart/form-data; boundary={boundary}"}


def test_answers_are_the_models(service, jpegs, right):
    for data, expected in zip(jpegs[:3], right):
        status, _, body = service.ask("POST", "/features", data)
        assert status == 200
        np.testing.assert_allclose(json.loads(body)["pooled"], expected, rtol=0, atol=1e-5 * np.abs(right).max())
    status, _, body = service.ask("POST", "/similarity", *form(a=jpegs[0], b=jpegs[1]))
    cosine = right[0] @ right[1] / np.linalg.norm(right[0]) / np.linalg.norm(right[1])
    assert status == 200 and abs(json.loads(body)["cosine"] - cosine) < 1e-4
    assert abs(json.loads(service.ask("POST", "/similarity", *form(a=jpegs[0], b=jpegs[0]))[2])["cosine"] - 1) < 1e-5
    status, headers, body = service.ask("POST", "/dense", jpegs[0])
    assert status == 200 and headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(body)).size == (64, 64)
    status, _, body = service.ask("GET", "/health")
    assert status == 200 and json.loads(body)["status"] == "ready"


def test_answers_for_real_photos_are_the_models(service, exported_r18, data_folder):
    photos = [path.read_bytes() for path in sorted((data_folder / "photos" / "images").iterdir())[:1200:100]]
    right = pooled(exported_r18[0], photos)
    for data, expected in zip(photos, right):
        status, _, body = service.ask("POST", "/features", data)
        assert status == 200
        np.testing.assert_allclose(json.loads(body)["pooled"], expected, rtol=0, atol=1e-5 * np.abs(right).max())


def bomb(side):
    """A valid PNG of side × side black pixels: some kilobytes."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(bytes(side * ((side + 7) // 8 + 1)), 9)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)) + chunk(b"IDAT", rows)
            + chunk(b"IEND", b""))


def test_bad_uploads_are_refused(service, jpegs):
    whole = jpegs[0]
    for body, status, words in [
        (b"", 422, "the file is empty"), (b"this is text", 422, "not a picture"), (whole[: len(whole) // 2], 422, "cut short"),
        (bomb(30000), 422, "pixels"), (bomb(6000), 422, "the limit of 30 million"), (bytes(3 * 10**6), 413, "larger than 2 MB"),
    ]:
        found = service.error("POST", "/features", body)
        assert found[0] == status and words in found[1], found
        assert service.error("POST", "/dense", body)[0] == status
    assert service.ask("POST", "/features", bomb(5000))[0] == 200  # or the limit would be another
    assert service.expecting(3 * 10**6) == 413 and service.expecting(10**6) == 100
    pieces = (bytes(10**5) for _ in range(30))  # chunked: no length is told before
    assert service.error("POST", "/features", pieces) == (413, "the body is larger than 2 MB")
    for (body, headers), words in [(form(a=whole), "no file 'b'"), (form(a=whole, b=b"text"), "b: not a picture"),
                                   ((whole, {}), "no file 'a'")]:
        status, text = service.error("POST", "/similarity", body, headers)
        assert status == 422 and words in text
    assert service.error("POST", "/similarity", whole, {"Content-Type": "multipart/form-data"})[0] == 400
    assert service.error("POST", "/similarity", *form(a=whole, b=whole, c=whole))[0] == 400
    assert service.error("GET", "/features")[0] == 405 and service.error("DELETE", "/metrics")[0] == 405
    assert service.error("POST", "/nothing", whole)[0] == 404
    assert service.ask("POST", "/features", whole)[0] == 200


def test_a_few_hundred_requests_of_many_clients(service, jpegs, right):
    before, count, clients = service.metrics(), 300, 16
    wrong, statuses, done = [], [], iter(range(count))
    lock = threading.Lock()

    def client():
        connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)
        while True:
            with lock:
                number = next(done, None)
            if number is None:
                return connection.close()
            connection.request("POST", "/features", jpegs[number % len(jpegs)])
            answer = connection.getresponse()
            body = answer.read()
            statuses.append(answer.status)
            if answer.status == 200:
                difference = np.abs(np.array(json.loads(body)["pooled"]) - right[number % len(jpegs)]).max()
                wrong.extend([number] * (not difference <= 1e-5 * np.abs(right).max()))

    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        for job in [pool.submit(client) for _ in range(clients)]:
            job.result()
    print(f"{count / (time.perf_counter() - started):.0f} requests/s")
    assert statuses == [200] * count and not wrong
    after = service.metrics()

    def grown(*key):
        return after.get(key, 0) - before.get(key, 0)

    assert grown("ppdensecl_requests_total", "/features", "200") == grown("ppdensecl_batch_pictures_sum") == count
    assert 0 < grown("ppdensecl_batch_pictures_count") < count  # some were computed together
    assert after["ppdensecl_requests_let_in",] == 0


def test_a_client_that_goes_away_leaves_nothing_behind(service, jpegs):
    service.slow(10**6).close()
    end = time.monotonic() + 20
    while not service.metrics().get(("ppdensecl_requests_total", "/features", "499")):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert service.metrics()["ppdensecl_requests_let_in",] == 0


def answer_on(connection):
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    return answer.status, json.loads(answer.read())


def test_more_than_the_queue_gets_503_slow_bodies_408_and_the_end_waits_for_who_is_in(exported_r18, jpegs):
    service = Service(exported_r18[1], "--queue", 3, "--timeout", 3, "--batch-size", 2)
    data = jpegs[0]
    try:
        waiting = [service.slow(len(data)) for _ in range(3)]
        while service.metrics()["ppdensecl_requests_let_in",] < 3:
            time.sleep(0.02)
        status, headers, body = service.ask("POST", "/features", data)
        assert status == 503 and headers["retry-after"] == "1" and "3 requests wait already" in json.loads(body)["error"]
        assert service.expecting(len(data)) == 503
        assert service.ask("GET", "/health")[0] == 200
        waiting[0].sendall(data)
        assert answer_on(waiting[0])[0] == 200
        for connection in waiting[1:]:  # which send nothing
            assert answer_on(connection) == (408, {"error": "the body did not come within 3 seconds"})
        assert service.ask("POST", "/features", data)[0] == 200

        last = [service.slow(len(data)) for _ in range(3)]
        while service.metrics()["ppdensecl_requests_let_in",] < 3:
            time.sleep(0.02)
        service.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        for connection in last:
            connection.sendall(data)
        assert [answer_on(connection)[0] for connection in last] == [200] * 3
        _, errors = service.process.communicate(timeout=30)
        assert service.process.returncode == 0 and errors == "", errors
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", service.port), timeout=5)
    finally:
        service.process.kill()


def test_connections_that_ask_for_nothing_are_closed(exported_r18, jpegs):
    service = Service(exported_r18[1], "--queue", 1, "--timeout", 1)  # so that eight connections are the most
    head = b"GET /health HTTP/1.1\r\nHost: x\r\n"
    try:
        idle = [socket.create_connection(("127.0.0.1", service.port), timeout=10) for _ in range(12)]
        started = time.monotonic()
        for connection in idle[6:9]:
            connection.sendall(head)
        assert service.ask("GET", "/health")[0] == 503
        for connection in idle[:9]:
            assert connection.recv(100) == b""
        assert 0.5 < time.monotonic() - started < 4
        assert service.ask("POST", "/features", jpegs[0])[0] == 200
        with socket.create_connection(("127.0.0.1", service.port), timeout=10) as again:
            again.sendall(head + b"\r\n")
            assert answer_on(again)[0] == 200
            with pytest.raises(OSError):  # for a second head that comes slowly
                for byte in head:
                    again.sendall(bytes([byte]))
                    time.sleep(0.1)
    finally:
        service.end()


def test_what_takes_too_long_gets_504_and_makes_room():
    sys.path.append(str(ROOT / "deploy/service"))
    from guard import Guard, Metrics

    async def endless(scope, receive, send):
        await receive()
        await asyncio.sleep(1000)

    async def ask(guard):
        sent = []

        async def receive():
            return {"type": "http.request", "body": b"x", "more_body": False}

        async def send(message):
            sent.append(message)

        await guard({"type": "http", "method": "POST", "path": "/features", "headers": []}, receive, send)
        return sent[0]["status"]

    async def main():
        guard = Guard(endless, Metrics(), ["/features"], queue=2, max_bytes=10, timeout=0.2)
        return [await asyncio.gather(*(ask(guard) for _ in range(3))) for _ in range(2)]

    assert asyncio.run(main()) == [[504, 504, 503]] * 2


def test_a_service_that_cannot_start_says_why(exported_r18, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for options, words in [(["--port", taken.getsockname()[1]], "cannot be listened on"),
                               (["--model-dir", tmp_path], "inference.yml: cannot"),
                               (["--engine", "onnx", "--mkldnn"], "--mkldnn is for --engine paddle")]:
            with pytest.raises(RuntimeError) as caught:
                Service(exported_r18[1], *options)
            assert words in str(caught.value) and "Traceback" not in str(caught.value), caught.value
