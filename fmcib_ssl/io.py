"""Files written whole or not at all, locks, YAML from elsewhere, digests, redaction, commands `key=value`."""

from __future__ import annotations

import atexit
import contextlib
import difflib
import errno
import hashlib
import json
import logging
import os
import re
import secrets
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

logger = logging.getLogger(__name__)

#: Seconds between renewals of a claim, and without one after which another process takes it over.
_BEAT_S, _SILENCE_S = 10.0, 60.0
#: Under which a JSON file has the digest of what else it says.
_DIGEST = "digest"
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
#: Of a YAML or JSON file from elsewhere.
_MAX_YAML_BYTES, _MAX_JSON_BYTES, _MAX_DEPTH = 1_000_000, 16_000_000, 64

_SECRET = r"(?:api_?-?key|access_?-?key|private_?-?key|token|passw(?:or)?d|\bpwd|secret|credential|signature|env_set)"
_SECRET_NAME = re.compile(_SECRET.replace(r"\b", ""), re.IGNORECASE)
#: `key=value` and `key: value` in a text; a value with blanks is quoted.
_SECRET_VALUE = re.compile(rf"(?i)([\w.+~-]*{_SECRET}[\w.-]*(?:=|:\s+))(?:\"[^\"]*\"|'[^']*'|[^\s&,}}\]]+)")
#: One word of a command line, whose value ends with the word.
_SECRET_WORD = re.compile(rf"(?i)^(-*[\w.+~@/-]*{_SECRET}[\w.-]*=)[^{{\[].*", re.DOTALL)
_SECRET_OPTION = re.compile(rf"(?i)--?[\w.-]*{_SECRET}[\w.-]*")
_URL_LOGIN = re.compile(r"(\w[\w+.-]*://)[^/\s@]+@")
HIDDEN = "***"
#: Whether a page names scans and patients, or has the first digits of a digest of each name in its place.
Identifiers = Literal["show", "hash"]
#: Settings of `data` that may name patients, or are paths, also where they are relative.
_NAMES_LESIONS = ("store", "annotations", "path_prefix", "select")


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Write a file under another name, flush it to the disk, then rename it; creating its folder if needed.

    If the block ends with an error, or the disk is full, what was there before stays and nothing else is left. A
    process that is killed meanwhile leaves `.NAME.*.tmp`, which `remove_leftovers` takes away.

    Args:
        path: an existing file is replaced.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # several machines may write the same one
    try:
        # Never writable by everybody, whatever the umask.
        with os.fdopen(os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o664), "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error says it
            unfinished.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # not every file system can
        _sync_folder(path.parent)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write text (UTF-8) or bytes as `atomic_write` does.

    Raises:
        OSError: it cannot be written.
    """
    with atomic_write(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write plain values where a person can read them."""
    write_atomically(path, json.dumps(values, indent=2, default=str) + "\n")


def open_regular(path: Path) -> int:
    """A descriptor to read a file with.

    Raises:
        OSError: there is no such file, or it is a pipe, which could block forever, a device or a folder.
    """
    flags = (getattr(os, name, 0) for name in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))  # not every system has them all
    descriptor = os.open(path, os.O_RDONLY | sum(flags))
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(f"{path.name} is not a regular file")


def read_regular(path: Path) -> bytes:
    """All of a file; as `open_regular`."""
    with os.fdopen(open_regular(path), "rb") as file:
        return file.read()


def write_sealed_json(path: Path, values: Mapping[str, object]) -> None:
    """Write JSON with a digest of itself, whole or not at all; NumPy's scalars become plain numbers.

    Raises:
        OSError: it cannot be written.
    """
    plain = json.loads(json.dumps(values, default=lambda value: value.item()))
    write_atomically(path, json.dumps({**plain, _DIGEST: _json_digest(plain)}, indent=1, ensure_ascii=False))


