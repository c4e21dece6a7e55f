"""A stand-in for Weights & Biases' server, as much of it as one run asks for: its state, its files, its history.

What a client sends was learned by listening to wandb 0.31; what it needs as an answer are the fields of its queries.
"""

from __future__ import annotations

import gzip
import json
import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, ClassVar

#: As long as a key of the real one.
API_KEY = "a" * 40


class Page:
    """What the server has of one run."""

    def __init__(self) -> None:
        self.config: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.lines: dict[str, dict[int, str]] = defaultdict(dict)  # of a file that grows, by number
        self.files: dict[str, bytes] = {}

    def add(self, stream: dict[str, Any]) -> None:
        """What one request to the stream of files brings; a line that is there is replaced, as on the real one."""
        for name, chunk in stream.get("files", {}).items():
            for number, line in enumerate(chunk["content"], chunk["offset"]):
                self.lines[name][number] = line
        if summary := self.lines.get("wandb-summary.json"):
            self.summary = json.loads(summary[max(summary)])

    @property
    def history(self) -> list[dict[str, Any]]:
        lines = self.lines["wandb-history.jsonl"]
        assert sorted(lines) == list(range(len(lines))), "lines are missing"
        return [json.loads(lines[number]) for number in sorted(lines)]

    def tail(self, name: str) -> str:
        lines = self.lines[name]
        return json.dumps([lines[max(lines)]] if lines else [])


class TrackingServer:
    """Answers on a port of its own from entry to exit.

    Attributes:
        behaviour: may be changed at any time. `serves`; `fails`: answers 500 to all; `hangs`: takes requests and never
            answers; `denies`: knows no key.
        pages: by the run's id.
        opened: ids of runs, one for each client that began to write one.
        received: every byte that any client sent, in a request's body.
    """

    def __init__(self, behaviour: str = "serves") -> None:
        self.behaviour = behaviour
        self.pages: dict[str, Page] = defaultdict(Page)
        self.opened: list[str] = []
        self.received = b""
        self.end = threading.Event()
        handler = type("Bound", (_Handler,), {"its": self})
        self._http = _Server(("127.0.0.1", 0), handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    @property
    def environ(self) -> dict[str, str]:
        """What sends wandb here."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": API_KEY, "WANDB_MODE": "online"}

    def __enter__(self) -> TrackingServer:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end.set()
        self._http.shutdown()
        self._http.server_close()

    def answer(self, operation: str, asked: dict[str, Any]) -> dict[str, Any]:
        """To a query or mutation, by its name."""
        answers = {"RunResumeStatus": self._resume_status, "UpsertBucket": self._upsert, "CreateRunFiles": self._files}
        if operation == "Viewer":
            return {"viewer": {"id": "1", "entity": "me", "username": "me", "teams": {"edges": []}, "flags": "{}"}}
        if operation == "ServerFeaturesQuery":
            return {"serverInfo": {"features": []}}
        return answers[operation](asked) if operation in answers else {}

    def _resume_status(self, asked: dict[str, Any]) -> dict[str, Any]:
        bucket = None
        if asked["name"] in self.pages:
            page = self.pages[asked["name"]]
            bucket = {
                **self._bucket(asked["name"]),
                "summaryMetrics": json.dumps(page.summary),
                "logLineCount": len(page.lines["output.log"]),
                "eventsLineCount": len(page.lines["wandb-events.jsonl"]),
                "historyTail": page.tail("wandb-history.jsonl"),
                "eventsTail": page.tail("wandb-events.jsonl"),
                "tags": [],
                "notes": None,
                "wandbConfig": json.dumps({"t": 1}),
            }
        return {"model": {**_project(asked), "bucket": bucket}}

    def _upsert(self, asked: dict[str, Any]) -> dict[str, Any]:
        name = asked["name"]
        inserted = name not in self.pages
        if asked["displayName"]:  # a client names the run when it begins, and not again
            self.opened.append(name)
        if asked["config"]:
            self.pages[name].config = json.loads(asked["config"])
        bucket = {**self._bucket(name), "description": None, "sweepName": None, "project": _project(asked)}
        return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}

    def _bucket(self, name: str) -> dict[str, Any]:
        page = self.pages[name]
        of_page = {"config": json.dumps(page.config), "historyLineCount": len(page.lines["wandb-history.jsonl"])}
        return {"id": name, "name": name, "displayName": name, **of_page}

    def _files(self, asked: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.url}/put/{asked['run']}/{name}"} for name in asked["files"]]
        return {"createRunFiles": {"runID": asked["run"], "uploadHeaders": [], "files": files}}


def _project(asked: dict[str, Any]) -> dict[str, Any]:
    return {"id": "p", "name": asked["project"], "entity": {"id": "e", "name": "me"}}


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that has gone; a mistake here shows as an answer that is missing."""


class _Handler(BaseHTTPRequestHandler):
    its: ClassVar[TrackingServer]
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self._body()
        parts = self.path.strip("/").split("/")
        if not self._behaves():
            return
        if parts[0] == "graphql":
            asked = json.loads(body)
            # The name stands in the query: `query NAME ($...`
            operation = asked["query"].split("(")[0].split("{")[0].split()[1]
            self._reply({"data": self.its.answer(operation, asked.get("variables") or {})})
        elif parts[-1] == "file_stream":
            self.its.pages[parts[-2]].add(json.loads(body))
            self._reply({})
        else:
            self._reply({})

    def do_PUT(self) -> None:
        body = self._body()
        if self._behaves():
            _, run, name = self.path.strip("/").split("/", 2)
            self.its.pages[run].files[name] = body
            self._reply({})

    def do_GET(self) -> None:
        if self._behaves():
            self._reply({})

    def _behaves(self) -> bool:
        if self.its.behaviour == "hangs":
            self.its.end.wait()
            self.close_connection = True
            return False
        if self.its.behaviour != "serves":
            self._reply({"errors": [{"message": "no"}]}, {"fails": 500, "denies": 401}[self.its.behaviour])
            return False
        return True

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline().strip() or b"0", 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
        self.its.received += body
        return body

    def _reply(self, answer: dict[str, Any], status: int = 200) -> None:
        content = json.dumps(answer).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        except OSError:  # the client has gone
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Say nothing."""
