"""The command line of `train.py` and what it configures, checked before anything heavy is imported.

Names are checked where a configuration is composed (`composition.py`), values by their types (`settings.py`).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from hydra import initialize_config_dir
from hydra._internal.hydra import Hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fmcib_ssl.composition import compose_plain, compose_run, keys_of, lines_of, nearest_key, parse_overrides
from fmcib_ssl.job import run_key
from fmcib_ssl.settings import ConfigError, Settings, settings_of
from fmcib_ssl.training.run_folder import RunFolderError, refuse_foreign
from fmcib_ssl.training.same_run import LENGTHS

#: `train.py` composes this file.
CONFIG_NAME = "train"


def _run_key(folder: str, *keyed: str, _root_: DictConfig) -> str:
    """`run_key` of the configuration that asks for it: `${run_key:FOLDER}`."""
    values = cast(dict[str, Any], OmegaConf.to_container(_root_, resolve=False))
    values.pop("hydra", None)
    values["paths"]["run"] = folder  # it is what is asked for
    return run_key(read_settings(OmegaConf.create(values)), Path(folder), keyed)


OmegaConf.register_new_resolver("run_key", _run_key, replace=True)  # known wherever a configuration is composed


def read_settings(config: DictConfig) -> Settings:
    """Turn a composed Hydra configuration into typed values.

    Raises:
        ConfigError: naming every key whose value is missing or not allowed.
    """
    try:
        missing = sorted(str(key) for key in OmegaConf.missing_keys(config))
        values = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"the configuration cannot be resolved: {error}") from error
    if missing:
        lines = [f"  {key} has no value: set it on the command line, {key}=..." for key in missing]
        raise ConfigError("the configuration is incomplete:\n" + "\n".join(lines))
    return settings_of(cast(dict[str, Any], values))


def check_command_line(arguments: Sequence[str], config_dir: Path) -> list[str]:
    """Check names and values of a `train.py` command line; sweeps are checked value by value.

    Args:
        arguments: the command line without the program's name.
        config_dir: absolute folder of the shipped configs.

    Returns:
        The command line in the form that Hydra takes.

    Raises:
        ConfigError: with the key or group that is wrong, and the nearest right one.
        SystemExit: `--cfg job` was asked for, and is answered.
    """
    parser = get_args_parser()
    parser.allow_abbrev = False  # or --experiment would be --experimental-rerun
    options, unknown = parser.parse_known_intermixed_args(list(arguments))
    _refuse_options([*unknown, *["--experimental-rerun"] * bool(options.experimental_rerun)], options.overrides)
    parsed = parse_overrides(options.overrides)
    flags = list(arguments)
    for override in options.overrides:
        flags.remove(override)
    in_order = lines_of(parsed)  # Hydra wants them in one place
    only_shows = options.help or options.hydra_help or options.info or options.shell_completion
    if only_shows or options.cfg in ("all", "hydra"):
        return [*in_order, *flags]
    if options.config_path:
        config_dir = _existing(Path(options.config_path), "--config-path")
    # Plugins (colours in the log, launchers) answer to the `hydra` key and are Hydra's to check.
    overrides = [o for o in parsed if not str(o.key_or_group).startswith("hydra")]
    hydras = {str(o.key_or_group): o for o in parsed if str(o.key_or_group).startswith("hydra.")}
    anew = any(o.key_or_group == "run" and o.value() == "new" for o in overrides)
    if anew and "hydra.run.dir" in hydras and os.environ.get("LOCAL_RANK", "0") == "0":  # Lightning names it to others
        raise ConfigError("run=new chooses a folder by itself, and hydra.run.dir names one: leave one of them out")
    config_name = options.config_name or CONFIG_NAME
    with initialize_config_dir(version_base="1.3", config_dir=str(config_dir)):
        if "hydra.searchpath" in hydras:
            _search_also(_folders(hydras["hydra.searchpath"].value()))
        if options.config_dir:
            _search_also([f"file://{_existing(Path(options.config_dir), '--config-dir')}"])
        for one_run in _single_runs(overrides):
            config = compose_run(config_name, one_run)
            if options.cfg == "job":
                _show(config, options.package, resolve=options.resolve)
                raise SystemExit(0)
            config.paths.run = config.paths.runs  # known only once Hydra has made the run's folder
            read_settings(config)
            if not options.multirun:
                of_user = hydras.get("hydra.run.dir")
                _check_run_folder(config_name, [*one_run, *([of_user.input_line or ""] if of_user else [])])
    lengths = [str(o.key_or_group) for o in overrides if o.key_or_group in LENGTHS and o.is_sweep_override()]
    if not lengths or not options.multirun or "hydra.sweep.subdir" in hydras:
        return [*in_order, *flags]
    # A sweep over lengths of training needs a folder for each.
    subdir = f"hydra.sweep.subdir='${{run_key:{','.join(['${hydra.sweep.dir}', *lengths])}}}'"
    return [*in_order, subdir, *flags]


def _refuse_options(unknown: Sequence[str], overrides: Sequence[str]) -> None:
    """Refuse what begins with a dash and is no option of Hydra's, with the form that it should have."""
    for argument in unknown:
        key, _, value = argument.lstrip("-").partition("=")
        value = value or next((o for o in overrides if "=" not in o), "...")
        plus = "+" if key == "experiment" else ""
        raise ConfigError(
            f"{argument}: there is no such option. What is trained is chosen without dashes, such as "
            f"{plus}{key}={value}; --help lists the groups and keys, --hydra-help the options"
        )