def read_sealed_json(path: Path) -> dict[str, Any]:
    """What `write_sealed_json` wrote, or an earlier version of it, without its digest.

    Raises:
        OSError: it cannot be read.
        ValueError: not such a file, or changed since it was written.
    """
    values = parse_json(read_regular(path))
    if not isinstance(values, dict):
        raise ValueError(f"it holds {type(values).__name__}")
    # Without one it may be of an earlier version, or the word "digest" is what was damaged: then the last key holds it.
    key = _DIGEST if _DIGEST in values else next(reversed(values), None)
    others = {name: value for name, value in values.items() if name != key}
    is_right = key is not None and values[key] == _json_digest(others)
    if is_right != (key == _DIGEST):
        raise ValueError("its digest is not that of what it says")
    return others if is_right else values


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files that killed processes left; only while no other process writes to the folder.

    Raises:
        OSError: a file cannot be removed.
    """
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest_of(*values: object) -> str:
    """SHA-256 over plain values; numbers of NumPy's count as Python's."""
    return _json_digest(values)


def _json_digest(values: object) -> str:
    text = json.dumps(values, sort_keys=True, default=lambda value: getattr(value, "tolist", value.__str__)())
    return hashlib.sha256(text.encode()).hexdigest()


def checksum_of(files: Iterable[Path]) -> str:
    """SHA-256 over the contents of files, in this order."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def sha256_of(file: Path) -> str:
    """SHA-256 of a file, as `sha256sum` prints it."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def num_cores() -> int:
    """Cores that this process may use: a batch system gives a part of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Held(Exception):  # noqa: N818  (caught where it is known what to do)
    """Another process has the lock; the message names it."""


class Lock:
    """One process at a time: the kernel's lock of a file or, where there is none, a claim with a heartbeat.

    A process takes a lock once: closing any descriptor of the file ends the kernel's lock. That one ends with the
    process, however it ends, and its children do not inherit it, as they would that of `flock` and so of filelock. Over
    a network, and on Windows, there may be none. Then a file `.claim...` names the process and is touched every ten
    seconds; another process that finds one watches whether it is.

    Args:
        file: `.lock...`, created if needed; its folder must exist.
        patience_s: how long to wait for another process's lock, seconds.

    Raises:
        OSError: the file cannot be written.
        Held: another process has it.
    """

    def __init__(self, file: Path, patience_s: float = 0.0) -> None:
        self._claim_file = file.with_name(file.name.replace("lock", "claim", 1))
        self._claim = ""
        self._released = threading.Event()
        self._stream: IO[str] = file.open("a+")
        until = time.monotonic() + patience_s
        try:
            if not self._lock(until):
                self._make_claim(until)
        except BaseException:
            self._stream.close()
            raise

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Let others have it; the end of the process does so too."""
        self._stream.close()
        self._released.set()
        if self._claim and _read_claim(self._claim_file)[0] == self._claim:
            self._claim_file.unlink(missing_ok=True)

    def _lock(self, until: float) -> bool:
        """Take the kernel's lock; whether there is such a thing."""
        try:
            import fcntl  # noqa: PLC0415
        except ImportError:  # Windows
            return False
        while True:
            try:
                fcntl.lockf(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in _NO_LOCKS:
                    return False
                if time.monotonic() >= until:
                    self._stream.seek(0)
                    raise Held(self._stream.read().strip() or "unknown") from error
                time.sleep(0.2)
            else:
                self._stream.truncate(0)
                self._stream.write(f"{_this_process()}\n")
                self._stream.flush()
                return True

    def _make_claim(self, until: float) -> None:
        claim = f"{_this_process()} {secrets.token_hex(4)}"
        while True:
            try:
                with self._claim_file.open("x") as new:
                    new.write(claim)
                break
            except FileExistsError:
                _await_silence(self._claim_file, until)
        self._claim = claim
        logger.warning(
            "%s: this file system has no locks. %s, renewed every %g s, keeps other runs out",
            self._claim_file.parent, self._claim_file.name, _BEAT_S,
        )  # fmt: skip
        threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        while not self._released.wait(_BEAT_S):
            if (now := _read_claim(self._claim_file)[0]) and now != self._claim:
                # This process was suspended for so long that another took its place; a step more, and both would write.
                sys.stderr.write(f"error: {self._claim_file.parent} was taken over by another run: this one ends\n")
                os._exit(1)
            try:
                os.utime(self._claim_file)
            except OSError as error:
                logger.warning("%s cannot be renewed: %s", self._claim_file, error.strerror or error)


def _await_silence(claim_file: Path, until: float) -> None:
    """Wait until a claim is released, or remove it if it is no longer renewed; clocks of machines are not compared.

    Raises:
        Held: it is still renewed when the time is up.
    """
    before = _read_claim(claim_file)
    logger.info("%s holds a claim: waiting up to %g s to see whether that run is still alive", before[0], _SILENCE_S)
    silent_at = time.monotonic() + _SILENCE_S
    while time.monotonic() < silent_at:
        time.sleep(min(1.0, _BEAT_S / 4))
        if (now := _read_claim(claim_file)) == ("", 0):
            return  # released
        if now != before:
            if time.monotonic() >= until:
                raise Held(now[0].rpartition(" ")[0] or "unknown")
            before, silent_at = now, time.monotonic() + _SILENCE_S
    claim_file.unlink(missing_ok=True)


def _read_claim(file: Path) -> tuple[str, int]:
    """What a claim says, and when it was renewed; over a network only opening a file looks at the server's copy."""
    try:
        with file.open() as opened:
            return opened.read(), os.fstat(opened.fileno()).st_mtime_ns
    except OSError:
        return "", 0


def _this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def read_yaml(file: Path) -> Any:
    """Plain values of a YAML file that may come from elsewhere: no objects, and no more than a configuration needs.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be read, is not YAML, is too large or too deep, or has aliases.
    """
    return _read_plain(file, _parse_yaml)


def read_json(file: Path) -> Any:
    """Plain values of a JSON file that may come from elsewhere.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be read, is not JSON, is too large or too deep.
    """
    return _read_plain(file, parse_json)


def parse_json(text: str | bytes) -> Any:
    """Plain values of a JSON text that may come from elsewhere.

    Raises:
        ValueError: it is not JSON, is too large or too deep.
    """
    if len(text) > _MAX_JSON_BYTES:
        raise ValueError(f"it has more than {_MAX_JSON_BYTES / 1e6:g} MB")
    try:
        values = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    _check_depth(values, _MAX_DEPTH)
    return values


def _read_plain(path: Path, parse: Callable[[bytes], Any]) -> Any:
    try:
        with path.open("rb") as file:
            return parse(file.read(_MAX_JSON_BYTES + 1))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError, yaml.YAMLError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{path} cannot be read: {reason}") from error


def _check_depth(values: Any, depth: int) -> None:
    if depth == 0:
        raise ValueError("it is nested too deeply")
    for value in values.values() if isinstance(values, dict) else values if isinstance(values, list) else ():
        _check_depth(value, depth - 1)


def _parse_yaml(text: bytes) -> Any:
    if len(text) > _MAX_YAML_BYTES:
        raise ValueError(f"it has more than {_MAX_YAML_BYTES / 1e6:g} MB, which no configuration needs")
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):  # one after the other, before anything is made of them
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("it has aliases, of which a few lines make more values than fit in memory")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise RecursionError
    return yaml.safe_load(text)


