"""`dts serve`: an OpenAI-compatible server whose answers are searched for.

    dts serve --model smollm2-135m --rewards rewards.py
    DTS_SERVE_KEY=... dts serve --host 0.0.0.0

/v1/chat/completions, /v1/completions and /v1/models. A request chooses among the rewards of the file by name
(`"reward": "polite"`), with `method`, `rollouts` and `reward_scale` beside it. A key in the environment variable
DTS_SERVE_KEY is asked of every client.
"""

from __future__ import annotations

import argparse
import ipaddress
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dts.errors import DTSError, UnavailableError, UsageError
from dts.settings import check_whole

if TYPE_CHECKING:
    from dts.doors.app import Service
    from dts.doors.bodies import Limits

log = logging.getLogger(__name__)

KEY = "DTS_SERVE_KEY"
# Seconds, for uvicorn. Clients give up an idle connection after 5, and whoever closes first must be the client: a
# request that is sent while the server closes is lost.
CONNECTIONS: dict[str, Any] = {"timeout_keep_alive": 60, "timeout_graceful_shutdown": 5}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dts serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m", metavar="NAME",
                        help="registry name, hub id or local folder (default: smollm2-135m)")  # fmt: skip
    parser.add_argument("--name", metavar="NAME", help="of the model, to clients (default: the last part of --model)")
    parser.add_argument("--rewards", metavar="FILE.py", help="its public functions and dts.Reward objects are rewards")
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="(default: 127.0.0.1, this machine)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="0 takes a free one (default: 8000)")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, mps (default: the best there is)")
    parser.add_argument("--dtype", metavar="NAME", help="float32, bfloat16, float16")
    limits = parser.add_argument_group("limits of a request")
    limits.add_argument("--max-new-tokens", type=int, default=1024, metavar="N", help="(default: 1024)")
    limits.add_argument("--max-rollouts", type=int, default=64, metavar="N", help="(default: 64)")
    limits.add_argument("--max-choices", type=int, default=16, metavar="N", help="n (default: 16)")
    limits.add_argument("--max-prompts", type=int, default=16, metavar="N", help="of /v1/completions (default: 16)")
    limits.add_argument("--max-seconds", type=float, default=120.0, metavar="X",
                        help="from its arrival; what was found by then is the answer (default: 120)")  # fmt: skip
    limits.add_argument("--reward-timeout", type=float, metavar="SECONDS",
                        help="that a reward may take for a text, or its request fails (default: no limit)")  # fmt: skip
    limits.add_argument("--max-bytes", type=int, default=1 << 20, metavar="N", help="of the body (default: 1 MiB)")
    limits.add_argument("--max-waiting", type=int, default=64, metavar="N",
                        help="requests that wait; further ones get 429 (default: 64)")  # fmt: skip
    limits.add_argument("--max-together", type=int, default=8, metavar="N",
                        help="prompts that are searched at the same time, in one batch (default: 8)")  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(argv)
    try:
        uvicorn = _uvicorn()
        service = service_of(options)
    except DTSError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    from dts.doors.app import build_app

    uvicorn.run(build_app(service), host=options.host, port=options.port, log_level="info", **CONNECTIONS)
    return 0


def _uvicorn() -> Any:
    try:
        import fastapi  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise UnavailableError(f"serving needs fastapi and uvicorn ({error}); run: pip install 'maxent-decoding[serve]'"
                               ) from error  # fmt: skip
    return uvicorn


def service_of(options: argparse.Namespace) -> Service:
    """Everything that can be checked is checked before the model is loaded."""
    import dts
    from dts.doors.app import Service
    from dts.doors.worker import Worker
    from dts.timeout import check_seconds

    check_whole("--port", options.port, 0, 65535, allowed="a port from 0 to 65535")
    if options.reward_timeout is not None:
        check_seconds(options.reward_timeout)
    limits, key = limits_of(options), key_from(os.environ.get(KEY), options.host)
    rewards = {} if options.rewards is None else rewards_of(Path(options.rewards))
    lm = dts.load(options.model, device=options.device, dtype=options.dtype)
    worker = Worker(lm, waiting=limits.waiting, new_tokens=limits.new_tokens, together=limits.together,
                    reward_seconds=options.reward_timeout)  # fmt: skip
    name = options.name or options.model.rstrip("/").rpartition("/")[2]
    return Service(worker, name, rewards, limits, key, hosts_of(options.host))


def hosts_of(host: str) -> frozenset[str] | None:
    """Names by which clients may call a server on the loopback interface; None, for any, elsewhere."""
    return frozenset([host.lower(), "localhost", "127.0.0.1", "::1"]) if _is_loopback(host) else None


def limits_of(options: argparse.Namespace) -> Limits:
    from dts.doors.bodies import Limits

    given = {
        "body_bytes": options.max_bytes, "new_tokens": options.max_new_tokens, "rollouts": options.max_rollouts,
        "choices": options.max_choices, "prompts": options.max_prompts, "seconds": options.max_seconds,
        "waiting": options.max_waiting, "together": options.max_together,
    }  # fmt: skip
    for field in fields(Limits):
        if not given[field.name] > 0:
            raise UsageError(f"the limit of {field.name.replace('_', ' ')} is {given[field.name]}; give more than 0")
    return Limits(**given)


def key_from(given: str | None, host: str) -> str | None:
    """The key that clients have to send; a warning where others can reach a server without one."""
    if given is not None and not given.strip():
        raise UsageError(f"{KEY} is empty; unset it, or give a key")
    if given is None and not _is_loopback(host):
        log.warning("everyone who reaches %s can use this server: set %s to ask for a key", host, KEY)
    return None if given is None else given.strip()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def rewards_of(path: Path) -> dict[str, Any]:
    """The rewards that a file of the operator's defines: its public functions, and its public `dts.Reward` objects."""
    from dts.evaluation.decode import module_of
    from dts.rewards import Reward

    try:
        module = module_of(path)
    except Exception as error:  # code of the operator's: it may do anything
        raise UsageError(f"--rewards {path} cannot be imported ({type(error).__name__}: {error})") from error
    found = {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and not isinstance(value, type)
        and (isinstance(value, Reward) or (callable(value) and value.__module__ == module.__name__))
    }
    if not found:
        raise UsageError(f"--rewards {path} defines no public function and no dts.Reward")
    return found
