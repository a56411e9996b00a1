"""A real HTTP server between a client and MLflow's, that misbehaves on request."""

import http.client
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# answers 500 (nothing forwarded), never answers, forwards at once but answers after `LATE` seconds
FAULTS = ("error", "silent", "late")
LATE = 4.0


class FaultyProxy:
    """Listens on ``port`` and forwards to the server on ``target``; ``fault`` can be changed at any
    time.
    """

    def __init__(self, target: int, fault: str | None = None):
        # (fault, path) of each request
        self.fault, self.seen = fault, []
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                fault = proxy.fault
                proxy.seen.append((fault, self.path))
                if fault == "silent":
                    while proxy.fault == "silent":
                        time.sleep(0.05)
                    self.close_connection = True
                    return
                status, kind, content = (
                    (500, "text/plain", b"broken") if fault == "error" else self.forward(body)
                )
                if fault == "late":
                    time.sleep(LATE)
                try:
                    self.send_response(status)
                    self.send_header("Content-Type", kind)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                except OSError:
                    # the client has given up
                    self.close_connection = True

            def forward(self, body):
                connection = http.client.HTTPConnection("127.0.0.1", target, timeout=60)
                headers = {
                    key: value
                    for key, value in self.headers.items()
                    if key.lower() not in ("host", "connection")
                }
                connection.request(self.command, self.path, body, headers)
                answer = connection.getresponse()
                content = answer.read()
                connection.close()
                return (
                    answer.status,
                    answer.headers.get("Content-Type", "application/json"),
                    content,
                )

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.uri = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.fault = None
        self.server.shutdown()
        self.server.server_close()
