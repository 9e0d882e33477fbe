"""Nothing that comes from elsewhere is run, nothing is written outside, and no secret is written at all."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import shutil
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from families import random_model

import dts
from dts.errors import DTSError, UnavailableError, UsageError
from dts.evaluation import cli, data
from dts.evaluation.experiment.backend import check_prompts
from dts.evaluation.experiment.config import read_config_file
from dts.evaluation.finetuned.judge import Judge
from dts.evaluation.tasks.registry import read_task_file
from dts.models.loading import load_pretrained
from dts.models.registry import read_models_file, resolve
from dts.training.cli import read_config
from dts.training.coding import Limits, containment, run
from dts.training.config import assignment

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("dts", "models", "search", "training", "evaluation", "benchmarks")
SOURCES = sorted({p.resolve() for folder in FOLDERS for p in (ROOT / folder).rglob("*.py")} | set(ROOT.glob("*.py")))

# What the code may call --------------------------------------------------------------------------------------------


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    """Dotted name and node of every call in a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            found.append((ast.unparse(node.func), node))
    return found


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    return names


FORBIDDEN = {"yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "torch.load", "joblib.load", "eval",
             "pd.read_pickle", "os.system", "os.popen", "shutil.unpack_archive", "tempfile.mktemp"}  # fmt: skip


def test_no_call_runs_what_a_file_holds():
    assert len(SOURCES) > 100
    wrong = []
    for path in SOURCES:
        name = path.relative_to(ROOT).as_posix()
        if imports(path) & {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "tarfile", "telnetlib"}:
            wrong.append(f"{name}: imports {imports(path)}")
        for called, node in calls(path):
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if called in FORBIDDEN or called.endswith(".extractall") or keywords.get("shell") == "True":
                wrong.append(f"{name}:{node.lineno} {called}")
            if called == "exec" and name != "training/coding/guard.py":  # the inside of the sandbox
                wrong.append(f"{name}:{node.lineno} exec")
            if called in ("np.load", "numpy.load") and keywords.get("allow_pickle") != "False":
                wrong.append(f"{name}:{node.lineno} {called} without allow_pickle=False")
            if keywords.get("trust_remote_code") == "True" or keywords.get("use_safetensors") == "False":
                wrong.append(f"{name}:{node.lineno} {called} {keywords}")
    assert wrong == []


# Models ------------------------------------------------------------------------------------------------------------


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    random_model("llama").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.bin", "adapter_model.bin", "model.ckpt"])
@pytest.mark.parametrize("beside", ["nothing", "other weights", "an adapter"])
def test_pickled_weights_are_never_read(tmp_path, model, name, beside):
    mark = tmp_path / "exploded"
    (model / "model.safetensors").rename(tmp_path / "kept.safetensors")
    (model / name).write_bytes(pickle.dumps({"lm_head.weight": Bomb(mark)}))
    if beside != "nothing":
        shutil.copy(tmp_path / "kept.safetensors", model / "other.safetensors")
    if beside == "an adapter":
        base = tmp_path / "base"
        random_model("llama").save_pretrained(base)
        about = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 2, "target_modules": ["q_proj"]}
        (model / "adapter_config.json").write_text(json.dumps(about))
    with pytest.raises((UsageError, UnavailableError)):
        load_pretrained(str(model))
    assert not mark.exists()
    with pytest.raises(FileExistsError):  # the bomb is a real one
        mark.mkdir()
        pickle.loads((model / name).read_bytes())


