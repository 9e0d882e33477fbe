"""The inside of the sandbox: a process of its own that runs foreign code and reports what its function returned.

Started as `python -I -S guard.py` with an empty environment; standard library only. The job comes on stdin as JSON,
one JSON line per answer goes to stdout. Nothing here decides what is right: expected values never enter this process.

Two layers. Linux namespaces take away the network, the other processes and, with chroot into an empty file system in
memory, all files. Audit hooks refuse files, sockets, processes and ctypes once more; where the system allows no
namespaces they are the only such layer, and no strong one. Resource limits hold in either case.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys

# Imported before the files disappear; nothing else of the standard library can be imported by an answer.
PRELOADED = (
    "bisect", "cmath", "collections", "copy", "dataclasses", "datetime", "decimal", "enum", "fractions", "functools",
    "hashlib", "heapq", "itertools", "math", "numbers", "operator", "random", "re", "statistics", "string", "textwrap",
    "typing", "unicodedata", "encodings.idna",
)  # fmt: skip
NOBODY = 65534
CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (
    0x00020000, 0x08000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
MS_NOSUID, MS_NODEV, MS_REC, MS_PRIVATE = 2, 4, 16384, 1 << 18
REFUSED = (
    "ctypes.", "ftplib.", "os.chmod", "os.chown", "os.exec", "os.fork", "os.kill", "os.link", "os.posix_spawn",
    "os.remove", "os.rename", "os.rmdir", "os.scandir", "os.listdir", "os.spawn", "os.startfile", "os.symlink",
    "os.system", "os.truncate", "os.utime", "pty.", "resource.", "shutil.", "signal.pthread_kill", "socket.",
    "subprocess.", "syslog.", "urllib.", "webbrowser.",
)  # fmt: skip


def main() -> None:
    job = json.loads(sys.stdin.buffer.read())
    for name in PRELOADED:
        __import__(name)
    report = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    separated = _separate()
    child = os.fork()
    if child == 0:
        try:
            _run(job, report, separated)
        finally:
            os._exit(0)
    os.close(report)
    for number in (signal.SIGALRM, signal.SIGTERM):
        signal.signal(number, lambda *_: os.kill(child, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, job["seconds"])
    os.waitpid(child, 0)
    os._exit(0)


def _separate() -> bool:
    """Leave the network, the process numbers and the mounts of the rest of the machine; the next child is process 1."""
    user = os.geteuid()
    flags = CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET | (CLONE_NEWUSER if user else 0)
    try:
        group = os.getegid()
        _call("unshare", flags)
        if user:  # without root, rights over the new namespaces come with a user namespace of our own
            for file, text in (
                ("setgroups", "deny"),
                ("uid_map", f"{NOBODY} {user} 1"),
                ("gid_map", f"{NOBODY} {group} 1"),
            ):
                with open(f"/proc/self/{file}", "w") as handle:
                    handle.write(text)
    except (AttributeError, OSError):
        return False
    return True


def _run(job: dict, report: int, separated: bool) -> None:
    root = os.geteuid() == 0
    closed = separated and _close_files(job["folder"])
    if not closed:
        if root:
            os.chown(job["folder"], NOBODY, NOBODY)
        os.chdir(job["folder"])
    if root:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    if separated:  # what remains of rights over the namespaces
        _call("capset", (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
    _limit(job)
    folder = os.getcwd()
    held = ["cpu", "memory", "time", "output"] + ["network", "processes"] * separated + ["files"] * closed
    _write(report, {"held": held})
    sys.addaudithook(lambda event, arguments: _refuse(event, arguments, folder))
    _answer(job, report)


def _close_files(folder: str) -> bool:
    """Make a small file system in memory the only one there is."""
    try:
        _call("mount", b"none", b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None)
        _call("mount", b"tmpfs", folder.encode(), b"tmpfs", ctypes.c_ulong(MS_NOSUID | MS_NODEV),
              b"size=4m,nr_inodes=64,mode=0777")  # fmt: skip
        os.chroot(folder)
        os.chdir("/")
    except OSError:
        return False
    return True


def _limit(job: dict) -> None:
    limits = {
        resource.RLIMIT_CPU: job["cpu_seconds"],
        resource.RLIMIT_AS: job["memory_mb"] << 20,
        resource.RLIMIT_FSIZE: 1 << 20,
        resource.RLIMIT_NOFILE: 16,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 0,  # no further process or thread; the kernel exempts root, which we no longer are
    }
    for what, value in limits.items():
        resource.setrlimit(what, (value, value))


def _refuse(event: str, arguments: tuple, folder: str) -> None:
    if event.startswith(REFUSED):
        raise PermissionError(f"{event} is not allowed here")
    if event in ("open", "os.mkdir"):
        path = arguments[0]
        if not isinstance(path, str) or not (os.path.abspath(path) + "/").startswith(folder.rstrip("/") + "/"):
            raise PermissionError(f"{path!r} is outside the folder of this run")


def _answer(job: dict, report: int) -> None:
    space: dict = {"__name__": "answer"}
    try:
        exec(compile(job["code"], "answer.py", "exec"), space)
        function = space[job["function"]]
    except BaseException as error:
        _write(report, {"error": _shown(error)})
        return
    for arguments in job["calls"]:
        try:
            line = {"value": function(*arguments)}
            text = json.dumps(line)
        except BaseException as error:
            text = json.dumps({"error": _shown(error)})
        _write(report, text)


def _shown(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:200]
    except BaseException:
        return "an error that cannot be shown"


def _write(report: int, line: dict | str) -> None:
    data = ((line if isinstance(line, str) else json.dumps(line)) + "\n").encode()
    while data:
        data = data[os.write(report, data) :]


def _call(name: str, *arguments: object) -> None:
    if getattr(_libc, name)(*arguments) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


if __name__ == "__main__":
    _libc = ctypes.CDLL(None, use_errno=True)
    main()
