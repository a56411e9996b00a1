"""A real HTTP server between a client and MLflow's, that misbehaves on request."""

import http.client
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# It answers 500 and forwards nothing; never answers; forwards at once, but answers late.
FAULTS = ("error", "silent", "late")
LATE_SECONDS = 4.0


class FaultyProxy:
    """Listens at ``uri`` and forwards to a server of this machine.

    Args:
        target: port of the server.
        fault: one of FAULTS, or None; the attribute can be changed at any time.
    """

    def __init__(self, target: int, fault: str | None = None):
        self.fault = fault
        # (fault, path) of each request.
        self.seen = []
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
                    time.sleep(LATE_SECONDS)
                try:
                    self.send_response(status)
                    self.send_header("Content-Type", kind)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                except OSError:
                    # The client has given up.
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

            # The names by which the base class looks for them.
            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer  # noqa: N815

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
