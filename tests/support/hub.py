"""A Hugging Face Hub of one model on this machine, with the three addresses that a download asks for."""

import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """What it serves, and what was asked for.

    Attributes:
        url: its address.
        downloaded: names of the files whose content was asked for, in their order.
        refused: names of files, or "" for the model itself → the status and the error code that answer for them.
    """

    def __init__(self, folder: Path, model: str):
        self.folder, self.model = folder, model
        self.url = ""
        self.downloaded: list[str] = []
        self.refused: dict[str, tuple[int, str]] = {}

    def files(self) -> dict[str, bytes]:
        """Content by name."""
        return {file.name: file.read_bytes() for file in sorted(self.folder.iterdir())}


@contextlib.contextmanager
def serve(folder: Path, model: str = "some/model") -> Iterator[Hub]:
    """Serve the files in `folder` as `model`."""
    hub = Hub(folder, model)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            files = hub.files()
            name = path.removeprefix(f"/{model}/resolve/{COMMIT}/")
            if path.startswith("/api/"):
                if not path.startswith(f"/api/models/{model}/"):
                    self._fail(404, "RepoNotFound")
                elif "" in hub.refused:
                    self._fail(*hub.refused[""])
                elif path.endswith(f"/tree/{COMMIT}"):
                    self._send(json.dumps([{"type": "file", "path": name, "size": len(content), "oid": _digest(content)}
                                           for name, content in files.items()]).encode())  # fmt: skip
                else:
                    siblings = [{"rfilename": name} for name in files]
                    self._send(json.dumps({"id": model, "sha": COMMIT, "siblings": siblings}).encode())
            elif name in hub.refused:
                self._fail(*hub.refused[name])
            elif name in files:
                if self.command == "GET":
                    hub.downloaded.append(name)
                self._send(files[name], {"ETag": f'"{_digest(files[name])}"', "X-Repo-Commit": COMMIT})
            else:
                self._fail(404, "EntryNotFound")

        def _send(self, content: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
            self.send_response(status)
            for key, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def _fail(self, status: int, code: str) -> None:
            self._send(b"", {"X-Error-Code": code}, status)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
