"""Published weights in, a run from them, and its encoder out, by the commands."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tiny_runs import tiny_settings

import fmcib_ssl
from fmcib_ssl.command import export_encoder, import_encoder
from fmcib_ssl.models import small_resnet
from fmcib_ssl.run import pretrain


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload needs; keeps what it is sent."""

    requests: ClassVar[list[tuple[str, Any, str | None]]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        lines = [json.loads(line) for line in body.splitlines()]
        self.requests.append((self.path, lines, self.headers.get("Authorization")))
        address = f"http://{self.headers['Host']}/org/demo"
        answer: dict[str, Any] = {"url": address, "commitUrl": f"{address}/commit/1"}
        answer |= {"commitOid": "1", "name": "org/demo", "id": "org/demo"}
        if "/preupload/" in self.path:
            answer = {"files": [{**f, "uploadMode": "regular", "shouldIgnore": False} for f in lines[0]["files"]]}
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def do_GET(self) -> None:
        self.send_error(404)

    do_HEAD = do_GET  # noqa: N815  (the server asks for this name)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    constants = pytest.importorskip("huggingface_hub.constants")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_not_a_token")
    Hub.requests.clear()
    yield Hub
    server.shutdown()


def test_from_published_weights_to_a_model_card_on_the_hub(
    hub: type[Hub], phantom_table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = small_resnet()
    weights = {f"model.trunk.{key}": value for key, value in network.state_dict().items()}
    torch.save({"state_dict": {**weights, "model.heads.0.weight": torch.zeros(2)}}, tmp_path / "published.pt")
    imported = tmp_path / "imported.safetensors"
    import_encoder.main([
        "source=lighter", f"file={tmp_path / 'published.pt'}", f"output={imported}", "encoder=small",
        "patch_size=[16,16,16]", "spacing_mm=1.5", "hu_window=[-1000,400]", "licence=cc-by-4.0",
    ])  # fmt: skip
    printed = capsys.readouterr().out
    for words in (f"all {len(weights)} keys, under 'model.trunk.'", "1 keys, of model", "1.5 mm", "cc-by-4.0"):
        assert words in printed

    run = tmp_path / "run"
    start = ["+experiment=phantom_infonce", f"encoder.weights={imported}", "data.spacing_mm=1.5", "trainer.max_steps=1"]
    pretrain(tiny_settings(phantom_table, run, *start, "encoder.rate=0.1"))
    row = {"task": "texture", "features": "demo", "metric": "AUC", "value": 0.8, "low": 0.7, "high": 0.9}
    (tmp_path / "results.json").write_text(json.dumps({"rows": [row]}))
    export_encoder.main([
        f"encoder={run}", f"output={tmp_path / 'out'}", "formats=monai_bundle,huggingface", "licence=mit",
        f"results={tmp_path / 'results.json'}", "push=org/demo",
    ])  # fmt: skip
    folder = tmp_path / "out" / "huggingface"
    card = (folder / "README.md").read_text()
    for words in ("imported.safetensors (lighter, cc-by-4.0), SHA-256", "0.800 (0.700 to 0.900)", "InfoNCELoss"):
        assert words in card
    assert str(tmp_path) not in card + (folder / "config.json").read_text()
    fmcib_ssl.load_encoder(folder / "encoder.safetensors")

    (create,) = (lines[0] for path, lines, _ in hub.requests if path == "/api/repos/create")
    assert create.get("private") is True or create["visibility"] == "private"
    assert create["name"] == "demo" and create["organization"] == "org"
    (commit,) = (lines for path, lines, _ in hub.requests if "/commit/" in path)
    files = [line["value"] for line in commit if line["key"] == "file"]
    sent = {file["path"]: base64.b64decode(file["content"]) for file in files}
    assert sent == {file.name: file.read_bytes() for file in folder.iterdir()}
    assert {token for _, _, token in hub.requests} == {"Bearer hf_not_a_token"}
    assert not [f for f in tmp_path.rglob("*") if f.is_file() and b"hf_not_a_token" in f.read_bytes()]


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "w.pt")
    with pytest.raises(SystemExit, match="it has epoch"):
        import_encoder.main(["source=fmcib", f"file={tmp_path / 'w.pt'}", f"output={tmp_path / 'o.safetensors'}"])
    with pytest.raises(SystemExit, match="formats=huggingface"):
        export_encoder.main(["encoder=x", f"output={tmp_path}", "formats=onnx", "push=org/demo"])
