"""Replies of several models to the same prompts, written to a file as they come, so a cut comparison can continue."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import dts
from dts.evaluation.finetuned.replies import Item, Reply, sample_replies
from dts.evaluation.run_folder import read_jsonl, write_text
from dts.lm import LanguageModel
from dts.training.heuristic_reward import prompt_text

log = logging.getLogger(__name__)

FILE = "generations.jsonl"
FIELDS = {
    "replies": "text",
    "tokens": "tokens",
    "cut": "cut",
    "ids": "ids",
    "logprobs": "logprob",
}  # of a line, of a reply
Source = str | LanguageModel  # what `dts.load` takes, or a loaded model
Sampled = dict[str, list[list[list[Reply]]]]  # model -> [seeds][items][samples]


def sample_models(
    models: Mapping[str, Sequence[Source]],
    items: Sequence[Item],
    folder: Path,
    *,
    samples: int,
    max_tokens: int,
    temperature: float,
    seed: int,
    resume: bool = False,
) -> Sampled:
    """Replies of every model and training seed, one model in memory at a time.

    resume: replies that the folder has of the same source, prompt and settings are taken from there, whatever the model
    was called then. Whether a source has changed since is not looked at.
    """
    folder.mkdir(parents=True, exist_ok=True)
    about = {"samples": samples, "max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    kept = _read(folder / FILE) if resume else {}
    sampled: Sampled = {name: [] for name in models}
    write_text(folder / FILE, "".join(line + "\n" for line, _ in kept.values()))  # in one piece: a kill loses nothing
    with (folder / FILE).open("a", encoding="utf-8") as stream:
        for name, source, number in ((n, s, i) for n, own in models.items() for i, s in enumerate(own)):
            log.info("sampling %s, seed %d of %d", name, number + 1, len(models[name]))
            known = {"model": name, "source": source if isinstance(source, str) else source.name, **about}
            lines = [{**known, "item": i, "prompt": prompt_text(item.prompt)} for i, item in enumerate(items)]
            found = {i: kept[_key(line)][1] for i, line in enumerate(lines) if _key(line) in kept}
            missing = [i for i in range(len(items)) if i not in found]
            if missing:
                lm = dts.load(source) if isinstance(source, str) else source
                new = sample_replies(lm, items, missing, **about)  # type: ignore[arg-type]
                for index, replies in zip(missing, new, strict=True):
                    found[index] = replies
                    stream.write(_line(lines[index], replies) + "\n")
                    stream.flush()
            sampled[name].append([found[i] for i in range(len(items))])
    return sampled


def _line(known: Mapping[str, object], replies: Sequence[Reply]) -> str:
    own = {name: [getattr(reply, field) for reply in replies] for name, field in FIELDS.items()}
    return json.dumps({**known, **own}, ensure_ascii=False)


def _key(line: Mapping[str, object]) -> str:
    return json.dumps([value for name, value in line.items() if name not in ("model", *FIELDS)])


def _read(file: Path) -> dict[str, tuple[str, list[Reply]]]:
    """Whole lines and their replies by key; the last line may have been cut."""
    found = {}
    for entry in read_jsonl(file) if file.is_file() else []:
        try:
            columns = [entry[name] for name in FIELDS]
            replies = [Reply(text, tokens, cut, tuple(ids), logprob)
                       for text, tokens, cut, ids, logprob in zip(*columns, strict=True)]  # fmt: skip
        except (ValueError, KeyError, TypeError):
            continue
        found[_key(entry)] = (json.dumps(entry, ensure_ascii=False), replies)
    return found
