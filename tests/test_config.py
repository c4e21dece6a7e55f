"""The configuration: what is refused, with which words, before anything heavy is imported; and what is declared."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from fmcib_ssl.training.config import check_command_line, compose_run, keys_of, read_settings
from fmcib_ssl.training.settings import ConfigError

REPO = Path(__file__).resolve().parents[1]
CONFIGS = REPO / "configs"
TABLE = "data.annotations=my.csv"

#: Every option of every group, found on disk so that a new one cannot be forgotten.
OPTIONS = sorted(
    (path.parent.relative_to(CONFIGS).as_posix(), path.stem)
    for path in CONFIGS.glob("*/*.yaml")
    if path.parent.name not in ("hydra", "task")  # what a published task is, `evaluate` reads
)


def check(*arguments: str) -> None:
    check_command_line(arguments, CONFIGS)


def refusal(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        check(*arguments)
    return str(caught.value)


def choosing(group: str, option: str) -> str:
    return f"{'+' * (group == 'experiment')}{group}={option}"


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param([TABLE, "+trainer.profiler=simple"], id="an argument of Lightning's"),
        pytest.param([TABLE, "+data.select.fold=1"], id="a column of the user's"),
        pytest.param([TABLE, "data.select={fold: [1, 2]}"], id="columns as a dictionary"),
        pytest.param(["data=phantom", "data.select.split=test"], id="another split"),
        pytest.param([TABLE, "~schedule", "~logger", "~callbacks"], id="without what is optional"),
        pytest.param([TABLE, "logger=[csv,tensorboard]", "logger.tensorboard.name=t"], id="two options of a group"),
        pytest.param([TABLE, "name=2024"], id="a name of digits"),
        pytest.param([TABLE, "~encoder", "+encoder={_target_: my.Net, width: 3}"], id="an encoder of one's own"),
        pytest.param([TABLE, "-m", "loss=ntxent_mined,infonce", "seed=range(3)"], id="a sweep"),
        pytest.param([TABLE, "hydra.run.dir=here"], id="a folder of one's own"),
        pytest.param(["data.store=/data/site=A (2)/store"], id="a path that Hydra's grammar has no rule for"),
    ],
)
def test_accepted(arguments: list[str]) -> None:
    check(*arguments)


REFUSED = [
    # Names.
    (["+experiment=ct_ntxent_mind"], ["experiment=ct_ntxent_mind", "Did you mean ct_ntxent_mined?", "phantom_infonce"]),
    (["+experimnt=ct_infonce"], ["experimnt=ct_infonce", "Did you mean experiment?"]),
    (["los=infonce"], ["los:", "Did you mean loss?"]),
    (["loss=infonc"], ["loss=infonc", "Did you mean infonce?", "ntxent_mined"]),
    (["loss.temprature=0.2"], ["loss.temprature", "Did you mean loss.temperature?"]),
    (["temperature=0.2"], ["Did you mean loss.temperature?"]),
    (["loss.margin=0.1"], ["loss.margin", "loss has: temperature, negatives"]),
    (["optimizer.lr=0.1"], ["optimizer.lr", "Did you mean optimizer.base_lr?"]),
    (["data.batchsize=4"], ["data.batchsize", "Did you mean data.batch_size?"]),
    (["+data.batchsize=4"], ["data.batchsize=4", "Did you mean data.batch_size?"]),
    (["logger.wandb.project=mine"], ["logger.wandb.project", "logger has: csv"]),
    (["trainer.profiler=simple"], ["trainer.profiler", "+trainer.profiler=..."]),
    (["data.select.fold=1"], ["data.select.fold", "+data.select.fold=..."]),
    (["~loss"], ["loss: has no value"]),
    (["schedule=null"], ["schedule=null", "warmup_cosine", "~schedule"]),
    (["encoder={_target_: my.Net}"], ["mixed", "~encoder '+encoder={_target_: my.Net, ...}'"]),
    # Values.
    (["data.batch_size=0"], ["data.batch_size=0", "greater than 0", "'auto'"]),
    (["data.patch_size=50"], ["data.patch_size=50", "[50, 50, 50]"]),
    (["data.patch_size=[50,50,0]"], ["data.patch_size.2=0", "greater than 0"]),
    (["data.patch_size=[32,32]"], ["data.patch_size=[32, 32]", "three numbers", "[50, 50, 50]"]),
    (["optimizer.base_lr=1e-3x"], ["optimizer.base_lr=1e-3x", "a number", "optimizer.base_lr=0.001"]),
    (["head.batch_norm=yes"], ["head.batch_norm=yes", "true or false"]),
    (["augment.crop_edge=half"], ["augment.crop_edge=half", "a list", "[0.5, 1.0]"]),
    (["callbacks.collapse_monitor.window=two"], ["callbacks.collapse_monitor.window=two", "a number"]),
    (["data.select={split: train"], ["data.select={split: train: is not of the form key=value"]),
    (["data.coordinates=LPS"], ["data.coordinates=LPS", "'lps', 'ras' or 'voxel'"]),
    (["hardware.accelerator=tpu"], ["hardware.accelerator=tpu", "'gpu'"]),
    (["seed=-1", "data.spacing_mm=0"], ["seed=-1", "data.spacing_mm=0"]),
    (["name=${nosuch}"], ["nosuch"]),
    (["data.image_root"], ["data.image_root"]),
    (["data.cache_scans=3"], ["data.cache_scans is gone", "Leave it out"]),
    (["hardware.views_on=device"], ["hardware.views_on is now called hardware.augment_on"]),
    (["~callbacks.signals"], ["callbacks.signals is now called callbacks.collapse_monitor"]),
    # Contradictions.
    (["trainer.max_epochs=-1"], ["never end", "trainer.max_steps"]),
    (["trainer.max_steps=0"], ["no step", "trainer.max_steps"]),
    (["data.negatives_per_lesion=0"], ["data.negatives_per_lesion=0 mines no negatives", "loss.negatives=lesions"]),
    (["hardware.sync_batchnorm=true"], ["hardware.sync_batchnorm=true", "Set it to false"]),
    # Sweeps: a wrong value anywhere in one.
    (["-m", "+experiment=ct_infonce,ct_infonec"], ["ct_infonec", "Did you mean ct_infonce?"]),
    (["-m", "loss=infonce,ntxent_mined", "loss.margin=0.1"], ["loss.margin"]),
    (["loss.temperature=0.1,x", "-m"], ["loss.temperature=x", "a number"]),
    # Options.
    (["--experiment", "ct_infonce"], ["--experiment: unknown option", "+experiment=ct_infonce"]),
    (["--loss.temperature=0.2"], ["unknown option", "such as loss.temperature=0.2"]),
    (["--experimental-rerun", "job.pickle"], ["--experimental-rerun: unknown option"]),
    # Folders.
    (["--config-dir", "no_such_folder"], ["--config-dir no_such_folder: there is no such folder"]),
]


@pytest.mark.parametrize(("arguments", "fragments"), REFUSED, ids=lambda value: " ".join(value)[:60])
def test_refused_with_the_key_and_the_remedy(arguments: list[str], fragments: list[str]) -> None:
    message = refusal(*arguments, TABLE)
    assert not [fragment for fragment in fragments if fragment not in message], message


def test_hydra_gets_the_overrides_in_one_place_and_quoted() -> None:
    given = ["--config-dir", str(CONFIGS), "seed=1,2", "-m", TABLE, "paths.runs=/a=b/it's"]
    expected = ["seed=1,2", TABLE, r"paths.runs='/a=b/it\'s'", "--config-dir", str(CONFIGS), "-m"]
    assert check_command_line(given, CONFIGS) == expected
    assert check_command_line(expected, CONFIGS) == expected, "it is checked again in every process of a run"


def test_a_missing_table_is_named() -> None:
    message = refusal("+experiment=ct_ntxent_mined")
    assert "data.annotations=FILE.csv" in message
    assert "data.store=DIR" in message


@pytest.fixture
def own_configs(tmp_path: Path) -> Path:
    """A user's folder of experiments and options, for `--config-dir`."""
    ct = "# @package _global_\ndefaults:\n  - ct_ntxent_mined\n"
    files = {
        "experiment/good.yaml": f"{ct}data: {{annotations: a.csv}}\ntrainer: {{profiler: simple}}\n",
        "experiment/misspelt.yaml": f"{ct}loss: {{temprature: 0.3}}\n",
        "experiment/misspelt_section.yaml": f"{ct}los: {{temperature: 0.3}}\n",
        "experiment/misspelt_group.yaml": "# @package _global_\ndefaults:\n  - override /los: infonce\n",
        "experiment/without_package.yaml": "loss: {temperature: 0.3}\n",
        "experiment/unclosed.yaml": "# @package _global_\nloss: {temperature: 0.3\n",
        "experiment/unscheduled.yaml": "# @package _global_\ndefaults:\n  - override /schedule: null\n",
        "loss/mine.yaml": "_target_: my_package.MyLoss\nsharpness: 3\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    "arguments", [["+experiment=good"], ["+experiment=unscheduled", TABLE], ["loss=mine", "loss.sharpness=4", TABLE]]
)
def test_a_users_own_files_are_accepted(own_configs: Path, arguments: list[str]) -> None:
    check("--config-dir", str(own_configs), *arguments)


