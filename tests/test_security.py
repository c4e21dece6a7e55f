"""What is never done: unpickle, build what a foreign file names, tell a secret, open a file to the world."""

from __future__ import annotations

import ast
import os
import stat
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fmcib_ssl.io import HIDDEN, no_world_write, read_json, read_yaml, redacted
from fmcib_ssl.models.trusted import UntrustedTargetError, check_targets, is_trusted

pytestmark = pytest.mark.attack

REPO = Path(__file__).resolve().parents[1]
SOURCES = sorted([*REPO.glob("fmcib_ssl/**/*.py"), *REPO.glob("scripts/**/*.py"), REPO / "train.py"])

#: Functions that run, or may run, what a file or a text holds.
FORBIDDEN = {
    "pickle.load", "pickle.loads", "pickle.Unpickler", "cPickle.load", "dill.load", "joblib.load", "cloudpickle.load",
    "marshal.loads", "shelve.open", "pd.read_pickle", "pandas.read_pickle", "yaml.load", "yaml.unsafe_load",
    "yaml.full_load", "yaml.load_all", "os.system", "os.popen", "os.execl", "os.spawnl", "subprocess.getoutput",
    "subprocess.getstatusoutput", "torch.hub.load", "torch.jit.load", "eval", "exec", "compile", "__import__",
}  # fmt: skip


def calls(file: Path) -> list[tuple[str, ast.Call]]:
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    return [(ast.unparse(node.func), node) for node in nodes if isinstance(node, ast.Call)]


def problems(file: Path) -> list[str]:
    found = []
    for name, call in calls(file):
        where = f"{file.name}:{call.lineno} {name}"
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if name in FORBIDDEN:
            found.append(where)
        if name == "torch.load" and given.get("weights_only") != "True":
            found.append(f"{where} without weights_only=True")
        if name in ("np.load", "numpy.load") and given.get("allow_pickle", "False") != "False":
            found.append(f"{where} with allow_pickle")
        if name.startswith("subprocess.") and given.get("shell", "False") != "False":
            found.append(f"{where} with a shell")
        if name in ("os.chmod", "os.umask") and file.name != "io.py":
            found.append(where)
    return found


