"""A web server on loopback for tests: the files of a folder, with or without ranges."""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TypeVar


class _Files(SimpleHTTPRequestHandler):
    """Knows single ranges, unless its server has ``ranges`` off. ``breaks`` of its server are names
    of files of which half is sent."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Nothing: what was asked for is in the server's list."""

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        self.server.asked.append((self.path, self.headers.get("Range")))
        if not path.is_file():
            super().do_GET()
            return
        content = path.read_bytes()
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if found and self.server.ranges:
            start, stop = int(found[1]), min(len(content) - 1, int(found[2] or len(content)))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop}/{len(content)}")
            content = content[start : stop + 1]
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        if self.server.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if path.name in self.server.breaks:
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
            return
        self.wfile.write(content)


@contextmanager
def serve(folder: Path, ranges: bool = True) -> Iterator[ThreadingHTTPServer]:
    """A server of the folder; its ``url`` ends without a slash, ``asked`` lists (path, range)."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Files, directory=str(folder)))
    server.ranges, server.asked, server.breaks = ranges, [], set()
    server.url = f"http://127.0.0.1:{server.server_port}"
    with running(server):
        yield server


Server = TypeVar("Server", bound=ThreadingHTTPServer)


@contextmanager
def running(server: Server) -> Iterator[Server]:
    """The server, answering in a thread of its own until the block ends."""
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