@pytest.mark.parametrize(
    ("argument", "fragments"),
    [
        ("+experiment=misspelt", ["experiment misspelt", "loss.temprature", "Did you mean loss.temperature?"]),
        ("+experiment=[good,misspelt]", ["loss.temprature", "Did you mean loss.temperature?"]),
        ("+experiment=misspelt_section", ["experiment misspelt_section", "los", "Did you mean loss?"]),
        ("+experiment=misspelt_group", ["experiment/misspelt_group", "'los'"]),
        ("+experiment=without_package", ["experiment without_package", "# @package _global_"]),
        ("+experiment=unclosed", ["unclosed.yaml", "line 2"]),
        ("+experiment=goood", ["experiment=goood", "Did you mean good?"]),
        ("loss=mien", ["loss=mien", "Did you mean mine?"]),
    ],
)
def test_a_users_own_files_are_checked(own_configs: Path, argument: str, fragments: list[str]) -> None:
    message = refusal("--config-dir", str(own_configs), argument, TABLE)
    assert not [fragment for fragment in fragments if fragment not in message], message


# An experiment with every option of every group.

GROUPS = {group: [o for g, o in OPTIONS if g == group] for group, _ in OPTIONS}
EXPERIMENTS = GROUPS.pop("experiment")


NUM_ROWS = max(map(len, GROUPS.values()))


