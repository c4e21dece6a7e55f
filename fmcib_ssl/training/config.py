"""The command line of `train.py` and the configuration it composes, checked before anything heavy is imported.

Hydra composes. A name that the chosen options do not have is refused with the nearest that they do: the YAML files
under `configs/` are the only list of names. Values are checked by their types (`settings.py`), arguments of components
by their constructors.

An experiment composes with every option of every group: what it sets of an option that the command line replaces holds
for the new option too, if that has the key, and else is dropped.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from numbers import Number
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, cast

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, Quote, QuotedString
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fmcib_ssl.io import config_dir, nearest
from fmcib_ssl.training.run_folder import LENGTHS, refuse_foreign, run_key
from fmcib_ssl.training.settings import FORMER_KEYS, START_KEYS, ConfigError, Settings, settings_of
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
    values["paths"]["run"] = folder  # the value that is being resolved
    return run_key(read_settings(OmegaConf.create(values)), Path(folder), keyed)


def _option_groups() -> str:
    """For the help: groups and their options; those of Hydra's own, and published tasks, are not a run's to choose."""
    loader = GlobalHydra.instance().config_loader()
    groups = [name for name in sorted(loader.list_groups("")) if name not in ("hydra", "task")]
    return "\n".join(f"{name}: {', '.join(sorted(loader.get_group_options(name)))}" for name in groups)


# Known wherever a configuration is composed.
OmegaConf.register_new_resolver("run_key", _run_key, replace=True)
OmegaConf.register_new_resolver("option_groups", _option_groups, replace=True)


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


# The command line.


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
    options, unknown = _hydra_options().parse_known_intermixed_args(list(arguments))
    if unknown:
        _refuse_option(unknown[0], options.overrides)
    parsed = _parse_overrides(options.overrides)
    flags = list(arguments)
    for override in options.overrides:
        flags.remove(override)
    in_order = _lines(parsed)  # Hydra wants them in one place
    only_shows = options.help or options.hydra_help or options.version or options.info or options.shell_completion
    if only_shows or options.cfg in ("all", "hydra"):
        return [*in_order, *flags]
    # Plugins (colours in the log, launchers) answer to the `hydra` key and are Hydra's to check.
    hydras = {str(o.key_or_group): o for o in parsed if str(o.key_or_group).startswith("hydra")}
    overrides = [o for o in parsed if str(o.key_or_group) not in hydras]
    anew = any(o.key_or_group == "run" and o.value() == "new" for o in overrides)
    if anew and "hydra.run.dir" in hydras and os.environ.get("LOCAL_RANK", "0") == "0":  # Lightning names it to others
        raise ConfigError("run=new chooses a folder by itself, and hydra.run.dir names one: leave one of them out")
    where = _lines(o for key, o in hydras.items() if key in ("hydra.run.dir", "hydra.searchpath"))
    if options.config_dir:
        if not Path(options.config_dir).is_dir() or "hydra.searchpath" in hydras:
            raise ConfigError(
                f"--config-dir {options.config_dir}: there is no such folder, or hydra.searchpath names more"
            )
        where.append(f"hydra.searchpath=[{_quoted(f'file://{Path(options.config_dir).resolve()}')}]")
    with initialize_config_dir(version_base="1.3", config_dir=str(Path(options.config_path or config_dir).resolve())):
        for one_run in _single_runs(overrides):
            composed = compose_run(options.config_name or CONFIG_NAME, [*where, *one_run])
            if options.cfg == "job":
                _show(composed.config, options.package, resolve=options.resolve)
                raise SystemExit(0)
            composed.config.paths.run = composed.config.paths.runs  # known only once Hydra has made the run's folder
            read_settings(composed.config)
            if not options.multirun and composed.folder is not None:
                _check_run_folder(Path(composed.folder).expanduser().absolute())
    lengths = [str(o.key_or_group) for o in overrides if o.key_or_group in LENGTHS and o.is_sweep_override()]
    if not lengths or not options.multirun or "hydra.sweep.subdir" in hydras:
        return [*in_order, *flags]
    # A sweep over lengths of training needs a folder for each.
    subdir = f"hydra.sweep.subdir='${{run_key:{','.join(['${hydra.sweep.dir}', *lengths])}}}'"
    return [*in_order, subdir, *flags]


def _hydra_options() -> argparse.ArgumentParser:
    """Hydra's own options, without --experimental-rerun, which unpickles a file."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    for switch in ("--help -h", "--hydra-help", "--version", "--multirun -m", "--run -r", "--resolve"):
        parser.add_argument(*switch.split(), action="store_true")
    parser.add_argument("--shell-completion", "-sc", action="store_true")
    parser.add_argument("--info", "-i", nargs="?", const="all")
    for option in ("--cfg -c", "--package -p", "--config-path -cp", "--config-name -cn", "--config-dir -cd"):
        parser.add_argument(*option.split())
    return parser