def redacted(values: Any, *, secret: bool = False) -> Any:
    """Plain values, with what looks like a secret hidden: by its key, after `key=` in a text, or the login of a URL.

    All texts that are nested below a `secret` key are hidden too; numbers and booleans are not secrets.
    """
    if isinstance(values, Mapping):
        return {
            key: redacted(value, secret=secret or bool(_SECRET_NAME.search(str(key)))) for key, value in values.items()
        }
    if isinstance(values, list | tuple):
        options = [isinstance(value, str) and bool(_SECRET_OPTION.fullmatch(value)) for value in values]
        return type(values)(
            redacted(value, secret=secret or follows) for value, follows in zip(values, [False, *options], strict=False)
        )
    if not isinstance(values, str):
        return values
    if secret:
        return values and HIDDEN
    text = _SECRET_VALUE.sub(rf"\g<1>{HIDDEN}", _SECRET_WORD.sub(rf"\g<1>{HIDDEN}", values))
    return _URL_LOGIN.sub(rf"\g<1>{HIDDEN}@", text)


def identifier(name: object, identifiers: Identifiers) -> str:
    """A name of a scan or patient as it is, or for `hash` the first 8 hexadecimal digits of its SHA-256.

    One name has the same digits on every page, so that pages can be compared. This does not anonymise against someone
    who has the names or can guess them, and hashes them in turn.
    """
    return str(name) if identifiers == "show" else hashlib.sha256(str(name).encode()).hexdigest()[:8]


