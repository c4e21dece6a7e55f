"""The command line of `train.py` and what it configures, checked before anything heavy is imported.

Every key must be one that the chosen options have; a misspelt one is refused with the nearest right one. The YAML files
under `configs/` are the only list of names. Values are checked by their types (`settings.py`).

An experiment composes with every option of every group: what it sets of an option that the command line replaces holds
for the new option too, if that has the key, and else is dropped (`fit_experiment`).
"""

from __future__ import annotations

import copy
import difflib
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from numbers import Number
from pathlib import Path
from typing import Any, cast

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.hydra import Hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fmcib_ssl.training.run_folder import RunFolderError, refuse_foreign
from fmcib_ssl.training.same_run import LENGTHS, run_key
from fmcib_ssl.training.settings import ConfigError, Settings, settings_of
from fmcib_ssl.types import current_target

#: `train.py` composes this file.
CONFIG_NAME = "train"
#: Sections whose keys are not ours to list: columns of the user's table, arguments of Lightning's Trainer.
_FREE_SECTIONS = ("data.select.", "trainer.")
#: Sections that `settings.py` does not type: a value there must be of the kind that the option declares.
_COMPONENTS = ("method", "augment", "encoder", "head", "loss", "optimizer", "schedule", "logger", "callbacks")


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


def compose_run(config_name: str, overrides: list[str]) -> DictConfig:
    """Check every name of one run, then compose it; without Hydra's own section.

    Raises:
        ConfigError: a name that does not exist, or a value of another kind than the option's own.
    """
    parsed = parse_overrides(overrides)
    by_group = [o for o in parsed if _check_group(o)]
    by_key = [o for o in parsed if o not in by_group]

    chosen = compose_plain(config_name, lines_of(by_group))
    fit_experiment(chosen, config_name, lines_of(by_group))
    choices = OmegaConf.to_container(chosen.hydra.runtime.choices)
    assert isinstance(choices, dict)
    by_user = {o.key_or_group: o for o in by_group}
    experiment = by_user.pop("experiment", None)
    without_experiment = lines_of(by_user.values()) + [
        f"{group!s}={option!s}" if option else f"~{group!s}"
        for group, option in choices.items()
        if group not in by_user and not str(group).startswith(("hydra/", "experiment"))
    ]
    if experiment:
        # What the chosen options declare by themselves is the list of names; an experiment only fills it in.
        declared = compose_plain(config_name, without_experiment)
        _check_keys_of_experiment(chosen, declared, str(experiment.value()))
    for override in by_key:
        _check_key(override, chosen)

    config = compose_plain(config_name, overrides)
    fit_experiment(config, config_name, overrides)
    del config["hydra"]
    return config


def fit_experiment(config: DictConfig, config_name: str, overrides: Sequence[str]) -> list[str]:
    """Drop what an experiment sets of an option that the command line replaces, where the new option lacks the key.

    Args:
        config: as Hydra composed it from `overrides`; changed in place.
        config_name: of the file that was composed.
        overrides: of one run, no sweep.

    Returns:
        The keys that were dropped, with the option that lacks them.
    """
    parsed = parse_overrides(overrides)
    replaced = {str(o.key_or_group): o for o in parsed if "." not in o.key_or_group and _group_options(o.key_or_group)}
    replaced = {group: o for group, o in replaced.items() if not group.startswith("hydra")}
    if replaced.pop("experiment", None) is None or not replaced:
        return []
    of_them = [o for o in parsed if o.key_or_group.split(".")[0] in replaced]
    declared = compose_plain(config_name, lines_of(of_them))
    OmegaConf.set_struct(config, False)
    dropped = []
    for group, override in replaced.items():
        keys = _drop_undeclared(config, declared, group)
        dropped += [f"{key}, which {override.input_line} does not have" for key in keys]
    return dropped


def _drop_undeclared(config: DictConfig, declared: DictConfig, key: str) -> list[str]:
    """Bring `config[key]` to what is declared; gives the dotted keys that are gone."""
    if key not in config:
        return []
    if key not in declared:
        del config[key]
        return [key]
    if any(OmegaConf.is_missing(c, key) or OmegaConf.is_interpolation(c, key) for c in (config, declared)):
        return []
    mine, option = config[key], declared[key]
    if not isinstance(mine, DictConfig) or not isinstance(option, DictConfig):
        return []
    if _target(config, key) != _target(declared, key):  # the experiment's own object, with arguments of its own
        config[key] = option
        return [key]
    return [f"{key}.{gone}" for name in list(mine) for gone in _drop_undeclared(mine, option, str(name))]


