"""A small Hub for tests: the endpoints that huggingface_hub needs to create, upload, list and download, on localhost."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse


TOKEN = "hf_test"


class Hub:
    """Repositories as lists of commits, each a dict path -> bytes.

    `fault(method, path)` may return a status to answer with, or "drop" to cut the connection in the middle of the body.
    """

    def __init__(self):
        self.repos: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.branches: dict[tuple[str, str], list[tuple[str, dict[str, bytes]]]] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.fault = None
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def reset(self):
        self.repos, self.branches, self.objects, self.requests, self.fault = {}, {}, {}, [], None

    def files(self, repo):
        return self.repos[repo][-1][1]

    def commits(self, repo):
        return [oid for oid, _ in self.repos[repo]]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", **headers):
        if isinstance(body, (dict, list)):
            body, headers = json.dumps(body).encode(), {"Content-Type": "application/json", **headers}
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_one(self):
        path = unquote(urlparse(self.path).path)
        self.hub.requests.append((self.command, path))
        length = int(self.headers.get("Content-Length") or 0)
        fault = self.hub.fault and self.hub.fault(self.command, path)
        if fault == "drop":
            self.rfile.read(length // 2)
            self.close_connection = True
            self.connection.close()
            return
        body = self.rfile.read(length)
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline().strip() or b"0", 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        if fault:
            return self.answer(fault, {"error": f"fault {fault}"})
        if self.command in ("POST", "PUT", "DELETE") and not path.startswith("/lfs/"):
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.answer(401, {"error": "Invalid username or password."})
        self.route(path, body)

    do_GET = do_HEAD = do_POST = do_PUT = handle_one

    def route(self, path, body):
        hub, parts = self.hub, path.strip("/").split("/")
        if path == "/api/whoami-v2":
            return self.answer(200, {"name": "tester", "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            wanted = json.loads(body)
            repo = f"{wanted.get('organization') or 'tester'}/{wanted['name']}"
            if repo in hub.repos:
                return self.answer(409, {"error": "You already created this model repo", "url": f"{hub.url}/{repo}"})
            hub.repos[repo] = [(hashlib.sha1(repo.encode()).hexdigest(), {".gitattributes": b"*.safetensors filter=lfs\n"})]
            return self.answer(200, {"url": f"{hub.url}/{repo}", "name": repo})
        if parts[0] == "lfs":
            hub.objects[parts[1]] = body
            return self.answer(200)
        if path.endswith("/info/lfs/objects/batch"):
            objects = []
            for item in json.loads(body)["objects"]:
                upload = {"upload": {"href": f"{hub.url}/lfs/{item['oid']}"}}
                objects.append({**item, **({} if item["oid"] in hub.objects else {"actions": upload})})
            return self.answer(200, {"transfer": "basic", "objects": objects})
        if parts[:2] == ["api", "models"]:
            repo, rest = "/".join(parts[2:4]), parts[4:]
            if repo not in hub.repos:
                return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return self.repository(repo, rest, body)
        if len(parts) > 4 and parts[2] == "resolve":
            return self.resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        return self.answer(404, {"error": f"no such endpoint {path}"}, X_Error_Code="RepoNotFound")

    def branch(self, repo, name):
        return self.hub.repos[repo] if name == "main" else self.hub.branches.get((repo, name))

    def commit_of(self, repo, revision):
        if branch := self.branch(repo, revision):
            return branch[-1]
        known = [commit for (name, _), commits in self.hub.branches.items() if name == repo for commit in commits]
        return next((commit for commit in [*self.hub.repos[repo], *known] if commit[0] == revision), None)

    def repository(self, repo, rest, body):
        hub = self.hub
        if rest and rest[0] == "preupload":
            files = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for f in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        if rest and rest[0] == "branch":
            if (repo, rest[1]) in hub.branches:
                return self.answer(409, {"error": "Reference already exists"})
            hub.branches[repo, rest[1]] = hub.repos[repo][-1:]
            return self.answer(200, {})
        if rest and rest[0] == "commit":
            commits = self.branch(repo, rest[1])
            files = dict(commits[-1][1])
            for line in body.splitlines():
                item = json.loads(line)
                value = item["value"]
                if item["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif item["key"] == "lfsFile":
                    files[value["path"]] = hub.objects[value["oid"]]
                elif item["key"] == "deletedFile":
                    files.pop(value["path"])
            oid = hashlib.sha1(body + str(len(commits)).encode()).hexdigest()
            commits.append((oid, files))
            return self.answer(200, {"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{repo}/commit/{oid}"})
        revision = rest[1] if len(rest) > 1 else "main"
        commit = self.commit_of(repo, revision)
        if commit is None:
            return self.answer(404, {"error": "Revision not found"}, X_Error_Code="RevisionNotFound")
        oid, files = commit
        if rest and rest[0] == "tree":
            return self.answer(200, [_entry(name, content) for name, content in sorted(files.items())])
        if rest and rest[0] == "paths-info":
            wanted = json.loads(body)["paths"]
            return self.answer(200, [_entry(name, files[name]) for name in wanted if name in files])
        names = [{"rfilename": name} for name in sorted(files)]
        return self.answer(200, {"id": repo, "modelId": repo, "sha": oid, "siblings": names, "private": False, "tags": []})

    def resolve(self, repo, revision, name):
        if repo not in self.hub.repos:
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        commit = self.commit_of(repo, revision)
        if commit is None:
            return self.answer(404, {"error": "Revision not found"}, X_Error_Code="RevisionNotFound")
        oid, files = commit
        if name not in files:
            return self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=oid)
        etag = hashlib.sha256(files[name]).hexdigest()
        return self.answer(200, files[name], ETag=f'"{etag}"', X_Repo_Commit=oid, Accept_Ranges="bytes")


def _entry(name, content):
    oid = hashlib.sha1(content).hexdigest()
    return {"type": "file", "path": name, "size": len(content), "oid": oid}