def test_the_sources_do_none_of_it() -> None:
    assert len(SOURCES) > 60
    assert not [problem for file in SOURCES for problem in problems(file)]


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)", "torch.load(path, weights_only=False)", "pickle.load(file)", "yaml.load(text)",
        "eval(text)", "exec(text)", "os.system(text)", "subprocess.run(text, shell=True)",
        "np.load(f, allow_pickle=True)", "pd.read_pickle(path)",
    ],
)  # fmt: skip
def test_the_search_finds_each(line: str, tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(f"import torch\n{line}\n")
    assert problems(tmp_path / "module.py")


def test_ruffs_rules_against_shells_and_pickles() -> None:
    rules = "S102,S301,S302,S307,S506,S602,S604,S605,S609,S612"
    command = [sys.executable, *f"-m ruff check --isolated --select {rules} fmcib_ssl scripts train.py".split()]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    if "No module named ruff" in done.stderr:
        pytest.skip("ruff is not installed")
    assert done.returncode == 0, done.stdout


TRUSTED = [
    "fmcib_ssl.models.MinedContrast",
    "fmcib_ssl.losses.InfoNCELoss.from_temperature",
    "fmcib_ssl.models.encoders.small_resnet",
    "fmcib_ssl.models.encoders.ProjectionHead",
    "fmcib_ssl.training.optimizers.adamw",
    "fmcib_ssl.training.optimizers.warmup_cosine",
    "torch.nn.Linear",
    "torch.optim.AdamW",
    "torch.optim.lr_scheduler.CosineAnnealingLR",
]
UNTRUSTED = [
    "os.system",
    "builtins.eval",
    "torch.hub.load",
    "torch.load",
    "timm.models.load_state_dict",
    "timm.models.create_model",
    "torchvision.models.video.r3d_18",
    "monai.losses.PerceptualLoss",  # fetches code from a repository
    "monai.networks.nets.get_pretrained_resnet_medicalnet",
    "torch.optim.Optimizer.load_state_dict",
    "torch.nn.modules.utils.consume_prefix_in_state_dict_if_present",
    "torch.utils.cpp_extension.load",
    "torch.nn.modules.module.torch.hub.load",  # a way round by what a module imports
    "torch.nn.functional.torch.load",
    "torch.optim.optimizer.os.system",
    "monai.bundle.run",
    "monai.networks.nets.resnet.importlib.import_module",
    "fmcib_ssl.models.load_encoder",  # would build what its trusted_targets say
    "fmcib_ssl.models.export.load_encoder",
    "fmcib_ssl.training.build.build",
    "fmcib_ssl.training.summary.subprocess.run",
    "hydra.utils.instantiate",
    "fmcib_ssl.models.__init__.os.system",
    "fmcib_ssl.losses.__builtins__.eval",
    "no_such_package.Thing",
    "torch.nn.NoSuchLayer",
    "..",
    "",
]


@pytest.mark.parametrize("target", TRUSTED)
def test_parts_of_a_run_may_be_built(target: str) -> None:
    check_targets({"encoder": {"_target_": target}}, "config.yaml")


@pytest.mark.parametrize("target", [*UNTRUSTED, None, 3, ["os.system"]])
def test_nothing_else_may(target: Any) -> None:
    with pytest.raises(UntrustedTargetError, match=r"config\.yaml.*trusted_modules"):
        check_targets({"encoder": {"widths": [1, {"deep": [{"_target_": target}]}]}}, "config.yaml")


def test_every_shipped_option_is_a_part_of_a_run() -> None:
    import yaml

    for folder in ("method", "encoder", "head", "loss", "optimizer", "schedule", "augment"):
        for file in (REPO / "configs" / folder).glob("*.yaml"):
            text = file.read_text(encoding="utf-8").replace("${", "$ {")  # in a run folder its value stands instead
            check_targets(yaml.safe_load(text), file)


def test_a_package_that_is_not_trusted_is_not_even_imported(tmp_path: Path) -> None:
    (tmp_path / "harmful.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\nclass Net: pass\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nfrom fmcib_ssl.models.trusted import check_targets\n"
        "try: check_targets({'_target_': 'harmful.Net'}, 'f')\nexcept ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "trusted_modules=[harmful]" in done.stdout and not (tmp_path / "canary").exists()


def test_names_are_trusted_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_trusted("mine.net.Net", ["mine"]) and is_trusted("mine.net.Net", ["mine.net.Net"])
    assert not is_trusted("mine_not.Net", ["mine"]) and not is_trusted("mine.Net", ["", "mine.Network"])
    (tmp_path / "own_parts.py").write_text("import os\nfrom os import system\nclass Net: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    check_targets({"_target_": "own_parts.Net"}, "f", ["own_parts"])
    for other in ("own_parts.os.system", "own_parts.system", "own_parts.Absent"):  # what it imports is not its own
        with pytest.raises(UntrustedTargetError, match="defined in another package"):
            check_targets({"_target_": other}, "f", ["own_parts"])


@pytest.mark.parametrize(
    "value",
    ["${oc.env:HOME}", "a${b}", {"deep": ["${oc.create:{_target_: torch.load, f: x}}"]}, {"${oc.env:HOME}": 1}, "???"],
    ids=str,
)
def test_nothing_is_interpolated(value: Any) -> None:
    with pytest.raises(UntrustedTargetError, match="plain values only"):
        check_targets({"encoder": {"_target_": "fmcib_ssl.models.encoders.small_resnet", "widths": value}}, "f")


BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in pairwise("abcdefghi")
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (BOMB, "aliases"),
        ("a: &a [*a]", "aliases"),
        ("[" * 500 + "]" * 500, "too deeply"),
        ("[" * 5000, "too deeply"),
        ("- &a 1\n" * 200_000, "1 MB"),
        ("!!python/object/apply:os.system ['true']", "os.system"),
        ("a: [", "expected"),
        ("a: \x00", "cannot be read"),
        ("1: {[]: 2}\n? {}\n: 1", "unhashable"),
    ],
    ids=lambda text: text[:30],
)
def test_yaml_that_is_a_bomb(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=reason) as error:
        read_yaml(tmp_path / "config.yaml")
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 500 + "]" * 500, "too deeply"),
        ("[" * 100_000, "too deeply"),
        (f'["{"1" * 17_000_000}"]', "16 MB"),
        ('{"a": [1, 2}', "cannot be read"),
        ("", "cannot be read"),
    ],
    ids=lambda text: text[:30],
)
def test_json_has_the_same_limits(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=reason) as error:
        read_json(tmp_path / "run.json")
    assert str(tmp_path) in str(error.value)
    (tmp_path / "run.json").write_text('{"a": [{"b": null}]}')
    assert read_json(tmp_path / "run.json") == {"a": [{"b": None}]}


