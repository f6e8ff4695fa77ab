"""Creates the environment: ``python tasks/setup.py .venv``. Runs before anything is installed, so stdlib only.

Done once: a stamp holds the digest of requirements.txt, and a second call with the same digest needs no network.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

OLDEST = (3, 10)
NEWER_FIRST = [f"python3.{minor}" for minor in range(14, OLDEST[1] - 1, -1)]
REQUIREMENTS = Path("requirements.txt")


def main() -> None:
    venv = Path(sys.argv[1] if len(sys.argv) > 1 else ".venv")
    if sys.version_info < OLDEST:
        restart_with_newer_python()
    stamp, digest = venv / ".installed", hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == digest:
        stamp.touch()
        return
    print(f"setup: installing the packages of requirements.txt into {venv} (about a minute)", flush=True)
    create(venv)
    install(venv)
    stamp.write_text(digest)
    print("setup: done")


def restart_with_newer_python() -> None:
    """Replaces this process by the newest Python on the path that is new enough, or gives up with a message."""
    asks = f"import sys; sys.exit(sys.version_info < {OLDEST})"
    for name in NEWER_FIRST:
        # A version manager may put a name on the path that does not run: ask it.
        if shutil.which(name) and subprocess.call([name, "-c", asks], stderr=subprocess.DEVNULL) == 0:
            os.execvp(name, [name, *sys.argv])
    stop(f"Python {sys.version_info[0]}.{sys.version_info[1]} is too old, and no newer one is on the path; Python >= "
         f"{OLDEST[0]}.{OLDEST[1]} is needed: install one, or say which: make setup PYTHON=/path/to/python")


def create(venv: Path) -> None:
    """Creates the environment with pip in it; a half-made one is completed."""
    if has_pip(venv):
        return
    if importlib.util.find_spec("ensurepip"):
        command = [sys.executable, "-m", "venv", str(venv)]
    elif importlib.util.find_spec("pip"):  # Debian ships Python without ensurepip: its own pip can install pip
        command = [sys.executable, "-m", "venv", "--without-pip", str(venv)]
    else:
        stop(f"{sys.executable} can create no environment: it has neither 'ensurepip' nor 'pip'; install them (Debian, "
             "Ubuntu: apt install python3-venv), then run 'make setup' again")
    if subprocess.call(command) != 0:
        stop(f"'{' '.join(command)}' failed (see above); remove {venv} and run 'make setup' again")
    if not has_pip(venv):
        pip(sys.executable, "--python", str(venv / "bin" / "python"), "install", "pip")


def has_pip(venv: Path) -> bool:
    python = venv / "bin" / "python"
    return python.exists() and subprocess.call([str(python), "-m", "pip", "--version"], stdout=subprocess.DEVNULL,
                                               stderr=subprocess.DEVNULL) == 0


def install(venv: Path) -> None:
    pip(str(venv / "bin" / "python"), "install", "-r", str(REQUIREMENTS))


def pip(python: str, *arguments: str) -> None:
    """Runs pip without its warnings: they concern its own configuration and only confuse here."""
    if subprocess.call([python, "-m", "pip", "-qq", "--no-input", "--disable-pip-version-check", *arguments]) != 0:
        stop("pip could not install the packages (see above); the first setup needs a network or a local package "
             "index; then run 'make setup' again: it goes on where it stopped")


def stop(message: str) -> None:
    sys.exit("error: " + message)


if __name__ == "__main__":
    main()
