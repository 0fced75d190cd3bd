"""A PostgreSQL server of our own for tests: on loopback, in a folder of its own, started, stopped and killed at will."""

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import psutil
import psycopg


def missing() -> str | None:
    """Why there can be no server, or None."""
    if not _binary("postgres"):
        return "there is no PostgreSQL (make system installs it)"
    if os.getuid() == 0 and not (shutil.which("runuser") and any(user.pw_name == "postgres" for user in pwd.getpwall())):
        return "PostgreSQL does not run as root, and there is no user postgres to run it as"
    return None


def _binary(name: str) -> str | None:
    """Path of one of the server's programs; Debian keeps them out of PATH."""
    folders = [str(path) for path in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
    if config := shutil.which("pg_config"):
        folders.append(subprocess.run([config, "--bindir"], capture_output=True, text=True, check=True).stdout.strip())
    return next(filter(None, (shutil.which(name, path=folder) for folder in [*folders, os.environ["PATH"]])), None)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE  # one that nobody has buried holds no memory and no file
    except psutil.NoSuchProcess:
        return False


class Postgres:
    """A server; `close` removes it and its folder."""

    def __init__(self):
        self.folder, self.port, self.password = Path(tempfile.mkdtemp(prefix="ecomrec-postgres-")), _free_port(), secrets.token_hex(8)
        self._as = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
        secret = self.folder / "password"
        secret.write_text(self.password)
        if self._as:
            for path in (self.folder, secret):
                shutil.chown(path, "postgres", "postgres")
        make = [_binary("initdb"), "-D", str(self.folder / "data"), "-U", "shop", "-A", "scram-sha-256", "--pwfile", str(secret), "-E", "UTF8", "--no-locale"]
        subprocess.run([*self._as, *make], cwd=self.folder, check=True, capture_output=True)
        self._server = None
        self.start()

    def start(self) -> None:
        """Start it, and wait until it answers; after a kill it recovers first."""
        settings = {
            "listen_addresses": "127.0.0.1", "port": self.port, "unix_socket_directories": self.folder, "max_connections": 50,
            "log_min_messages": "panic", "recovery_init_sync_method": "syncfs", "dynamic_shared_memory_type": "mmap",
        }
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        command, ends = [*self._as, _binary("postgres"), "-D", str(self.folder / "data"), *options], time.monotonic() + 60
        while True:
            if self._server is None or self._server.poll() is not None:  # not yet, or what was killed had not quite ended
                with open(self.folder / "log", "wb") as log:
                    self._server = subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log)
            try:
                psycopg.connect(self.address(), connect_timeout=3).close()
                return
            except psycopg.OperationalError:
                if time.monotonic() > ends:
                    raise RuntimeError((self.folder / "log").read_text()) from None
                time.sleep(0.02)

    def stop(self) -> None:
        """Stop it as an administrator does who does not wait for clients."""
        os.kill(self._postmaster(), signal.SIGINT)
        self._server.wait(60)

    def kill(self) -> None:
        """kill -9 of every process of it at once."""
        if self._server.poll() is not None:
            return
        server = psutil.Process(self._server.pid)  # or who runs it
        processes = [server, *server.children(recursive=True)]
        for process in reversed(processes):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._server.wait(60)
        while any(_alive(process) for process in processes):
            time.sleep(0.005)

    def address(self, schema: str = "public") -> str:
        return f"postgresql://shop:{self.password}@127.0.0.1:{self.port}/postgres?options=-csearch_path%3D{schema}"

    def database(self) -> str:
        """Address of a place where there is nothing yet: a schema of its own, which takes less of the disk than a database."""
        name = f"shop_{secrets.token_hex(6)}"
        with psycopg.connect(self.address()) as connection:
            connection.execute(f"CREATE SCHEMA {name}")
        return self.address(name)

    def close(self) -> None:
        """End it, without the care that a stop takes, and remove it."""
        if self._server.poll() is None:
            os.kill(self._postmaster(), signal.SIGQUIT)
            self._server.wait(60)
        shutil.rmtree(self.folder)

    def _postmaster(self) -> int:
        return int((self.folder / "data/postmaster.pid").read_text().split()[0])
