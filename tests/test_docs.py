"""The code that the documents show runs, and links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import dts
import dts.search

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.S)


def run(code: str, **names) -> dict:
    exec(compile(code, "docs", "exec"), names)  # our own pages
    return names


def test_readme(tiny_lm, monkeypatch):
    monkeypatch.setattr(dts, "load", lambda name: tiny_lm, raising=False)
    (code,) = blocks("README.md")
    result = run(code)["result"]
    assert len(result.rollouts) == 32 and result.usage.forwarded_tokens == result.usage.unique_tokens


def test_search_page_own_algorithm(tiny_lm):
    (code,) = blocks("docs/search.md")
    result = dts.decode(tiny_lm, "Once", method=run(code)["Half"](), max_new_tokens=10)
    assert len(result.rollouts) == 2 and len(result.completions) == 2
    assert result.usage.forwarded_tokens == result.usage.unique_tokens


def test_rewards_page(tiny_lm):
    functions, token_level = map(run, blocks("docs/rewards.md"))
    for reward in (functions["sunny"], functions["scores"], functions["trl"]):
        assert dts.decode(tiny_lm, "Once", method=dts.search.BestOfN(2), reward=reward, max_new_tokens=5).best
    reward = dts.CheckMonotone(token_level["CountToken"](range(4, 100)))
    result = dts.decode(tiny_lm, "Once", method=dts.search.MaxEnt(8), reward=reward, max_new_tokens=8)
    assert 0 <= result.best.reward <= 3


def test_performance_page(tiny_lm):
    from dts.search import BestOfN, MaxEnt

    (code,) = blocks("docs/performance.md")
    names = {"dts": dts, "lm": tiny_lm, "prompt": "Once", "reward": len, "MaxEnt": MaxEnt, "BestOfN": BestOfN}
    names = run(code.replace("(32)", "(3)"), **names)
    assert names["result"].usage.cached_tokens == len(names["kept"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target
