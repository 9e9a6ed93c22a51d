"""Makes the environment that this package runs in, once, and prints its interpreter.

  python3 environment.py --cache FOLDER [--torch-from PYTHON]

Needs nothing but Python's own library and pip. The folder's name holds a hash of the lock and of the interpreter, so another lock makes
another environment. PYTHON may be an interpreter that has the locked torch already: its packages are used where their versions are the
locked ones, and only the rest is installed.
"""
import argparse
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

LOCK = Path(__file__).resolve().parent.parent / "requirements.lock"
# Exit codes of sysexits.h.
UNAVAILABLE, CONFIG = 69, 78

PROBE = """
import importlib.metadata as m, json, site, sys, sysconfig
found = {}
for name in json.loads(sys.argv[1]):
    try:
        found[name] = m.version(name).split("+")[0]
    except m.PackageNotFoundError:
        pass
print(json.dumps({"version": sys.version, "minor": list(sys.version_info[:2]), "found": found,
    "site": sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})}))
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder that holds the environments")
    parser.add_argument("--torch-from", type=Path, metavar="PYTHON", help="an interpreter whose packages may be used")
    args = parser.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    with open(args.cache / "transfer.lock", "w") as lock:
        # Two calls may come at once.
        fcntl.flock(lock, fcntl.LOCK_EX)
        print(environment(args.cache.resolve(), args.torch_from))


def environment(cache, torch_from):
    """The interpreter of the environment, made where it is not there yet."""
    wanted = locked()
    base = lender(torch_from, wanted)
    python = str(torch_from) if base else sys.executable
    about = base or probe(sys.executable, wanted)
    if tuple(about["minor"]) < (3, 10):
        fail(f"{python} is too old: torch {wanted['torch']} wants Python 3.10 or newer; set SGCL_TRANSFER_PYTHON", CONFIG)
    recipe = [LOCK.read_bytes(), about["version"].encode(), str(torch_from if base else "").encode(), Path(__file__).read_bytes()]
    folder = cache / f"transfer-{hashlib.sha256(bytes([0]).join(recipe)).hexdigest()[:12]}"
    interpreter = folder / "bin/python"
    if (folder / "complete").exists():
        return interpreter
    if folder.exists():
        say("an earlier set-up was interrupted: starting it again")
        shutil.rmtree(folder)
    there = {name for name, version in wanted.items() if base and base["found"].get(name) == version}
    lacking = [f"{name}=={version}" for name, version in wanted.items() if name not in there]
    if base:
        say(f"making an environment for transfer evaluations in {folder}: {len(there)} packages of {python}, and {', '.join(lacking)}")
    else:
        say(f"making an environment for transfer evaluations in {folder}: torch and its libraries, up to 4 GB, this once")
    run([python, "-m", "venv", folder], CONFIG, "python3-venv may be missing; SGCL_TRANSFER_PYTHON names another Python")
    if base:
        # After this environment's own packages on the path, so what is installed here goes first.
        own = next((folder / "lib").glob("python3*")) / "site-packages"
        (own / "lent.pth").write_text("".join(f"{site}\n" for site in base["site"]))
    if lacking:
        # The lock names all that is needed; CUDA's libraries are torch's own to name.
        closed = ["--no-deps"] if base else []
        install = [interpreter, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", *closed, *lacking]
        run(install, UNAVAILABLE, "pip's message is above; SGCL_TRANSFER_PYTHON names a Python that has these packages")
    check = "import torch, torchvision, pycocotools.mask, numpy, PIL, safetensors; torchvision.ops.nms"
    run([interpreter, "-c", check], CONFIG, "the installed packages do not work together here; set SGCL_TRANSFER_PYTHON")
    (folder / "complete").touch()
    return interpreter


def locked():
    """Version by name."""
    lines = (line.split("#")[0].strip() for line in LOCK.read_text().splitlines())
    return dict(line.split("==") for line in lines if line)


def lender(python, wanted):
    """What `python` has, if it has the locked torch; else None."""
    if python is None:
        return None
    about = probe(python, wanted)
    if about is None or about["found"].get("torch") != wanted["torch"]:
        say(f"{python} does not have torch {wanted['torch']}: not used")
        return None
    return about


def probe(python, wanted):
    answer = subprocess.run([python, "-c", PROBE, json.dumps(list(wanted))], capture_output=True, text=True, env=plain())
    return json.loads(answer.stdout) if answer.returncode == 0 else None


def plain():
    """The environment without what would change another interpreter's path."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


def run(command, code, remedy):
    # Standard output is the answer's.
    if subprocess.run(list(map(str, command)), stdin=subprocess.DEVNULL, stdout=sys.stderr, env=plain()).returncode != 0:
        fail(f"`{' '.join(map(str, command))}` failed; {remedy}", code)


def say(text):
    print(f"setup: {text}", file=sys.stderr, flush=True)


def fail(text, code):
    print(f"error: {text}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