def _refuse_option(argument: str, overrides: Sequence[str]) -> NoReturn:
    """Refuse an option that Hydra does not have, with the `key=value` that was probably meant."""
    key, _, value = argument.lstrip("-").partition("=")
    value = value or next((o for o in overrides if "=" not in o), "...")
    raise ConfigError(
        f"{argument}: unknown option. Settings are written without dashes, such as "
        f"{'+' * (key == 'experiment')}{key}={value}; --help lists the groups and keys, --hydra-help the options"
    )


def _show(config: DictConfig, package: str | None, *, resolve: bool) -> None:
    """Print what a run would use, as `--cfg job` asks for."""
    if resolve:
        config.paths.run = None  # known only once Hydra has made the run's folder
        OmegaConf.resolve(config)
    part = config if package in (None, "_global_") else OmegaConf.select(config, str(package))
    print(OmegaConf.to_yaml(part) if OmegaConf.is_config(part) else part, end="")


def _check_run_folder(folder: Path) -> None:
    """Refuse a run folder that cannot be made or written, before Hydra fails at it."""
    refuse_foreign(folder)
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir():
        raise ConfigError(f"the run folder {folder} cannot be made: {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(
            f"the run folder {folder} cannot be written: no permission for {existing}. Choose another with "
            "hydra.run.dir=DIR, or all runs' with paths.runs=DIR; in a container, mount a folder of yours there"
        )


def _single_runs(overrides: Sequence[Override]) -> Iterator[list[str]]:
    """Runs of a sweep in which every value of every swept key occurs; not all combinations."""
    choices = [
        [f"{o.get_key_element()}={value}" for value in _swept_values(o)] if o.is_sweep_override() else _lines([o])
        for o in overrides
    ]
    for row in range(max(map(len, choices), default=1)):
        yield [lines[row % len(lines)] for lines in choices]


def _swept_values(override: Override) -> Iterable[object]:
    """All values; of an interval its ends."""
    sweep = override.value()
    return (sweep.start, sweep.end) if isinstance(sweep, IntervalSweep) else override.sweep_string_iterator()


def _parse_overrides(overrides: Iterable[str]) -> list[Override]:
    """Read overrides by Hydra's grammar; text that it has no rule for, such as a path with `=` in it, is put in quotes.

    Raises:
        ConfigError: one that cannot be read so either.
    """
    parser = OverridesParser.create()
    parsed = []
    for override in overrides:
        key, equals, value = override.partition("=")
        quoted = f"{key}={_quoted(value)}"
        may_be_text = equals and not value.startswith(("[", "{", "'", '"')) and "," not in value
        for candidate in (override, quoted) if may_be_text else (override,):
            with suppress(HydraException):
                parsed.append(parser.parse_override(candidate))
                break
        else:
            hint = f"; if its value is meant as text, put it in double quotes: {quoted!r}" if equals else ""
            raise ConfigError(f"{override}: is not of the form key=value{hint}")
    return parsed


def _quoted(text: str) -> str:
    return str(QuotedString(text, Quote.single).with_quotes())


# One configuration.


class _Composed(NamedTuple):
    """One run's configuration.

    Attributes:
        config: without Hydra's own section.
        folder: of the run, as Hydra will call it; None where only Hydra knows it.
        dropped: what the experiment sets of options that the command line has replaced, and they do not have.
    """

    config: DictConfig
    folder: str | None
    dropped: list[str]


def compose_run(config_name: str, overrides: Sequence[str]) -> _Composed:
    """Compose one run, no sweep, with every name in it checked; Hydra has to be initialised.

    Raises:
        ConfigError: a name that does not exist, or a value of another kind than the option's own.
    """
    parsed = _parse_overrides(overrides)
    hydras = [o for o in parsed if str(o.key_or_group).startswith("hydra")]
    choices = {str(o.key_or_group): o for o in parsed if _chooses_option(o)}
    by_key = [o for o in parsed if o not in hydras and o not in choices.values()]

    chosen = _compose(config_name, _lines([*hydras, *choices.values()]))
    experiment = choices.pop("experiment", None)
    declared = None
    if experiment is not None:
        # What the chosen options declare by themselves is the list of names; an experiment only fills it in.
        of_experiment = [
            f"{group!s}={option!s}" if option else f"~{group!s}"
            for group, option in chosen.hydra.runtime.choices.items()
            if group not in choices and not str(group).startswith(("hydra/", "experiment"))
        ]
        added = [o for o in by_key if o.is_add() and str(o.key_or_group).split(".")[0] in choices]
        declared = _compose(config_name, [*_lines([*hydras, *choices.values()]), *of_experiment, *_lines(added)])
        _drop_replaced(chosen, declared, choices)
        _check_keys_of_experiment(chosen, declared, str(experiment.value()))
    for override in by_key:
        _check_key(override, chosen)

    config = _compose(config_name, overrides)
    try:
        folder = str(config.hydra.run.dir)
    except OmegaConfBaseException:  # made of what only Hydra knows by then
        folder = None
    dropped = [] if declared is None else _drop_replaced(config, declared, choices)
    del config["hydra"]
    return _Composed(config, folder, dropped)


def _lines(overrides: Iterable[Override]) -> list[str]:
    return [o.input_line or "" for o in overrides]


def _compose(config_name: str, overrides: Sequence[str]) -> DictConfig:
    """Compose as Hydra does, with its own section; what it cannot is a `ConfigError`."""
    try:
        config = compose(config_name, list(overrides), return_hydra_config=True)
    except MissingConfigException as error:
        if not error.options:
            raise ConfigError(str(error)) from error
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        hint = f" Did you mean {close}?" if (close := nearest(option, error.options)) else ""
        raise ConfigError(
            f"{group}={option}: there is no such option.{hint} There are: {', '.join(error.options)}"
        ) from error
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(str(error)) from error
    OmegaConf.set_struct(config, False)
    return config


def _chooses_option(override: Override) -> bool:
    """Whether an override chooses an option of a group, or takes a group out."""
    name, value = str(override.key_or_group), override.value()
    if "." in name or name.startswith("hydra") or (isinstance(value, dict) and not override.is_delete()):
        return False
    options = GlobalHydra.instance().config_loader().get_group_options(name)
    if options and value is None and not override.is_delete():
        raise ConfigError(f"{name}=null: choose one of {', '.join(options)}, or take the group out with ~{name}")
    return bool(options)


def _drop_replaced(config: DictConfig, declared: DictConfig, replaced: Mapping[str, Override]) -> list[str]:
    """Take what the options do not declare out of the sections that the command line has replaced.

    Returns:
        The keys that are gone, with the option that lacks them.
    """
    return [
        f"{key}, which {override.input_line} does not have"
        for group, override in replaced.items()
        for key in _drop_undeclared(config, declared, group)
    ]


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