def _show(config: DictConfig, package: str | None, *, resolve: bool) -> None:
    """Print what a run would use, as `--cfg job` asks for; wrong values are refused, missing ones are not."""
    complete = copy.deepcopy(config)
    complete.paths.run = complete.paths.runs
    if not OmegaConf.missing_keys(complete):
        if complete.data.store is None and complete.data.annotations is None:
            complete.data.annotations = "FILE.csv"
        read_settings(complete)
    if resolve:
        config.paths.run = None  # known only once Hydra has made the run's folder
        OmegaConf.resolve(config)
    part = config if package in (None, "_global_") else OmegaConf.select(config, str(package))
    if part is None:
        raise ConfigError(f"--package {package}: there is no such section.{nearest_key(str(package), keys_of(config))}")
    print(OmegaConf.to_yaml(part) if OmegaConf.is_config(part) else part, end="")


def _existing(folder: Path, option: str) -> Path:
    if not folder.is_dir():
        raise ConfigError(f"{option} {folder}: there is no such folder")
    return folder.resolve()


def _folders(value: object) -> list[str]:
    """The value of `hydra.searchpath` as Hydra takes it: a list of `file://`, `pkg://` or plain folders."""
    folders = [str(folder) for folder in (value if isinstance(value, list) else [value])]
    return [f if "://" in f else f"file://{_existing(Path(f), 'hydra.searchpath')}" for f in folders]


def _search_also(folders: Sequence[str]) -> None:
    """Let the user's own options stand beside the shipped ones, as `hydra.main` does for `--config-dir`."""
    search_path = GlobalHydra.instance().config_loader().get_search_path()
    for folder in folders:
        search_path.prepend("command-line", folder, SearchPathQuery(provider="schema"))
    GlobalHydra.instance().clear()
    Hydra.create_main_hydra2("train", search_path)


def _check_run_folder(config_name: str, overrides: list[str]) -> None:
    """Refuse a run folder that cannot be made or written, before Hydra fails at it."""
    config = compose_plain(config_name, overrides)
    try:
        folder = Path(str(config.hydra.run.dir)).expanduser().absolute()
    except OmegaConfBaseException:
        return  # made of what only Hydra knows by then
    try:
        refuse_foreign(folder)
    except RunFolderError as error:
        raise ConfigError(str(error)) from error
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not there.is_dir():
        raise ConfigError(f"the run folder {folder} cannot be made: {there} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(
            f"the run folder {folder} cannot be written: {there} does not allow it. Choose another with "
            f"hydra.run.dir=DIR, or all runs' with paths.runs=DIR; in a container, mount a folder of yours at {there}"
        )


def _single_runs(overrides: Sequence[Override]) -> Iterator[list[str]]:
    """The command line with every sweep at its first value, then each other value of each sweep once."""
    choices = [
        [f"{o.get_key_element()}={value}" for value in o.sweep_string_iterator()]
        if o.is_discrete_sweep()
        else [o.input_line or ""]
        for o in overrides
    ]
    first = [lines[0] for lines in choices]
    yield first
    for position, lines in enumerate(choices):
        for line in lines[1:]:
            yield [*first[:position], line, *first[position + 1 :]]
