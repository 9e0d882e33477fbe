"""Names, colours, models files."""

from __future__ import annotations

import colorsys

import pytest

from dts.errors import UsageError
from dts.fetch import ITEMS
from dts.models.registry import (
    COLOR,
    HUB_ID,
    MODEL_CONFIGS,
    PALETTE,
    ModelSpec,
    color_for,
    list_models,
    read_models_file,
    resolve,
)

KNOWN = {
    "llama-7b": ("meta-llama/Llama-2-7b-hf", "#FF6B6B"),
    "llama-13b": ("meta-llama/Llama-2-13b-hf", "#4ECDC4"),
    "mistral-7b": ("mistralai/Mistral-7B-v0.1", "#95E1D3"),
    "phi-2": ("microsoft/phi-2", "#F38181"),
    "gemma-7b": ("google/gemma-7b", "#AA96DA"),
}


def test_the_known_names_keep_their_hub_ids_and_colours():
    assert {name: (MODEL_CONFIGS[name].source, MODEL_CONFIGS[name].color) for name in KNOWN} == KNOWN
    assert MODEL_CONFIGS["smollm2-135m"].kind == "package" and MODEL_CONFIGS["smollm2-135m"].source in ITEMS


def test_every_colour_is_its_own_and_can_be_told_apart():
    colors = [spec.color.upper() for spec in MODEL_CONFIGS.values()]
    assert all(COLOR.fullmatch(color) for color in [*colors, *PALETTE])
    assert len(set(colors)) == len(colors) and len(set(PALETTE)) == len(PALETTE) and not set(colors) & set(PALETTE)
    rgb = [tuple(int(color[i : i + 2], 16) for i in (1, 3, 5)) for color in colors]
    distances = [sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) ** 0.5 for x in rgb for y in rgb if x != y]
    assert min(distances) > 20  # the two reds that the old names fix are 33 apart
    assert max(colorsys.rgb_to_hls(*(c / 255 for c in color))[1] for color in rgb) < 0.8  # visible on white


def test_every_entry_is_of_a_kind_that_can_be_loaded():
    for name, spec in MODEL_CONFIGS.items():
        assert spec.name == name
        assert HUB_ID.fullmatch(spec.source) if spec.kind == "hub" else spec.source in ITEMS


def test_resolve_takes_names_folders_and_hub_ids(tmp_path, monkeypatch):
    assert resolve("phi-2") is MODEL_CONFIGS["phi-2"]
    hub = resolve("owner/some-model")
    assert hub == ModelSpec("owner/some-model", "hub", "owner/some-model", color_for("owner/some-model"))
    (tmp_path / "owner" / "local").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("owner/local").kind == "folder"
    assert resolve(str(tmp_path)).source == str(tmp_path)


def test_derived_colours_depend_on_the_name_alone():
    assert color_for("a/b") == color_for("a/b") and color_for("a/b") in PALETTE
    assert len({color_for(f"owner/model-{i}") for i in range(200)}) == len(PALETTE)
    assert color_for("llama-7b") == "#FF6B6B"


@pytest.mark.parametrize("name", ["smolm2-135m", "SmolLM2-135M"])
def test_an_unknown_name_gets_the_nearest_ones(name):
    with pytest.raises(UsageError, match=f"unknown model '{name}': did you mean smollm2-135m") as caught:
        resolve(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "./no/such/folder", "a/b/c", "has space"])
def test_names_that_are_nothing_are_refused(name):
    with pytest.raises(UsageError, match="unknown model"):
        resolve(name)


def test_a_models_file_puts_folders_behind_names(tmp_path):
    file = tmp_path / "models.yaml"
    file.write_text('llama-7b: {path: tiny}\nmine: {hub: owner/model, color: "#010203"}\n')
    specs = read_models_file(file)
    assert specs["llama-7b"] == ModelSpec("llama-7b", "folder", str(tmp_path / "tiny"), "#FF6B6B")
    assert resolve("mine", file) == ModelSpec("mine", "hub", "owner/model", "#010203")
    assert resolve("llama-7b", file).kind == "folder" and resolve("phi-2", file) is MODEL_CONFIGS["phi-2"]
    with pytest.raises(UsageError, match="did you mean mine"):
        resolve("minee", file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no models"),
        ("- a\n- b\n", "holds no models"),
        ("a: {path: [", "not valid YAML.*line 1"),
        ("a: b/c", "entry 'a': 'b/c' is not a mapping"),
        ("a: {}", "exactly one of path and hub"),
        ("a: {path: x, hub: b/c}", "exactly one of path and hub"),
        ("a: {path: x, colour: red}", "unknown key colour; allowed are path, hub and color"),
        ("a: {path: 7}", "path is 7"),
        ("a: {hub: nope}", "hub is 'nope'; give an id of the form OWNER/NAME"),
        ("a:\n  path: x\n  color: #FF6B6B\n", "color is None; give six hexadecimal digits in quotes"),
        ('a: {path: x, color: "#FFF"}', "color is '#FFF'"),
        ("a: !!python/object/apply:os.system [ls]", "not valid YAML"),
    ],
)
def test_a_bad_models_file_names_the_file_the_entry_and_the_fix(tmp_path, text, message):
    file = tmp_path / "models.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        read_models_file(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_models_file_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        resolve("phi-2", tmp_path / "none.yaml")


def test_the_table_lists_every_name_once(tmp_path):
    lines = list_models().splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(MODEL_CONFIGS)
    assert lines[6].split() == ["smollm2-135m", "package", "smollm2-135m", "#2A6FDB"]
    file = tmp_path / "models.yaml"
    file.write_text("extra: {path: here}\n")
    assert list_models(file).splitlines()[-1].startswith("extra")