def test_yaml_as_the_usual_reader_reads_it(tmp_path: Path) -> None:
    import yaml

    text = "a: [1, 2.5, null, yes, text]\nc: {d: {e: 1}}\n"
    for content in (text, ""):
        (tmp_path / "config.yaml").write_text(content)
        assert read_yaml(tmp_path / "config.yaml") == yaml.safe_load(content)


SECRETS = [
    ({"api_key": "abc123", "name": "x"}, {"api_key": HIDDEN, "name": "x"}),
    ({"logger": {"wandb": {"WANDB_API_KEY": "abc123"}}}, {"logger": {"wandb": {"WANDB_API_KEY": HIDDEN}}}),
    ("https://user:abc123@host/data", f"https://{HIDDEN}@host/data"),
    ("s3://bucket?token=abc123&x=1", f"s3://bucket?token={HIDDEN}&x=1"),
    (["train.py", "+logger.wandb.api_key=abc123"], ["train.py", f"+logger.wandb.api_key={HIDDEN}"]),
    ("password=abc123", f"password={HIDDEN}"),
    (["password=abc123 with blanks"], [f"password={HIDDEN}"]),
    ("say password='abc123 with blanks' twice", f"say password={HIDDEN} twice"),
    (["hydra.job.env_set.MY_API_KEY=abc123"], [f"hydra.job.env_set.MY_API_KEY={HIDDEN}"]),
    (["hydra.job.env_set.PLAIN=abc123"], [f"hydra.job.env_set.PLAIN={HIDDEN}"]),
    ({"env_set": {"PLAIN": "abc123"}}, {"env_set": {"PLAIN": HIDDEN}}),
    (["logger={api_key: abc123, project: p}"], [f"logger={{api_key: {HIDDEN}, project: p}}"]),
    (["--api-key", "abc123", "x"], ["--api-key", HIDDEN, "x"]),
    ({"tokens": ["abc123", {"deep": "abc123"}]}, {"tokens": [HIDDEN, {"deep": HIDDEN}]}),
    # what is no secret stays
    ({"token": None, "num_tokens": 5}, {"token": None, "num_tokens": 5}),
    ("data.annotations=/a/b.csv", "data.annotations=/a/b.csv"),
    ("user@host:/data", "user@host:/data"),
    ((1, 2.5, True), (1, 2.5, True)),
]


@pytest.mark.parametrize(("values", "expected"), SECRETS)
def test_secrets_are_hidden(values: Any, expected: Any) -> None:
    assert redacted(values) == expected
    assert "abc123" not in str(redacted(values))
    assert redacted(redacted(values)) == expected


def test_no_file_is_open_to_the_world(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        no_world_write()
        (tmp_path / "file").write_text("")
        (tmp_path / "folder").mkdir()
        os.umask(0o077)
        no_world_write()  # takes nothing back that the user has closed
        (tmp_path / "own").write_text("")
    finally:
        os.umask(before)
    modes = {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("file", "folder", "own")}
    assert modes == {"file": 0o664, "folder": 0o775, "own": 0o600}