def without_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a run, with absolute paths hidden, and what of `data` may name scans and patients."""
    plain: dict[str, Any] = _without_places(values)
    if isinstance(data := plain.get("data"), dict):
        plain["data"] = {key: HIDDEN if key in _NAMES_LESIONS and value else value for key, value in data.items()}
    return plain


def _without_places(values: Any) -> Any:
    if isinstance(values, Mapping):
        return {key: _without_places(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_without_places(value) for value in values]
    return HIDDEN if isinstance(values, str) and Path(values).is_absolute() else values


def no_world_write() -> None:
    """From here on no file of this process and its children is world-writable, whatever the umask."""
    umask = os.umask(0o077)
    os.umask(umask | 0o002)


def config_dir() -> Path:
    """Folder of the configurations: the wheel's own copy, or that of the checkout which this package is part of."""
    package = Path(__file__).resolve().parent
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


class Command(BaseModel):
    """What a command takes: a field for each key, with its type, default and `Field(description=...)`.

    A list is written `a,b` or `[a, b]`, a dictionary `{column: [a, b]}`; what is in them is text for the field's type,
    so that the id 007 stays what it is. The docstring of a subclass is the beginning of its help.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _nested_values(cls, values: dict[str, Any]) -> dict[str, Any]:
        fields = cls.model_fields
        return {
            key: _nested(value, fields[key].annotation) if key in fields else value for key, value in values.items()
        }


def _nested(value: Any, annotation: Any) -> Any:
    kinds = {get_origin(kind) for kind in (annotation, *get_args(annotation))} & {tuple, list, dict}
    if not kinds or not isinstance(value, str):
        return value
    if dict not in kinds:
        value = f"[{value.strip('[]() ')}]"
    try:
        return yaml.BaseLoader(value).get_single_data()  # it alone makes no numbers and dates of ids
    except yaml.YAMLError as error:
        raise ValueError(f"{value!r} is not of the form {{key: [value, value]}} or [value, value]") from error


_CommandT = TypeVar("_CommandT", bound=Command)


def parse_command(command: type[_CommandT], arguments: Sequence[str]) -> _CommandT:
    """The settings that a command line `key=value ...` gives; for `--help` the help, and the end of the program.

    A value is taken as text and turned into the type of its field; `null` is None.

    Args:
        command: the class that says what is allowed.
        arguments: the command line, without the program.

    Raises:
        SystemExit: with 0 after the help; with 2, and a message on stderr, for an unknown key or a wrong value.
    """
    no_world_write()
    logging.getLogger("numexpr").setLevel(logging.WARNING)  # on import it says how many threads it takes
    if any(argument in ("-h", "--help", "help") for argument in arguments):
        print(_help(command))
        raise SystemExit(0)
    values: dict[str, str | None] = {}
    problems = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            problems.append(f"{argument!r} is not of the form key=value")
        elif key not in command.model_fields:
            close = nearest(key, command.model_fields)
            problems.append(f"there is no {key!r}" + (f": do you mean {close!r}?" if close else ""))
        elif key in values:
            problems.append(f"{key!r} is given twice")
        else:
            values[key] = None if value == "null" else value
    if not problems:
        try:
            return command.model_validate(values)
        except ValidationError as error:
            for problem in error.errors():
                key = ".".join(map(str, problem["loc"]))
                what = "is missing" if problem["type"] == "missing" else f"is {problem['input']!r}: {problem['msg']}"
                problems.append(f"{key} {what}" if key else problem["msg"])
    print("\n".join([*problems, "--help shows what can be set"]), file=sys.stderr)
    raise SystemExit(2)


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The name that was likely meant, for a message."""
    return next(iter(difflib.get_close_matches(name, list(names), n=1, cutoff=0.7)), None)


def _help(command: type[Command]) -> str:
    lines = [(command.__doc__ or "").strip(), ""]
    width = max(map(len, command.model_fields))
    for key, field in command.model_fields.items():
        default = "" if field.is_required() else f" [{as_typed(field.default)}]"
        lines.append(f"  {key:<{width}}  {field.description or ''}{default}")
    return "\n".join(lines)


def as_typed(value: object) -> str:
    """A value as it is written on a command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


@contextmanager
def exit_without_teardown() -> Iterator[None]:
    """Let the process end as soon as its last `atexit` function has run, when the block has ended.

    Python would take down every module first: with torch loaded that computes for 2 to 3 s, in which a run that is over
    holds its node, and on a busy machine for 15 s. To be entered before torch is imported, since functions that are
    registered later run earlier.
    """
    code: object = 1

    def end() -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # closed, or a pipe without a reader
                stream.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))

    atexit.register(end)
    try:
        yield
        code = 0
    except SystemExit as error:
        code = error.code
        raise
