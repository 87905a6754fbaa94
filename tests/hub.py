"""A Hub on this machine, for tests: repositories in memory.

It speaks the part of the protocol that huggingface_hub needs to push and to load. Only child
processes reach it, through `environment()`: huggingface_hub reads its settings when it is imported.
"""

import base64
import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen


class Hub:
    """The server.

    Attributes:
        files: repository -> path -> bytes.
        refuse: the HTTP status of every refused request; None: nothing is refused.
        refuse_path: a regular expression for the paths of refused requests; the default refuses
            uploads. Child processes set both with the function `refuse`.
    """

    def __init__(self):
        self.files: dict[str, dict[str, bytes]] = {}
        self.blobs: dict[str, bytes] = {}
        self.commits: list[tuple[str, str]] = []  # (repository, message)
        self.refuse: int | None = None
        self.refuse_path = r"/preupload/|/info/lfs/|/commit/"
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home):
        """The environment of a process that uses this as the Hub. `home` is an empty folder."""
        return {
            **os.environ,
            "HF_HUB_OFFLINE": "0",
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": "hf_dummy",
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }

    def revision(self, repository):
        """40 hex digits that change with the content."""
        content = sorted(
            (path, hashlib.sha1(data).hexdigest()) for path, data in self.files[repository].items()
        )
        return hashlib.sha1(repr(content).encode()).hexdigest()


def refuse(status, path=""):
    """Make the Hub answer with `status` to requests whose path matches. None: stop refusing.

    For child processes.
    """
    settings = json.dumps({"refuse": status, "refuse_path": path}).encode()
    urlopen(Request(f"{os.environ['HF_ENDPOINT']}/refuse", data=settings)).close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, body=b"", status=200, head=False, **headers):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if not head:
            self.wfile.write(body)

    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_POST(self):
        path, body = unquote(urlsplit(self.path).path), self.body()
        if path == "/refuse":
            vars(self.hub).update(json.loads(body))
            return self.reply()
        if self.refused(path):
            return None
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'user'}/{asked['name']}"
            known = self.hub.files.setdefault(name, {})
            return self.reply(
                {"url": f"{self.hub.url}/{name}", "name": name}, 409 if known else 200
            )
        if path == "/api/validate-yaml":
            return self.reply({"errors": [], "warnings": []})
        if match := re.fullmatch(r"/api/(?:models|datasets)/(.+)/preupload/.+", path):
            files = json.loads(body)["files"]
            modes = [
                {"path": f["path"], "uploadMode": _mode(f), "shouldIgnore": False} for f in files
            ]
            return self.reply({"files": modes})
        if match := re.fullmatch(r"/(?:datasets/)?(.+)\.git/info/lfs/objects/batch", path):
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.hub.url}/blob/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return self.reply(
                {"transfer": "basic", "objects": objects},
                Content_Type="application/vnd.git-lfs+json",
            )
        if match := re.fullmatch(r"/api/(?:models|datasets)/(.+)/commit/.+", path):
            return self.commit(match[1], [json.loads(line) for line in body.splitlines()])
        return self.reply({"error": f"unknown: POST {path}"}, 404)

    def commit(self, name, lines):
        files = self.hub.files[name]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.hub.commits.append((name, value["summary"]))
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                files.pop(value["path"], None)
        oid = self.hub.revision(name)
        url = f"{self.hub.url}/{name}/commit/{oid}"
        return self.reply({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def refused(self, path):
        if self.hub.refuse and re.search(self.hub.refuse_path, path):
            self.reply({"error": "refused"}, self.hub.refuse)
            return True
        return False

    def do_PUT(self):
        body = self.body()
        if self.refused(self.path):
            return None
        self.hub.blobs[self.path.rsplit("/", 1)[1]] = body
        return self.reply()

    def do_HEAD(self):
        self.do_GET(head=True)

    def do_GET(self, head=False):
        path = unquote(urlsplit(self.path).path)
        if path == "/api/whoami-v2":
            return self.reply(
                {
                    "type": "user",
                    "name": "user",
                    "auth": {"accessToken": {"role": "write"}},
                    "orgs": [],
                }
            )
        if match := re.fullmatch(r"/(?:datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            name, file = match.groups()
            data = self.hub.files.get(name, {}).get(file)
            if data is None:
                code = "EntryNotFound" if name in self.hub.files else "RepoNotFound"
                return self.reply({"error": "not found"}, 404, head, X_Error_Code=code)
            etag = f'"{hashlib.sha1(data).hexdigest()}"'
            return self.reply(data, 200, head, ETag=etag, X_Repo_Commit=self.hub.revision(name))
        if match := re.fullmatch(
            r"/api/(models|datasets)/([^/]+/[^/]+)(/tree/.+|/revision/.+)?", path
        ):
            kind, name, rest = match.groups()
            if name not in self.hub.files:
                return self.reply({"error": "not found"}, 404, head, X_Error_Code="RepoNotFound")
            files = self.hub.files[name]
            if rest and rest.startswith("/tree"):
                tree = [
                    {"type": "file", "path": p, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                    for p, d in files.items()
                ]
                return self.reply(tree, 200, head)
            siblings = [{"rfilename": path} for path in files]
            info = {
                "id": name,
                f"{kind[:-1]}Id": name,
                "sha": self.hub.revision(name),
                "siblings": siblings,
                "tags": [],
            }
            return self.reply({**info, "private": False, "downloads": 0, "likes": 0}, 200, head)
        return self.reply({"error": f"unknown: GET {path}"}, 404, head)


def _mode(file):
    """How a file is uploaded. The Hub decides by its name: binary files go through LFS."""
    return (
        "lfs"
        if file["path"].endswith((".safetensors", ".bin", ".pt", ".pth", ".parquet", ".png"))
        else "regular"
    )