def test_code_in_a_models_folder_is_not_run_unless_asked_for(tmp_path, model, monkeypatch):
    mark = tmp_path / "exploded"
    (model / "evil.py").write_text(
        f"import os\nos.mkdir({str(mark)!r})\nfrom transformers import LlamaConfig as Evil, LlamaForCausalLM as Model\n"
    )
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Model"}}
    (model / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # a question at the terminal would be answered with yes
    with pytest.raises(UnavailableError):
        dts.load(str(model))
    with pytest.raises(UnavailableError):
        check_prompts(resolve(str(model)), [], 8)
    assert not mark.exists()


# Files -------------------------------------------------------------------------------------------------------------


YAML_READERS = [
    read_config_file,
    read_models_file,
    read_config,
    lambda path: read_task_file(str(path)),
    lambda path: assignment(f"model={path.read_text()}"),
]


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir"])
@pytest.mark.parametrize("read", YAML_READERS)
def test_yaml_holds_values_and_no_objects(tmp_path, read, tag):
    mark, path = tmp_path / "exploded", tmp_path / "a.yaml"
    path.write_text(f"{tag} [{mark}]")
    with pytest.raises(UsageError):
        read(path)
    assert not mark.exists()


def test_a_yaml_that_grows_is_no_way_to_eat_memory(tmp_path):
    """Nine lists of nine references each: shared objects, not a billion copies."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    (tmp_path / "a.yaml").write_text("\n".join(lines))
    tracemalloc.start()
    try:
        with pytest.raises(UsageError, match="unknown key 'a0'"):
            read_config_file(tmp_path / "a.yaml")
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_an_npz_file_holds_numbers_and_no_objects(tmp_path):
    mark, path = tmp_path / "exploded", tmp_path / "har_windows.npz"
    np.savez(path, acc=np.ones((2, 3, 3)), label=np.array([Bomb(mark)] * 2, dtype=object), subject=np.arange(2),
             sampling_hz=np.array(50.0))  # fmt: skip
    with pytest.raises(UsageError, match="without pickled objects"):
        data.read_har_npz(path)
    path.write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(UsageError, match="without pickled objects"):
        data.read_har_npz(path)
    assert not mark.exists()


def link(name: str) -> zipfile.ZipInfo:
    """An entry that unpackers which follow the archive make a symbolic link."""
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, 0o120777 << 16
    return info


HOSTILE = {
    "up": [("../up.csv", b"x")],
    "up from below": [("a/b/../../../up.csv", b"x"), ("a/c.csv", b"x")],
    "absolute": [("/tmp/dts-absolute.csv", b"x")],
    "absolute beside relative": [("/abs/a.csv", b"x"), ("b/c.csv", b"x")],
    "relative beside absolute": [("b/c.csv", b"x"), ("/abs/a.csv", b"x")],
    "backslashes": [("..\\up.csv", b"x")],
    "drive": [("C:\\up.csv", b"x")],
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_archives_write_only_below_their_folder(tmp_path, monkeypatch, kind):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in HOSTILE[kind]:
            archive.writestr(name, content)
    monkeypatch.setattr(data.sources.urllib.request, "urlopen", lambda *_, **__: io.BytesIO(stream.getvalue()))
    with pytest.raises(UnavailableError, match=r"holds the path .*; nothing was kept"):
        data.download("har-cot", tmp_path / "deep" / "here")
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
    assert not Path("/tmp/dts-absolute.csv").exists()


def test_links_in_archives_become_plain_files(tmp_path, monkeypatch):
    outside = tmp_path / "outside.txt"
    outside.write_text("mine")
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(link("door"), str(outside))
        archive.writestr("readme", b"x")
    monkeypatch.setattr(data.sources.urllib.request, "urlopen", lambda *_, **__: io.BytesIO(stream.getvalue()))
    folder = data.download("har-cot", tmp_path / "here")
    assert not (folder / "door").is_symlink() and (folder / "door").read_text() == str(outside)
    assert outside.read_text() == "mine"


def test_archives_in_archives_end(tmp_path, monkeypatch):
    content = b"x"
    for _ in range(5):
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("a.zip", content)
        content = stream.getvalue()
    monkeypatch.setattr(data.sources.urllib.request, "urlopen", lambda *_, **__: io.BytesIO(content))
    folder = data.download("har-cot", tmp_path)
    assert sorted(p.name for p in folder.iterdir()) == ["a.zip", "checksums.json"]  # the third archive stays one


def test_what_a_source_gave_is_checked_when_it_is_used_again(tmp_path, monkeypatch):
    monkeypatch.setattr(data.sources.urllib.request, "urlopen", lambda *_, **__: io.BytesIO(b"V1,V2\n"))
    folder = data.download("m4", tmp_path)
    assert data.download("m4", tmp_path) == folder
    (folder / "Hourly-train.csv").write_bytes(b"V1,V3\n")
    with pytest.raises(UnavailableError, match=r"Hourly-train\.csv is damaged; delete the folder"):
        data.download("m4", tmp_path)


# The sandbox: what tests/test_coding.py does not try ----------------------------------------------------------------

QUICK = Limits(seconds=1, cpu_seconds=1)
FREE = "import os, sys\nguard = sys.modules['__main__']\nguard._refuse = lambda *_: None\n"  # without the Python guard
NAMESPACES = {"network", "files", "processes"}

ATTACKS = {
    "ignores being told to stop": "import signal\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n"
                                  "    except (OSError, ValueError): pass\nwhile True: pass",
    "swallows every exception": "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "starts threads": "import _thread\nwhile True: _thread.start_new_thread(lambda: 0, ())",
    "maps memory": "import mmap\nkept = [mmap.mmap(-1, 1 << 28) for _ in range(64)]\nreturn len(kept)",
    "opens the memory of the machine": "return open('/dev/mem', 'rb').read(1)",
    "reads without end": "return len(open('/dev/zero', 'rb').read(1 << 40))",
    "reads its parent's environment": "return open(f'/proc/{os.getppid()}/environ', 'rb').read().decode()",
    "reads process 1's environment": "return open('/proc/1/environ', 'rb').read().decode()",
    "starts a program underneath": "import _posixsubprocess\nreturn _posixsubprocess.fork_exec",
    "loads a library": "import ctypes\nreturn ctypes.CDLL('libc.so.6').getpid()",
    "looks a name up": "import _socket\nreturn _socket.getaddrinfo('example.org', 80)",
    "fills the folder with files": "for i in range(10**6): open(f'f{i}', 'w').close()",
    "writes a file without end": "h = open('big', 'wb')\nwhile True: h.write(b'x' * 10**6)",
    "makes links": "os.symlink('/', 'door')\nreturn os.listdir('door')",
    "an answer without end": "x = []\nx.append(x)\nreturn x",
    "an answer of a gigabyte": "return 'x' * 10**9",
    "traces its caller": "sys.settrace(lambda *a: sys.exit(0))\nreturn open('/etc/passwd').read()",
}  # fmt: skip


# Without the Python guard these run, inside: as process 1 of a machine whose only file is the one just made.
INSIDE = {"loads a library": 1, "makes links": ["door"]}


@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "without the Python guard"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_end_and_give_nothing(attack, guarded, monkeypatch):
    if not guarded and not containment() >= NAMESPACES:
        pytest.skip("no Linux namespaces here: the Python guard is all there is")
    monkeypatch.setenv("HF_TOKEN", "hf_hunter2")
    body = "".join(f"    {line}\n" for line in ATTACKS[attack].splitlines())
    setup = "import os, sys\n" if guarded else FREE
    (answer,) = run(f"{setup}def f(x):\n{body}", "f", [[1]], QUICK).answers
    assert answer.error or (not guarded and answer.value == INSIDE.get(attack)), answer.value
    assert "hunter2" not in str(answer)


# Secrets -----------------------------------------------------------------------------------------------------------

SECRETS = {
    "WANDB_API_KEY": "a1b2c3d4e5" * 4,
    "HF_TOKEN": "hf_verysecrettoken12345",
    "ANTHROPIC_API_KEY": "sk-ant-secret-67890",
    "HUGGING_FACE_HUB_TOKEN": "hf_anothersecret999",
    "AWS_SECRET_ACCESS_KEY": "aws/secret/value",
}


@pytest.mark.parametrize("tracker", ["none", "tensorboard", "wandb"])
def test_no_secret_of_the_environment_is_in_a_run_folder_or_a_log(tmp_path, monkeypatch, capfd, tracker):
    from fakes import fake_backend

    pytest.importorskip("tensorboard") if tracker == "tensorboard" else None
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("dts.evaluation.experiment.outputs.write_charts", lambda *_: {})
    argv = ["--models", "red", "--num-samples", "1", "--num-rollouts", "2", "--output-dir", str(tmp_path), "--verbose",
            "--tracker", tracker, "--wandb-mode", "offline"]  # fmt: skip
    assert cli.main(argv, fake_backend()) == 0
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 6 and (tracker != "wandb" or any(path.suffix == ".wandb" for path in files))
    written = {path.name: path.read_bytes() for path in files}
    out, err = capfd.readouterr()
    for value in SECRETS.values():
        assert [name for name, content in written.items() if value.encode() in content] == []
        assert value not in out + err


def test_the_judges_key_is_in_no_text_and_no_file(tmp_path, monkeypatch):
    judge = Judge("http://127.0.0.1:9/v1/messages", "m", tmp_path / "cache.jsonl", SECRETS["ANTHROPIC_API_KEY"])
    assert SECRETS["ANTHROPIC_API_KEY"] not in repr(judge)
    with pytest.raises(DTSError) as caught:
        judge.compare("hi", "one", "two")
    chain, text = caught.value, ""
    while chain is not None:
        text, chain = text + str(chain), chain.__cause__ or chain.__context__
    assert SECRETS["ANTHROPIC_API_KEY"] not in text
    assert not any(SECRETS["ANTHROPIC_API_KEY"] in p.read_text() for p in tmp_path.rglob("*") if p.is_file())
