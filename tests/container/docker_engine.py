"""A Docker engine for as long as the tests run: the machine's own, or a private one (root, Debian).

A private one lies in one folder, has no network of its own and touches no firewall. All that it stored goes with it.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]

#: What the Dockerfile starts from, and what stands for it where no registry of images answers.
BASE_IMAGE = "python:3.11-slim"
STAND_IN = "fmcib_ssl-test-base"

#: Python 3.11 is Debian 12's.
DEBIAN = "bookworm"
DEBIAN_PACKAGES = "ca-certificates,python3,python3-pip,python3-venv"
CERTIFICATES = "etc/ssl/certs/ca-certificates.crt"

#: Given to the build: the one must be found in what a run writes, the other in no layer.
REVISION = "0123456789abcdef0123456789abcdef01234567"
CANARY = "canary-of-the-secret-7d1f0c55"


class EngineError(RuntimeError):
    """The engine did not do what it was asked for; the message has what it said."""


class DockerEngine:
    """Starts on entry, unless one is there; stops on exit, if it was started.

    Args:
        folder: for everything a private engine stores, tens of GB; removed on exit.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environ = {**os.environ, "DOCKER_BUILDKIT": "1"}
        self.is_private = False
        self._daemon: subprocess.Popen[bytes] | None = None
        self._images: list[str] = []

    @staticmethod
    def why_not() -> str | None:
        """What is missing on this machine, if something is."""
        if _answers(os.environ):
            return None
        if os.geteuid() != 0:
            return "no Docker engine answers, and to start one needs root"
        if missing := [name for name in ("dockerd", "debootstrap") if shutil.which(name) is None]:
            return f"no Docker engine answers, and there is no {missing[0]}; `make test-container` installs Debian's"
        return None

    def __enter__(self) -> DockerEngine:
        if not _answers(self.environ):
            try:
                self._start()
            except BaseException:
                self.__exit__()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._daemon is None:
            if self._images:
                self.docker("image", "rm", *self._images, check=False)
            return
        self._daemon.send_signal(signal.SIGTERM)
        try:
            self._daemon.wait(60)
        except subprocess.TimeoutExpired:
            self._daemon.kill()
            self._daemon.wait()
        subprocess.run(["umount", self.folder / "exec" / "netns" / "default"], stderr=subprocess.DEVNULL, check=False)
        shutil.rmtree(self.folder, ignore_errors=True)

    def docker(self, *arguments: str, check: bool = True, timeout_s: float = 600) -> subprocess.CompletedProcess[str]:
        """Run `docker`, and have what it printed."""
        return self.run(["docker", *arguments], check=check, timeout_s=timeout_s)

    def run(
        self,
        command: Sequence[str],
        cwd: Path | None = None,
        check: bool = True,
        timeout_s: float = 600,
        **environ: str,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command that calls `docker`, and have what it printed on both streams."""
        done = subprocess.run(
            command, cwd=cwd, env={**self.environ, **environ}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, check=False, timeout=timeout_s,
        )  # fmt: skip
        if check and done.returncode:
            raise EngineError(f"{' '.join(command)}: {done.returncode}\n{done.stdout[-8000:]}")
        return done

    def build(self, tag: str, build_args: Mapping[str, str], secrets: Mapping[str, Path]) -> str:
        """Build the Dockerfile as a user would; gives the tag."""
        options = [word for name, value in build_args.items() for word in ("--build-arg", f"{name}={value}")]
        options += [word for name, path in secrets.items() for word in ("--secret", f"id={name},src={path}")]
        if self.is_private:
            options += ["--network", "host"]  # it has no other
        self.run(["docker", "build", "--progress=plain", *options, "--tag", tag, str(REPO)], timeout_s=3600)
        self._images.append(tag)
        return tag

    def base_image(self) -> str:
        """The Dockerfile's own base where it can be had, else one of Debian's packages."""
        for look in (("image", "inspect"), ("pull", "--quiet")):
            if self.docker(*look, BASE_IMAGE, check=False).returncode == 0:
                return BASE_IMAGE
        root = self.folder / "base"
        root.mkdir(parents=True)
        self.run(["debootstrap", "--variant=minbase", f"--include={DEBIAN_PACKAGES}", DEBIAN, str(root)])
        # As the official image has it, and with whom this machine trusts: its proxy may have an authority of its own.
        for name, program in (("python", "python3"), ("pip", "pip3")):
            (root / "usr" / "local" / "bin" / name).symlink_to(f"/usr/bin/{program}")
        shutil.copy(f"/{CERTIFICATES}", root / CERTIFICATES)
        (root / "etc" / "pip.conf").write_text(f"[global]\ncert = /{CERTIFICATES}\n")
        for leftover in ("cache/apt/archives", "lib/apt/lists"):
            shutil.rmtree(root / "var" / leftover)
        archive = root.with_suffix(".tar")
        self.run(["tar", "--create", "--file", str(archive), "--directory", str(root), "."])
        path = "ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
        self.docker("import", "--change", path, str(archive), STAND_IN)
        self._images.append(STAND_IN)
        shutil.rmtree(root)
        archive.unlink()
        return STAND_IN

    def _start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.is_private = True
        address = f"unix://{self.folder}/docker.sock"
        # Debian's client, as old as its engine: a newer one on the path builds with a plugin that may be missing.
        self.environ |= {"DOCKER_HOST": address, "PATH": f"/usr/bin:{self.environ['PATH']}"}
        command = ["setpriv", "--pdeathsig=TERM", "dockerd"]  # it ends with this process, however that ends
        command += [f"--host={address}", f"--data-root={self.folder}/data", f"--exec-root={self.folder}/exec"]
        command += [f"--pidfile={self.folder}/docker.pid", "--iptables=false", "--ip6tables=false", "--bridge=none"]
        log = self.folder / "dockerd.log"
        with log.open("wb") as output:
            self._daemon = subprocess.Popen(
                command, env=self.environ, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip
        end = time.monotonic() + 60
        while not _answers(self.environ):
            if time.monotonic() > end or self._daemon.poll() is not None:
                raise EngineError(f"dockerd does not answer\n{log.read_text(errors='replace')[-4000:]}")
            time.sleep(0.2)


def _answers(environ: Mapping[str, str]) -> bool:
    return (
        shutil.which("docker", path=environ["PATH"]) is not None
        and subprocess.run(["docker", "info"], env=environ, capture_output=True, check=False).returncode == 0
    )
