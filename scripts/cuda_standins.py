"""Makes stand-ins for the CUDA libraries that libtorch's wheel names but that a machine without a GPU never calls.

  python cuda_standins.py TORCH/lib

The loader wants every library and every versioned symbol to exist. 550 MB and these few kilobytes then do what 4 GB would. A
function of a stand-in ends the process with a trap, should anything call it.
"""
import collections
import re
import subprocess
import sys
import tempfile
from pathlib import Path

CUDA = re.compile(
    r"(cudnn|nccl|nvshmem|cusparse|cublas|cufft|curand|cusolver|nvrtc|cu[A-Z]|cufile|nvJit|cupti|_Z.*nvshmem)"
)


def main(lib):
    needed, undefined, defined = set(), collections.defaultdict(set), set()
    for library in sorted(path for path in lib.glob("*.so*") if path.is_file()):
        needed |= set(re.findall(r"NEEDED.*\[(.*)\]", output("readelf", "-d", library)))
        for version, kind, name in symbols(library):
            if kind == "U":
                undefined[version].add(name)
            elif kind not in "wv":
                defined.add(name)
    present = {path.name for path in lib.glob("*.so*")}
    present |= {path.name for path in lib.parent.parent.glob("nvidia/**/*.so*")}
    system = output("/sbin/ldconfig", "-p")
    plain = sorted(name for name in undefined[""] if name not in defined and CUDA.match(name))
    for library in sorted(name for name in needed if name not in present and name not in system):
        stand_in(lib / library, plain, undefined)


def symbols(library):
    """(version, kind, name) of each dynamic symbol."""
    for line in output("nm", "-D", "--with-symbol-versions", library).splitlines():
        match = re.match(r"\S*\s*([A-Za-z]) (\S+)$", line.strip())
        if match:
            name, _, version = match.group(2).partition("@")
            yield version.lstrip("@"), match.group(1), name


def stand_in(target, plain, undefined):
    stem = target.name.split(".so")[0]
    versions = {
        version: names
        for version, names in undefined.items()
        if version.startswith(stem + ".so") or (version == "NVSHMEM" and "nvshmem" in stem)
    }
    names = sorted(set(plain).union(*versions.values()))
    source = "".join(f"void {name}(void) {{ __builtin_trap(); }}\n" for name in names) or "typedef int empty;\n"
    script = "".join(f"{version} {{ global: {' '.join(n + ';' for n in sorted(names))} }};\n" for version, names in versions.items())
    with tempfile.TemporaryDirectory() as folder:
        code, map_file = Path(folder, "code.c"), Path(folder, "versions.map")
        code.write_text(source)
        map_file.write_text(script)
        command = ["gcc", "-w", "-shared", "-fPIC", "-o", target, code, f"-Wl,-soname,{target.name}"]
        subprocess.run(command + ([f"-Wl,--version-script={map_file}"] if script else []), check=True)


def output(*command):
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    main(Path(sys.argv[1]))