def compose_plain(config_name: str, overrides: list[str]) -> DictConfig:
    """Compose as Hydra does, with its own section; what it cannot is a `ConfigError`."""
    try:
        config = compose(config_name, overrides, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(str(error)) from error
    OmegaConf.set_struct(config, False)
    return config


def parse_overrides(overrides: Iterable[str]) -> list[Override]:
    """Read overrides by Hydra's grammar; text that it has no rule for, such as a path with `=` in it, is put in quotes.

    Raises:
        ConfigError: one that cannot be read so either.
    """
    parser = OverridesParser.create()
    parsed = []
    for override in overrides:
        key, equals, value = override.partition("=")
        quoted = f"{key}={QuotedString(value, Quote.single).with_quotes()}"
        try:
            parsed.append(parser.parse_override(override))
        except HydraException as error:
            try:
                if not equals or value.startswith(("[", "{", "'", '"')) or "," in value:
                    raise error
                parsed.append(parser.parse_override(quoted))
            except HydraException:
                hint = f"; if its value is meant as text, put it in double quotes: {quoted!r}" if equals else ""
                raise ConfigError(f"{override}: is not of the form key=value{hint}") from error
    return parsed


def lines_of(overrides: Iterable[Override]) -> list[str]:
    """Overrides as they stand on a command line."""
    return [o.input_line or "" for o in overrides]


@lru_cache(maxsize=128)  # of one loader: every question lists all folders of its search path
def _listed(loader: ConfigLoader, group: str, kind: ObjectType) -> tuple[str, ...]:
    return tuple(loader.get_group_options(group, results_filter=kind))


def _group_options(group: str) -> list[str]:
    return list(_listed(GlobalHydra.instance().config_loader(), group, ObjectType.CONFIG))


def _groups() -> list[str]:
    groups = _listed(GlobalHydra.instance().config_loader(), "", ObjectType.GROUP)
    return [group for group in groups if group != "hydra"]


def _check_group(override: Override) -> bool:
    """Whether an override chooses an option of a group; refuses a group or an option that does not exist."""
    name = override.key_or_group
    options = _group_options(name) if "." not in name else []
    if not options:
        if override.is_add() and "." not in name:
            raise ConfigError(f"+{name}: there is no such group.{_choose_from(name, _groups())}")
        return False
    if name == "experiment" and not override.is_add():
        raise ConfigError(f"an experiment is added with a plus: +experiment={override.value()}")
    value = override.value()
    if override.is_delete() or isinstance(value, dict):
        return override.is_delete()
    if value is None:
        raise ConfigError(f"{name}=null: choose one of {', '.join(options)}, or take the group out with ~{name}")
    for option in value if isinstance(value, list) else [value]:
        if str(option) not in options:
            raise ConfigError(f"{name}={option}: there is no such option.{_choose_from(str(option), options)}")
    return True


def _check_key(override: Override, config: DictConfig) -> None:
    """Refuse a key that the chosen options do not have."""
    name = override.key_or_group
    if override.is_add() or override.is_force_add():
        return
    if name in keys_of(config):
        value = override.value()
        _check_kind(name, value, config)
        if isinstance(value, dict) and "_target_" in value:
            raise ConfigError(
                f"{name}={{_target_: ...}} would be mixed with the arguments of the option it replaces; take that out: "
                f"~{name} '+{name}={{_target_: {value['_target_']}, ...}}'"
            )
        return
    if name.startswith(_FREE_SECTIONS):
        what = "an argument of Lightning's Trainer" if name.startswith("trainer.") else "a column of your table"
        hint = f" If {name.rpartition('.')[2]} is {what}, add it: +{name}=..."
    else:
        hint = ""
    raise ConfigError(f"{name}: there is no such key.{nearest_key(name, keys_of(config))}{hint}")


def _check_kind(name: str, value: object, config: DictConfig) -> None:
    """Refuse text where the option has a number, a truth value or a list."""
    if name.partition(".")[0] not in _COMPONENTS or not isinstance(value, str):
        return
    declared = OmegaConf.select(config, name, throw_on_resolution_failure=False)
    kinds = ((bool, "true or false"), (Number, "a number"), (ListConfig, "a list"))
    kind = next((kind for type_, kind in kinds if isinstance(declared, type_)), None)
    if kind is not None and "${" not in value:
        raise ConfigError(f"{name}={value}: should be {kind}, such as {name}={str(declared).lower()}")


def _check_keys_of_experiment(config: DictConfig, declared: DictConfig, experiment: str) -> None:
    """Refuse a key that an experiment file sets and no chosen option declares."""
    if "experiment" in config:
        raise ConfigError(f"experiment {experiment}: the file must begin with the line # @package _global_")
    known = keys_of(declared)
    for key in keys_of(config):
        section = key.split(".")[0]
        free = key.startswith(_FREE_SECTIONS) or _target(config, section) != _target(declared, section)
        if key not in known and not free:
            raise ConfigError(f"experiment {experiment} sets {key}: there is no such key.{nearest_key(key, known)}")


def _target(config: DictConfig, section: str) -> object:
    part = None if OmegaConf.is_interpolation(config, section) else config.get(section)
    target = part.get("_target_") if isinstance(part, DictConfig) else None
    return current_target(target) if isinstance(target, str) else target


def keys_of(config: DictConfig, prefix: str = "") -> list[str]:
    """All dotted keys, inner and outer, without Hydra's own."""
    keys: list[str] = []
    for key in map(str, config):
        name = f"{prefix}{key}"
        if name == "hydra":
            continue
        keys.append(name)
        if not OmegaConf.is_missing(config, key) and not OmegaConf.is_interpolation(config, key):
            value = config[key]
            keys += keys_of(value, f"{name}.") if isinstance(value, DictConfig) else []
    return keys


def nearest_key(name: str, keys: Sequence[str]) -> str:
    """For a message: the nearest key, also if only its last part was typed (`temperature`), or the siblings."""
    parents = {key.rpartition(".")[0] for key in keys}
    if suggestion := _suggest(name, [key for key in keys if key not in parents or "." not in name]):
        return suggestion
    by_leaf = {key.rpartition(".")[2]: key for key in reversed(keys)}
    if leaves := difflib.get_close_matches(name.rpartition(".")[2], by_leaf, n=1, cutoff=0.7):
        return f" Did you mean {by_leaf[leaves[0]]}?"
    section = name
    while section not in parents:
        section = section.rpartition(".")[0]
    siblings = (key.rpartition(".")[2] for key in keys if key.rpartition(".")[0] == section)
    return f" {section or 'The configuration'} has: {', '.join(key for key in siblings if not key.startswith('_'))}."


def _suggest(name: str, candidates: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.7)
    return f" Did you mean {close[0]}?" if close else ""


def _choose_from(name: str, candidates: list[str]) -> str:
    return f"{_suggest(name, candidates)} There are: {', '.join(candidates)}"
