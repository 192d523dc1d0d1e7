"""The same function as a service: POST a picture, get its labels as JSON. It needs nothing but Python and an address.

    curl --data-binary @dog.jpg http://POD:8080/classify
    {"labels": [[207, "golden retriever", 0.86], ...], "ms": 14.2}

One session serves all requests; `GET /healthz` is for probes and asks the agent. In a pod of runtime class `remora`
the accelerator's address is in the environment already.

SIGTERM: probes are told that it is not ready, so that nobody sends more, and it goes on answering for `LEAVE_S`. Closed
at once, it would reset connections that had been made meanwhile: where no other pod is ready, Kubernetes sends to those
that are ending as long as they say that they are ready.
"""

import json
import select
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import remora

PORT = 8080
MAX_BYTES = 32 << 20
LEAVE_S = 8.0


class Server(ThreadingHTTPServer):
    #: Connections that wait to be accepted; the default of 5 has callers of a busy pod wait for a second and more.
    request_queue_size = 128
    #: Those of requests under way are waited for at the end.
    daemon_threads = False


class Service(BaseHTTPRequestHandler):
    session: "remora.Session | None" = None
    ending = False
    #: Seconds that a caller may be silent.
    timeout = 30

    def do_GET(self) -> None:
        if self.ending:
            self._answer(503, {"error": "it is ending"})
            return
        try:
            self._open_session().ping()
        except remora.RemoraError as error:
            self._answer(503, {"error": str(error)})
            return
        self._answer(200, {"ok": True})

    def do_POST(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        if not 0 < size <= MAX_BYTES:
            self._answer(413, {"error": f"a picture of 1 to {MAX_BYTES} bytes is wanted"})
            return
        picture = self.rfile.read(size)
        start = time.perf_counter()
        try:
            labels = self._open_session().classify(picture, top=5)
        except remora.RemoraError as error:
            self._answer(error.http_status, {"error": str(error)})
            return
        found = [[label.index, label.name, round(label.score, 4)] for label in labels]
        self._answer(200, {"labels": found, "ms": round((time.perf_counter() - start) * 1000, 3)})

    def _open_session(self) -> "remora.Session":
        if self.session is None:
            raise remora.UnavailableError("the agent has not answered yet")
        return self.session

    def log_message(self, format: str, *args: object) -> None:
        """Requests are the agent's business: it logs and counts them by pod."""

    def _answer(self, status: int, body: dict[str, object]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def main() -> None:
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    server = Server(("", PORT), Service)
    # Accepts while the session is opened: a probe sees a slow answer instead of a refused connection.
    threading.Thread(target=server.serve_forever, daemon=True).start()
    while Service.session is None and not ended.is_set():
        try:
            Service.session = remora.connect()
            print("ready", flush=True)
        except remora.UnavailableError as error:
            print(f"waiting for the agent: {error}", file=sys.stderr, flush=True)
            ended.wait(1)
    ended.wait()
    Service.ending = True
    time.sleep(LEAVE_S)
    server.shutdown()
    while select.select([server], [], [], 0)[0]:
        server.handle_request()  # they were in the queue
    server.server_close()


if __name__ == "__main__":
    main()
