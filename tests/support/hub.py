"""A hub on loopback, with enough of its HTTP interface for tests.

A client can create a repository, commit files to it and load them.
"""

import base64
import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0" * 40


class Hub(ThreadingHTTPServer):
    """Repositories in memory. Use it as a context manager.

    Attributes:
        files: contents, as `files["owner/name"]["path"]`.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.url = f"http://127.0.0.1:{self.server_port}"

    def environment(self, home: Path) -> dict[str, str]:
        """Return the environment of a process that uses this hub and keeps its cache in `home`."""
        return {**os.environ, "HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home)}

    def write(self, name: str, folder: Path) -> None:
        """Write the files of a repository into a folder."""
        for path, content in self.files[name].items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def _answer(self, content: bytes, status: int = 200, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(content), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _answer_json(self, value, status: int = 200):
        self._answer(json.dumps(value).encode(), status, Content_Type="application/json")

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def do_POST(self):
        body, files = self._body(), self.server.files
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, [asked.get("organization"), asked["name"]]))
            files.setdefault(name, {})
            self._answer_json({"url": f"{self.server.url}/{name}", "id": name})
        elif self.path == "/api/validate-yaml":
            self._answer_json({"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/(?:models|datasets)/(.+)/preupload/main", self.path):
            paths = [file["path"] for file in json.loads(body)["files"]]
            self._answer_json(
                {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}
            )
        elif found := re.fullmatch(r"/api/(?:models|datasets)/(.+)/commit/main", self.path.split("?")[0]):
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    files[found[1]][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self._answer_json({"commitUrl": f"{self.server.url}/{found[1]}/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self._answer_json({"error": f"no such address: {self.path}"}, 404)

    def do_GET(self):
        files = self.server.files
        if (found := re.fullmatch(rf"/(.+)/resolve/(?:main|{COMMIT})/(.+)", self.path)) and found[1] in files:
            content = files[found[1]].get(found[2])
            if content is None:
                self._answer(b"", 404, X_Error_Code="EntryNotFound")
            else:
                self._answer(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"')
        elif (found := re.match(r"/api/(?:models|datasets)/([^/]+/[^/?]+)", self.path)) and found[1] in files:
            siblings = [{"rfilename": path} for path in files[found[1]]]
            self._answer_json({"id": found[1], "sha": COMMIT, "tags": [], "siblings": siblings})
        else:
            self._answer(b"", 404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET
