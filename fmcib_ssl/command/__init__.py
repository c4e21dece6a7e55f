"""The command line, `fmcib-ssl VERB key=value ...`: one module a verb, imported when it is asked for.

A verb's module has a `Command`, whose fields are its keys, and `main(arguments)`. Training alone is Hydra's.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from fmcib_ssl.io import Command

C = TypeVar("C", bound="Command")

#: What `fmcib-ssl --help` says of each verb; its module has the verb's name, with underscores.
VERBS = {
    "demo": "pretrain on synthetic scans, and show what was learned",
    "check-data": "look at a table of lesions and its scans before anything is made of them",
    "import-annotations": "a table of lesions from a published table or from masks",
    "import-medmnist": "scans and a table from a MedMNIST 3D file",
    "phantom": "synthetic chest CTs with lesions of two classes",
    "split": "a column with the side of a split, or the fold, of each lesion",
    "prepare": "scans into a store, from which patches are read in a millisecond",
    "train": "pretrain an encoder, or fine-tune one",
    "runs": "list run folders, or compare two: settings that differ, curves in one picture",
    "replay": "find the layer at which a step of a run became NaN or infinite",
    "import-encoder": "published weights into an encoder file",
    "export-encoder": "an encoder as ONNX, torch.export, MONAI bundle, Hugging Face folder",
    "embed": "lesions into a table of features",
    "evaluate": "probes of features, with intervals and baselines",
    "robustness": "how stable features and decisions are when a lesion is imaged differently",
    "suite": "several models on several tasks, beside size and statistics, with a ranking",
    "report": "a run, its features and evaluations on one page",
}


def main(words: Sequence[str] | None = None) -> None:
    """Run a verb.

    Args:
        words: verb and `key=value` words; None: those of this process's command line.

    Raises:
        SystemExit: with 2 for a verb that does not exist, else as the verb says.
    """
    verb, *arguments = (sys.argv[1:] if words is None else words) or ["--help"]
    if verb in ("-h", "--help", "help"):
        lines = [f"  {name:<{max(map(len, VERBS))}}  {text}" for name, text in VERBS.items()]
        print("fmcib-ssl VERB key=value ...", "", *lines, "", "fmcib-ssl VERB --help lists the keys.", sep="\n")
    elif verb == "--version":
        from fmcib_ssl import __version__  # noqa: PLC0415

        print(__version__)
    elif verb in ("-sc", "--shell-completion"):
        from fmcib_ssl.command import completion  # noqa: PLC0415

        completion.main(arguments)
    else:
        if verb == "train":
            from fmcib_ssl.training import signals  # noqa: PLC0415

            signals.listen(starting=True)  # before anything slow is imported: a signal is never too early
        from fmcib_ssl.io import exit_without_teardown, nearest  # noqa: PLC0415

        if verb not in VERBS:
            close = "train" if "experiment=" in verb else nearest(verb, VERBS)
            hint = f" Did you mean {close}?" if close else ""
            print(f"error: there is no verb {verb!r}.{hint} fmcib-ssl --help lists them", file=sys.stderr)
            sys.exit(2)
        with exit_without_teardown():
            main_of(verb)(arguments)


def main_of(verb: str) -> Any:
    """What runs a verb's arguments: but for `train` and `demo` a partial of `run_command`, with the command first."""
    return importlib.import_module(f"fmcib_ssl.command.{verb.replace('-', '_')}").main


def weights_file(path: Path) -> Path:
    """The file of an encoder; of a run's folder that which the run has exported, or else its newest whole checkpoint.

    Raises:
        UserError: a folder of no run, or of one that has neither.
    """
    if not path.is_dir():
        return path
    from fmcib_ssl.training import weights_of_run  # noqa: PLC0415  (Lightning, which a file does without)

    return weights_of_run(path)


def run_command(
    command: type[C],
    work: Callable[[C], None],
    arguments: Sequence[str],
    *,
    other_names: Mapping[str, str] | None = None,
    errors: tuple[type[Exception], ...] = (OSError, ValueError),
    interrupted: str = "stopped; the same command resumes",
    level: int = logging.INFO,
) -> None:
    """Parse a command line and do what it asks for; errors of the user's are one line.

    Args:
        command: the class that says what is allowed.
        work: called with what was asked for.
        arguments: the command line, without program and verb.
        other_names: keys that are taken, and the keys that they stand for.
        errors: that are the user's, besides `UserError`; others are printed with a traceback.
        interrupted: what to say after Ctrl-C.
        level: of what is logged.

    Raises:
        SystemExit: 0 after the help, 2 for a wrong key or value, 1 for an error of the user's, 130 after Ctrl-C.
    """
    from fmcib_ssl.io import parse_command  # noqa: PLC0415
    from fmcib_ssl.types import UserError  # noqa: PLC0415

    keys = other_names or {}
    pairs = (argument.partition("=") for argument in arguments)
    parsed = parse_command(command, [keys.get(key, key) + equals + value for key, equals, value in pairs])
    logging.basicConfig(level=level, format="%(levelname)s %(message)s")
    try:
        work(parsed)
    except Exception as error:
        if not isinstance(error, (UserError, *errors)):
            raise
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        sys.exit(130)