@pytest.mark.parametrize(
    ("row", "experiment"),
    [(row, EXPERIMENTS[row % len(EXPERIMENTS)]) for row in range(NUM_ROWS)]
    + [pytest.param(row, name, marks=pytest.mark.slow) for row in range(NUM_ROWS) for name in EXPERIMENTS],
)
def test_every_experiment_composes_with_every_option(row: int, experiment: str) -> None:
    """Each row takes one option of every group, and the rows together take them all."""
    choices = [f"{group}={options[row % len(options)]}" for group, options in GROUPS.items()]
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        alone = compose_run("train", choices).config
        config = compose_run("train", [f"+experiment={experiment}", *choices]).config
    for group in GROUPS:
        # The keys of the option, no more and no less: its constructor takes them.
        assert set(keys_of(config[group])) == set(keys_of(alone[group]))
        assert config[group].get("_target_") == alone[group].get("_target_")
    config.paths.run = "run"
    config.data.annotations = "my.csv"
    read_settings(config)


def test_what_the_command_line_adds_to_a_replaced_option_stays() -> None:
    overrides = ["+experiment=ct_infonce", "loss=ntxent_mined", "+loss.sharpness=3"]
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        assert compose_run("train", overrides).config.loss.sharpness == 3
        phantom = compose_run("train", ["+experiment=phantom_infonce", "augment=nodule"])
    assert "augment.crop_edge, which augment=nodule does not have" in phantom.dropped


def test_an_experiment_composes_with_an_option_of_the_users(
    own_configs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config-dir", str(own_configs), "+experiment=ct_infonce", "loss=mine", "loss.sharpness=4"]
    with pytest.raises(SystemExit):
        check(*arguments, "--cfg", "job", "-p", "loss")
    assert yaml.safe_load(capsys.readouterr().out) == {"_target_": "my_package.MyLoss", "sharpness": 4}


def test_what_an_experiment_sets_holds_for_an_option_that_has_the_key(
    own_configs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = "# @package _global_\nencoder: {_target_: my.Net, depth: 7}\nloss: {negatives: lesions}\n"
    (own_configs / "experiment/own_encoder.yaml").write_text(own)
    arguments = ["--config-dir", str(own_configs), "+experiment=own_encoder", "encoder=resnet34", "loss=infonce"]
    with pytest.raises(SystemExit):
        check(*arguments, "--cfg", "job")
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["loss"] == {**yaml.safe_load((CONFIGS / "loss/infonce.yaml").read_text()), "negatives": "lesions"}
    # The experiment's own object, with arguments that are no other's.
    own_keys = {"weights": None, "rate": 1.0}  # of every encoder, whatever its network
    assert shown["encoder"] == {**own_keys, **yaml.safe_load((CONFIGS / "encoder/resnet34.yaml").read_text())}


# The command line as a user sees it.


def run_python(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False, timeout=250
    )


def test_the_check_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from fmcib_ssl.training.config import check_command_line\n"
        f"check_command_line(['+experiment=phantom_infonce'], Path({str(CONFIGS)!r}))\n"
        "print(sorted({'torch', 'lightning', 'monai', 'pandas', 'SimpleITK'} & set(sys.modules)))\n"
    )
    result = run_python(tmp_path, code)
    assert result.stdout.splitlines()[-1] == "[]", result.stderr


def test_help_names_every_option_and_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import runpy, sys\n"
        "sys.argv = ['train.py', '--help']\n"
        f"try: runpy.run_path({str(REPO / 'train.py')!r}, run_name='__main__')\n"
        "finally: print('torch' in sys.modules, file=sys.stderr)\n"
    )
    result = run_python(tmp_path, code)
    assert (result.returncode, result.stderr.split()) == (0, ["False"])
    listed = {
        group: options.split(", ")
        for group, _, options in (line.partition(": ") for line in result.stdout.splitlines())
    }
    for group, option in OPTIONS:
        assert option in listed[group]
    assert set(listed) & {"task", "hydra"} == set(), "what is listed can be chosen"
    assert not list(tmp_path.iterdir()), "--help wrote something"


