"""What mkdocs does beyond its settings: a navigation made from the files, and a site that fetches nothing.

A page that is not named here appears at the end of its section, so that a new page needs no entry.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
SECTIONS: Mapping[str, tuple[str, ...]] = {
    "Start": ("index.md", "getting-started.md", "concepts.md", "choosing.md", "footguns.md"),
    "Guides": (
        *("guide/structured.md", "guide/tuning.md", "guide/serving.md", "guide/security.md", "guide/batch.md"),
        *("guide/ray.md", "guide/compressing.md", "eval.md", "bench.md"),
        *("guide/adding-a-method.md", "guide/adding-a-model.md"),
    ),
    "Decoding": ("speculative.md", "diffusion.md", "native.md", "mini.md", "families.md"),
    "Methods": ("methods.md",),
    "Results": ("results.md", "works.md"),
    "Reference": ("api.md", "cli.md", "limits.md", "metrics.md"),
}
GROUPS: Mapping[str, str] = {
    "draft": "Drafters",
    "unmask": "Filling a canvas",
    "logits": "Forms of answers",
    "compress": "Smaller weights",
    "reduce": "Fewer visual tokens",
    "arch": "Architectures",
    "embed": "Embeddings",
    "privacy": "Privacy",
    "": "Works beside these",
}  # method folder -> its heading; "" is for pages of works that are no method
_REMARK = re.compile(r"\A<!--.*?-->\s*", re.DOTALL)
_REMOTE = re.compile(r"https://unpkg\.com/[^\"'`]+")


def nav(pages: Sequence[str], folders: Mapping[str, str]) -> list[dict[str, list[Any]]]:
    """Section -> pages of the navigation; every page of `pages` stands in it once. `folders`: slug -> method folder."""
    left = set(pages)
    out: dict[str, list[Any]] = {}
    for section, named in SECTIONS.items():
        out[section] = [page for page in named if page in left]
        left -= set(named)
    groups: dict[str, list[str]] = {}
    for page in sorted(page for page in left if page.startswith("methods/")):
        folder = folders.get(Path(page).stem, "")
        groups.setdefault(folder if folder in GROUPS else "", []).append(page)
        left.discard(page)
    out["Methods"] += [{GROUPS[folder]: groups[folder]} for folder in GROUPS if folder in groups]
    for page in sorted(left):
        out["Guides" if page.startswith("guide/") else "Reference"].append(page)
    return [{section: entries} for section, entries in out.items() if entries]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the result files that pages link to, and make the navigation."""
    from hasten.registry import modules

    for path in sorted((ROOT / "bench" / "results").glob("*.json")):
        files.append(File.generated(config, f"bench/results/{path.name}", abs_src_path=str(path)))
    folders = {slug: name.split(".")[1] for slug, name in modules().items() if name.startswith("hasten.")}
    config.nav = nav([file.src_uri for file in files.documentation_pages()], folders)
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The remark above a generated page goes, so that its heading names it; result files lie inside docs/ on the site."""
    markdown = _REMARK.sub("", markdown)
    return markdown.replace("](../bench/results/", "](bench/results/").replace("](../../bench/", "](../bench/")


def on_post_build(config: MkDocsConfig) -> None:
    """Take the addresses out of the theme's script: what they load (diagrams, an old browser's gaps) is not used here."""
    for path in (Path(config.site_dir) / "assets" / "javascripts").glob("*.js"):
        script = path.read_text(encoding="utf-8")
        path.write_text(_REMOTE.sub("data:text/javascript,", script), encoding="utf-8")
    for path in Path(config.site_dir).rglob("*.map"):
        path.unlink()
