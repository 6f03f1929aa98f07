"""A small fake of the HTTP protocol that W&B's client 0.31 speaks, on loopback.

It keeps what arrives in memory, as the real server is documented to: a run's history lines by their
offset, its summary, config, files and artifacts. It proves the client's side alone.
"""

import gzip
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_CREATED_ARTIFACT = {"artifactType": {"id": "type", "name": "type"}, "versionIndex": 0}


@dataclass
class FakeRun:
    """What the server holds of one run."""

    id: str
    project: str
    entity: str
    history: dict[int, str] = field(default_factory=dict)  # by offset
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)  # of the last UpsertBucket
    files: dict[str, bytes] = field(default_factory=dict)
    artifacts: dict[str, dict[str, Any]] = field(default_factory=dict)  # by name
    exit_code: int | None = None
    events: int = 0

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The history in order of offset."""
        return [json.loads(line) for _, line in sorted(self.history.items())]


class FakeWandb(ThreadingHTTPServer):
    """The server; what it holds is in ``runs``, by id."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, port: int = 0) -> None:
        self.runs: dict[str, FakeRun] = {}
        self.operations: list[str] = []  # GraphQL operations and paths, in order
        self.fail_with: int | None = None  # answer everything with this code
        self.hang_on: str | None = None  # never answer requests of which this is a part
        self.die_on: str | None = None  # at such a request, stop answering anything
        self.break_on: str | None = None  # at such a request, begin to answer all with 500
        self.refuse_on: str | None = None  # answer such requests with 403
        self.sweep = ""  # the settings of the only one, in YAML; its id is "s1"
        self.trials: list[dict[str, Any]] = []  # that an agent still gets: run_id and args
        self.uploads: dict[str, tuple[dict[str, bytes], str]] = {}
        self.lock = threading.RLock()
        super().__init__(("127.0.0.1", port), _Handler)

    @property
    def url(self) -> str:
        """The base URL."""
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def run(self) -> FakeRun:
        """The only run."""
        (run,) = self.runs.values()
        return run

    def handle_error(self, *_: object) -> None:
        """A client that went away is no matter."""

    def address(self, where: dict[str, bytes], name: str) -> str:
        """A URL to PUT a file to, which then is ``where[name]``."""
        key = f"/put/{len(self.uploads)}"
        self.uploads[key] = where, name
        return self.url + key

    def answer(self, operation: str, v: dict[str, Any]) -> dict[str, Any] | None:
        """The data of a GraphQL answer; None if the operation is unknown."""
        if operation == "Viewer":
            viewer = {"id": "u", "entity": "tester", "username": "tester", "email": "t@localhost"}
            return {"viewer": {**viewer, "flags": "{}", "teams": {"edges": []}}}
        if operation == "ServerFeaturesQuery":
            return {"serverInfo": {"features": []}}
        if operation == "RunResumeStatus":
            run = self.runs.get(v["name"])
            entity = {"id": "e", "name": v["entity"] or "tester"}
            bucket = run and {**_bucket(run), "summaryMetrics": json.dumps(run.summary)}
            if bucket:
                tail = [line for _, line in sorted(run.history.items())[-1:]]
                bucket |= {
                    "logLineCount": 0,
                    "eventsLineCount": run.events,
                    "historyTail": json.dumps(tail),
                    "eventsTail": "[]",
                    "tags": run.attributes.get("tags") or [],
                    "notes": "",
                    "wandbConfig": json.dumps({"t": 1}) if run.history else None,
                }
            return {"model": {"id": "p", "name": v["project"], "entity": entity, "bucket": bucket}}
        if operation == "UpsertBucket":
            return self._upsert(v)
        if operation == "CreateRunFiles":
            files = self.runs[v["run"]].files
            handed = [{"name": n, "uploadUrl": self.address(files, n)} for n in v["files"]]
            return {"createRunFiles": {"runID": v["run"], "uploadHeaders": [], "files": handed}}
        if operation in ("UpsertSweep", "SweepWithRuns", "CreateAgent", "Heartbeat"):
            return self._sweep(operation, v)
        if operation == "OrganizationCoreWeaveOrganizationID":
            return {"entity": None}
        if operation == "MarkRunFilesUploaded":
            return {"markRunFilesUploaded": {"success": True}}
        if "Artifact" in operation or operation == "XXHashDigestsEnabled":
            return self._artifact(operation, v)
        return None

    def _sweep(self, operation: str, v: dict[str, Any]) -> dict[str, Any]:
        if operation == "UpsertSweep":
            self.sweep = v["config"]
            entity = {"id": "e", "name": v["entityName"] or "tester"}
            project = {"id": "p", "name": v["projectName"], "entity": entity}
            sweep = {"name": "s1", "project": project}
            return {"upsertSweep": {"sweep": sweep, "configValidationWarnings": []}}
        if operation == "SweepWithRuns":
            sweep = {"id": "i", "name": v["sweep"], "config": self.sweep, "runs": {"edges": []}}
            return {"project": {"sweep": sweep}}
        if operation == "CreateAgent":
            return {"createAgent": {"agent": {"id": "a1"}}}
        commands = []
        if self.trials and not json.loads(v["runState"]):  # a trial at a time
            program = re.search(r"program: (.*)", self.sweep)
            commands = [{"type": "run", "program": program and program[1], **self.trials.pop(0)}]
        return {"agentHeartbeat": {"agent": {"id": "a1"}, "commands": json.dumps(commands)}}

    def _upsert(self, v: dict[str, Any]) -> dict[str, Any]:
        new = v["name"] not in self.runs
        project, entity = v["project"] or "uncategorized", v["entity"] or "tester"
        if new or self.runs[v["name"]].project != project:  # another project: another run
            self.runs[v["name"]] = FakeRun(v["name"], project, entity)
        run = self.runs[v["name"]]
        run.attributes |= {k: value for k, value in v.items() if value is not None}
        if v["config"]:
            run.config = json.loads(v["config"])
        if v["summaryMetrics"]:
            run.summary |= json.loads(v["summaryMetrics"])
        return {"upsertBucket": {"bucket": _bucket(run), "inserted": new}}

    def _artifact(self, operation: str, v: dict[str, Any]) -> dict[str, Any] | None:
        if operation == "XXHashDigestsEnabled":
            return {"entity": {"xxhashDigestsEnabled": False}}
        if operation == "FetchArtifactDigestAlgorithm":
            return {"project": None}
        if operation == "CreateArtifact":
            given = v["input"]
            name = given["artifactCollectionName"]
            run = self.runs[given["runName"]]
            run.artifacts[name] = {**given, "files": {}, "manifest": {}, "committed": False}
            created = {"id": f"{run.id}/{name}", "state": "PENDING", "digest": given["digest"]}
            created |= {"artifactSequence": {"id": name, "latestArtifact": None}}
            return {"createArtifact": {"artifact": created | _CREATED_ARTIFACT}}
        if operation == "CreateArtifactManifest":
            held = self.runs[v["runName"]].artifacts
            name = v["artifactID"].split("/", 1)[1]
            file = {"id": "f", "uploadUrl": None, "uploadHeaders": []}
            if v["includeUpload"]:
                file["uploadUrl"] = self.address(held[name]["manifest"], v["name"])
            made = {"id": f"m/{self.runs[v['runName']].id}/{name}", "file": file}
            return {"createArtifactManifest": {"artifactManifest": made}}
        if operation == "CreateArtifactFiles":
            edges = []
            for spec in v["input"]["artifactFiles"]:
                run_id, name = spec["artifactID"].split("/", 1)
                url = self.address(self.runs[run_id].artifacts[name]["files"], spec["name"])
                node = {"storagePath": spec["name"], "uploadUrl": url, "uploadHeaders": []}
                node |= {"uploadMultipartUrls": None, "artifact": {"id": spec["artifactID"]}}
                edges.append({"node": node})
            return {"createArtifactFiles": {"files": {"edges": edges}}}
        if operation == "UpdateArtifactManifest":
            _, run_id, name = v["artifactManifestID"].split("/", 2)
            url = self.address(self.runs[run_id].artifacts[name]["manifest"], "manifest")
            file = {"id": "f", "uploadUrl": url, "uploadHeaders": []}
            made = {"id": v["artifactManifestID"], "file": file}
            return {"updateArtifactManifest": {"artifactManifest": made}}
        if operation == "CommitArtifact":
            run_id, name = v["artifactID"].split("/", 1)
            self.runs[run_id].artifacts[name]["committed"] = True
            return {"commitArtifact": {"artifact": {"id": v["artifactID"], "digest": "d"}}}
        return None

    def stream(self, run_id: str, body: dict[str, Any]) -> None:
        """What a run sends while it is running."""
        run = self.runs[run_id]
        for name, chunk in (body.get("files") or {}).items():
            if name == "wandb-history.jsonl":
                run.history |= dict(enumerate(chunk["content"], start=chunk["offset"]))
            elif name == "wandb-summary.json":
                run.summary = json.loads(chunk["content"][-1])
            elif name == "wandb-events.jsonl":
                run.events = chunk["offset"] + len(chunk["content"])
        if body.get("complete"):
            run.exit_code = body.get("exitcode")