def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(REPO / "train.py"), "+experiment=ct_infonce", TABLE, "loss.temprature=0.2"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=250)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "error: loss.temprature: there is no such key. Did you mean loss.temperature?\n"
    assert not list(tmp_path.iterdir())


# What the files declare, against what the code takes.

#: Arguments that the run fills in by itself, not the user.
FILLED_IN = {
    "augment": {"preprocessing"},
    "head": {"in_dim"},
    "method": {"parts"},
    "optimizer": {"named_parameters", "lr"},
    "schedule": {"optimizer", "total_steps"},
}
#: Keys that the run takes out and works with itself.
TAKEN_OUT = {
    "encoder": {"weights", "rate"},
    "head": {"weights"},
    "optimizer": {"base_lr", "reference_batch"},
}


def composed(group: str, option: str) -> DictConfig:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        return compose("train", [choosing(group, option), "data.annotations=my.csv", "paths.run=here"])


def components(config: Any) -> Iterator[dict[str, Any]]:
    if isinstance(config, dict):
        if "_target_" in config:
            yield config
        for value in config.values():
            yield from components(value)


@pytest.mark.parametrize(("group", "option"), [found for found in OPTIONS if found[0] != "experiment"])
def test_what_is_declared_is_what_the_code_takes(group: str, option: str) -> None:
    from hydra.utils import get_object

    section = OmegaConf.to_container(composed(group, option)[group], resolve=True)
    for component in components(section):
        target = component["_target_"]
        declared = {key for key in component if not key.startswith("_")} - TAKEN_OUT.get(group, set())
        filled_in = FILLED_IN.get(group, set())
        parameters = inspect.signature(get_object(target)).parameters
        assert not declared & filled_in, f"{target}: the run fills these in"
        if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
            continue  # who takes them checks them
        assert declared <= set(parameters), f"{target} does not take these"
        if target.startswith("fmcib_ssl."):
            assert set(parameters) - filled_in == declared, f"configs/{group}/{option}.yaml leaves these out"


def test_an_experiment_reads_into_typed_settings() -> None:
    settings = read_settings(composed("experiment", "deeplesion_ntxent_mined"))
    assert (settings.loss["temperature"], settings.method["forwards"]) == (0.1, "separate")
    assert (settings.data.patch_size, settings.data.spacing_mm) == ((50, 50, 50), 1.0)
    assert (settings.trainer.max_epochs, settings.encoder["widen_factor"]) == (100, 2)
    assert settings.optimizer["_target_"].endswith(".lars") and settings.world_size == 2


# Folders on the command line: of configurations, and of the run.

RUN = ["+experiment=ct_infonce", TABLE]


def test_options_on_the_search_path_are_checked(own_configs: Path) -> None:
    message = refusal(f"hydra.searchpath=[{own_configs}]", "+experiment=misspelt", TABLE)
    assert "loss.temprature" in message and "Did you mean loss.temperature?" in message


def test_another_folder_of_configurations_is_the_one_that_is_checked(tmp_path: Path) -> None:
    assert "nowhere' exists and readable" in refusal("--config-path", "nowhere", *RUN)
    assert "primary config 'train'" in refusal("--config-path", str(tmp_path), *RUN)


def test_a_run_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert f"{tmp_path}/file is not a folder" in refusal(*RUN, f"hydra.run.dir={tmp_path}/file/run")


def test_a_run_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write anywhere
    assert "paths.runs=DIR" in refusal(*RUN, f"hydra.run.dir={tmp_path}/run")
    check(*RUN, f"paths.runs={tmp_path.parent}")


def test_a_new_run_chooses_its_folder_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "leave one of them out" in refusal(*RUN, "run=new", "hydra.run.dir=here")
    monkeypatch.setenv("LOCAL_RANK", "1")  # whom Lightning started, with the folder of the first
    check(*RUN, "run=new", "hydra.run.dir=here")


def test_a_sweep_over_lengths_has_a_folder_for_each() -> None:
    assert check_command_line(["-m", *RUN, "seed=0,1"], CONFIGS) == [*RUN, "seed=0,1", "-m"]
    lengths = [*RUN, "trainer.max_epochs=1,2"]
    added = "hydra.sweep.subdir='${run_key:${hydra.sweep.dir},trainer.max_epochs}'"
    assert check_command_line(["-m", *lengths], CONFIGS) == [*lengths, added, "-m"]