def _check_keys_of_experiment(config: DictConfig, declared: DictConfig, experiment: str) -> None:
    """Refuse a key that an experiment file sets and no chosen option declares."""
    if "experiment" in config:
        raise ConfigError(f"experiment {experiment}: the file must begin with the line # @package _global_")
    known = keys_of(declared)
    for key in keys_of(config):
        section = key.split(".")[0]
        own_object = _target(config, section) != _target(declared, section)
        if key not in known and not own_object and not key.startswith(_FREE_SECTIONS):
            raise ConfigError(f"experiment {experiment} sets {key}: there is no such key.{_nearest_key(key, known)}")


def _target(config: DictConfig, section: str) -> object:
    part = None if OmegaConf.is_interpolation(config, section) else config.get(section)
    target = part.get("_target_") if isinstance(part, DictConfig) else None
    return current_target(target) if isinstance(target, str) else target


def _check_key(override: Override, config: DictConfig) -> None:
    """Refuse a key that the chosen options do not have, and a value of another kind than theirs."""
    name, value = str(override.key_or_group), override.value()
    if override.is_add() or override.is_force_add():
        return
    known = keys_of(config)
    if name not in known:
        hint = ""
        if name.startswith(_FREE_SECTIONS):
            what = "an argument of Lightning's Trainer" if name.startswith("trainer.") else "a column of your table"
            hint = f" If {name.rpartition('.')[2]} is {what}, add it: +{name}=..."
        for former, change in FORMER_KEYS.items():
            if name == former or name.startswith(f"{former}."):
                raise ConfigError(f"{former} {change}")
        raise ConfigError(f"{name}: there is no such key.{_nearest_key(name, known)}{hint}")
    if isinstance(value, dict) and "_target_" in value:
        raise ConfigError(
            f"{name}={{_target_: ...}} would be mixed with the arguments of the option it replaces; use "
            f"~{name} '+{name}={{_target_: {value['_target_']}, ...}}'"
        )
    if name.partition(".")[0] in _COMPONENTS and isinstance(value, str) and "${" not in value:
        declared = OmegaConf.select(config, name, throw_on_resolution_failure=False)
        kinds = ((bool, "true or false"), (Number, "a number"), (ListConfig, "a list"))
        for type_, kind in kinds:
            if isinstance(declared, type_):
                raise ConfigError(f"{name}={value}: should be {kind}, such as {name}={str(declared).lower()}")


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


def _nearest_key(name: str, keys: Sequence[str]) -> str:
    """For a message: the nearest key, also if only its last part was typed (`temperature`), or the siblings."""
    parents = {key.rpartition(".")[0] for key in keys}
    by_leaf = {key.rpartition(".")[2]: key for key in reversed(keys)}
    whole = nearest(name, [key for key in keys if key not in parents or "." not in name])
    if close := whole or by_leaf.get(nearest(name.rpartition(".")[2], by_leaf) or ""):
        return f" Did you mean {close}?"
    section = name
    while section not in parents:
        section = section.rpartition(".")[0]
    siblings = (key.rpartition(".")[2] for key in keys if key.rpartition(".")[0] == section)
    return f" {section or 'The configuration'} has: {', '.join(key for key in siblings if not key.startswith('_'))}."


def encoder_spec(encoder: str) -> dict[str, Any]:
    """`_target_` and arguments of a network: of an option of `configs/encoder`, or as they are, `{_target_: ...}`.

    Raises:
        ConfigError: no such option.
    """
    if encoder.lstrip().startswith("{"):
        values = OmegaConf.create(encoder)
    else:
        with initialize_config_dir(version_base="1.3", config_dir=str(config_dir())):
            values = _compose(CONFIG_NAME, [f"encoder={encoder}"]).encoder
    spec: dict[str, Any] = OmegaConf.to_container(values, resolve=True)  # type: ignore[assignment]
    if not isinstance(spec, dict) or "_target_" not in spec:
        raise ConfigError(f"encoder={encoder}: should name a _target_, the dotted name of what builds it")
    return {key: value for key, value in spec.items() if key not in START_KEYS}