def _bucket(run: FakeRun) -> dict[str, Any]:
    project = {"id": "p", "name": run.project, "entity": {"id": "e", "name": run.entity}}
    names = {"id": run.id, "name": run.id, "displayName": run.attributes.get("displayName")}
    rest = {"description": "", "sweepName": None, "historyLineCount": len(run.history)}
    return {**names, **rest, "config": json.dumps(run.config), "project": project}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeWandb

    def do_POST(self) -> None:
        self._take()

    def do_PUT(self) -> None:
        self._take()

    def do_GET(self) -> None:
        self._take()

    def log_message(self, *_: object) -> None:
        """Silence."""

    def _take(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        fake, name = self.server, self.path
        request = {}
        if self.path == "/graphql":
            request = json.loads(body)
            found = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])
            name = found[1] if found else "?"
        with fake.lock:
            fake.operations.append(name)
        if fake.die_on and fake.die_on in name:
            fake.hang_on = ""
        if fake.break_on and fake.break_on in name:
            fake.fail_with = 500
        if fake.hang_on is not None and fake.hang_on in name:
            while fake.hang_on is not None:
                time.sleep(0.1)
            self.close_connection = True  # it never came to the knowledge of the server
            return None
        if fake.refuse_on and fake.refuse_on in name:
            return self._reply(403, {})
        if fake.fail_with:
            return self._reply(fake.fail_with, {"error": "injected"})
        with fake.lock:
            if self.path == "/graphql":
                data = fake.answer(name, request.get("variables") or {})
                if data is None:
                    message = f"unknown to the fake: {request['query'][:200]}"
                    return self._reply(400, {"errors": [{"message": message}]})
                return self._reply(200, {"data": data})
            if self.path.endswith("/file_stream"):
                fake.stream(self.path.split("/")[-2], json.loads(body))
                return self._reply(200, {})
            if self.path in fake.uploads:
                where, file = fake.uploads[self.path]
                where[file] = body
                return self._reply(200, {})
        return self._reply(404, {})

    def _reply(self, code: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        with suppress(OSError):
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)


@contextmanager
def serving(port: int = 0) -> Iterator[FakeWandb]:
    """A running fake."""
    with FakeWandb(port) as fake:
        threading.Thread(target=fake.serve_forever, args=(0.05,), daemon=True).start()
        yield fake
        fake.hang_on = fake.die_on = None
        fake.shutdown()
