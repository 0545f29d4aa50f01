"""Writes the pages that are made from the code: `make docs`. A test checks that the committed pages are current.

cli.md, limits.md, metrics.md, works.md, families.md and results.md are written whole, and the figures that need no model.
In methods/<slug>.md the block between the two card marks, in the README the table between the two bench marks, in mini.md
what the cards of the small models say, and in choosing.md and methods.md the tables, are written; the rest of the page is
the author's.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import typer

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))  # choosing.py, families.py and figures.py, also for a test that loads this file by its path
NOTE = "<!-- Made by docs/generate.py; change the code and run `make docs`. -->"
CARD = re.compile(r"<!-- card -->.*?<!-- /card -->", re.DOTALL)
BENCH = re.compile(r"<!-- bench:plain -->.*?<!-- /bench:plain -->", re.DOTALL)
KERNELS = re.compile(r"<!-- bench:kernels -->.*?<!-- /bench:kernels -->", re.DOTALL)
CURVES = re.compile(r"<!-- bench:curves -->.*?<!-- /bench:curves -->", re.DOTALL)
KEYWORDS = re.compile(r"<!-- keywords -->.*?<!-- /keywords -->", re.DOTALL)
MINIS = re.compile(r"<!-- minis -->.*?<!-- /minis -->", re.DOTALL)
CANVAS = re.compile(r"<!-- bench:canvas -->.*?<!-- /bench:canvas -->", re.DOTALL)
SPEC = re.compile(r"<!-- bench:spec -->.*?<!-- /bench:spec -->", re.DOTALL)
TABLE = re.compile(r"<!-- table:(\w+) -->.*?<!-- /table:\w+ -->", re.DOTALL)
ROOT = DOCS.parent


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table; bars inside cells are escaped."""
    import choosing

    return choosing.table(head, rows)


def _row(parameter: inspect.Parameter, hint: Any) -> tuple[str, str, str]:
    """Name, default and help of one argument or option, from its annotation and default in the command's function."""
    kind, info = get_args(hint)
    words = str(info.help).replace("<", "&lt;")
    if isinstance(info, typer.models.ArgumentInfo):
        name = parameter.name.upper()
        return f"`{name}`" if parameter.default is parameter.empty else f"`[{name}]`", "", words
    name = info.param_decls[0] if info.param_decls else "--" + parameter.name.replace("_", "-")
    if kind is bool:
        return f"`{name}`", "", words
    kinds = [k for k in (kind, *get_args(kind)) if k in (int, float, str)]
    value = "TEXT" if not kinds or kinds[0] is str else "INTEGER" if kinds[0] is int else "NUMBER"
    default = "" if parameter.default in (None, "", parameter.empty) else f"`{parameter.default}`"
    return f"`{name} {value}`", default, words


def cli() -> str:
    """docs/cli.md: every command with its arguments and options."""
    from hasten.cli import app

    parts = [NOTE, "# The command line", str(app.info.help)]
    parts.append(
        "`hasten [--version] [--debug] COMMAND ...`; exit code 0 is success, 2 a wrong request, 1 another failure."
    )
    for command in app.registered_commands:
        function: Any = command.callback
        hints = get_type_hints(function, include_extras=True)
        parameters = inspect.signature(function).parameters
        rows = [_row(one, hints[name]) for name, one in parameters.items() if hints[name] is not typer.Context]
        arguments = [row[0].strip("`") for row in rows if not row[0].startswith("`--")]
        title = " ".join([f"## hasten {command.name}", *arguments])
        parts += [title, inspect.getdoc(function) or "", table(("option", "default", "meaning"), rows)]
    return "\n\n".join(parts) + "\n"


def limits() -> str:
    """docs/limits.md: every bound with its default, unit and reason."""
    from hasten.engine.limits import LIMITS

    rows = [(f"`{name}`", f"{value:,}", unit, why) for name, value, unit, why in LIMITS.rows_for_people()]
    text = (
        "Bounds on what a request or a file may ask for refuse it, naming the field, the value and the bound. Bounds on "
        "the work of one step (rows, prefill_chunk, step_tokens, draft_nodes, cache_share) only shape how it runs."
    )
    return "\n\n".join([NOTE, "# Limits", text, table(("limit", "default", "unit", "reason"), rows)]) + "\n"


def metrics() -> str:
    """docs/metrics.md: every metric of the server with its kind, labels and meaning."""
    from hasten.serve.metrics import SPECS

    rows = [(f"`{s.name}`", s.kind, ", ".join(f"`{label}`" for label in s.labels), s.help) for s in SPECS]
    text = (
        "What `GET /metrics` of `hasten serve` tells, in Prometheus' text format or as OpenMetrics, whichever is asked "
        "for; with keys set it needs one. Values of labels come from this server, never from a caller. "
        "[Serving](guide/serving.md#metrics-and-logs) has a scrape example and queries."
    )
    return "\n\n".join([NOTE, "# Metrics", text, table(("metric", "kind", "labels", "meaning"), rows)]) + "\n"


def card(slug: str) -> str:
    """The facts of a method's card as the block of its page, and what its kept result says."""
    import choosing

    from hasten.registry import card

    facts, result = card(slug), choosing.kept(slug)
    paper = f"arXiv {facts.paper}, " if facts.paper else ""
    lines = [
        f"**{facts.title}** ({paper}{facts.date}). Plugs into `{facts.plugs_into}`; {facts.exactness}.",
        f"**Claim**: {facts.claim}",
        f"**Does not help**: {facts.no_help}",
        *([f"**Measured here**: [{result}](../results.md#{slug})."] if result else []),
        *([f"**Needs from the model**: {', '.join(facts.needs)}."] if facts.needs else []),
        *([f"**Cannot be combined with**: {', '.join(facts.conflicts)}."] if facts.conflicts else []),
        *([table(("setting", "meaning"), [(f"`{k}`", v) for k, v in facts.knobs.items()])] if facts.knobs else []),
    ]
    return "<!-- card -->\n" + "\n\n".join(lines) + "\n<!-- /card -->"


def works() -> str:
    """docs/works.md: the published works by folder, with what each claims and its state in this version."""
    from hasten.registry import works

    parts = [NOTE, "# The works"]
    parts.append(
        "54 papers, 55 methods (one paper holds two). *exact*: the text, or its distribution, is that of plain decoding; "
        "*lossy*: faster or smaller at a measured price; *model*: a model, training recipe or measurement of its own. "
        "`hasten methods WORDS` searches this list."
    )
    folders = dict.fromkeys(work.folder for work in sorted(works(), key=lambda work: work.folder))
    for folder in folders:
        rows = [
            (
                f"`{work.slug}`",
                work.state,
                work.exactness,
                f"{work.claim}<br>[{work.title}](https://arxiv.org/abs/{work.paper}), {work.date}",
            )
            for work in works()
            if work.folder == folder
        ]
        parts += [f"## {folder}", table(("method", "state", "exactness", "what it does, and the paper"), rows)]
    return "\n\n".join(parts) + "\n"


def results() -> str:
    """docs/results.md: what came out of every reproduction whose result is kept, and the works that have none."""
    from hasten.bench import report
    from hasten.bench.reproduce import find, slugs
    from hasten.registry import works

    kept = {path.stem: report.read(path) for path in sorted((DOCS / "results").glob("*.json"))}
    parts = [NOTE, "# Results"]
    parts.append(
        "What `hasten reproduce SLUG` gave for the works of this version: the claim, what came out here, and where it does "
        "not help. Each ran baseline and method side by side in one process, in turn, for several seeds; figures are "
        "medians over seeds with the least and the greatest. They are of small models on the machine named, and show the "
        "direction of a claim, not its size."
    )
    for slug, one in kept.items():
        extra, about = one.extra, one.machine
        speed = "not timed" if one.speedup is None else f"{one.speedup}x the speed of the baseline"
        verdict = "came out as claimed" if one.direction_holds else "**fell short of the claim**"
        lines = [
            f"- Claim: {one.claim}",
            f"- Tried here: {find(slug).claim_checked}",
            f"- Measured here: {verdict}; {speed}.",
            f"- {str(extra.get('quality_is', 'quality')).capitalize()}: baseline {one.quality['baseline']}, method "
            f"{one.quality['method']}.",
            f"- Where it does not help: {one.no_help}",
            *([f"- Note: {extra['note']}"] if "note" in extra else []),
        ]
        parts += [f"## {slug}", "\n".join(lines)]
        if extra.get("bars"):
            rows = [(bar["label"], f"{bar['median']:.2f} ({bar['min']:.2f}-{bar['max']:.2f})") for bar in extra["bars"]]
            parts.append(table(("", str(extra["bars_of"]).replace("_", " ")), rows))
        short = " A quick run: few prompts, wide spread." if extra.get("quick") else ""
        plot = f", [plot](results/{slug}.html)" if (DOCS / "results" / f"{slug}.html").is_file() else ""
        seeds, commit = ", ".join(map(str, one.seeds)), about.get("commit") or "unknown"
        parts.append(
            f"{about['threads']} threads of {about['cpu']}, torch {about['torch']}, commit {commit}, "
            f"{about.get('date', '')}, seeds {seeds}, {one.seconds:.0f} s.{short} "
            f"[Result file](results/{slug}.json){plot}."
        )
    waiting = [slug for slug in slugs() if slug not in kept]
    if waiting:
        text = "These have a reproduction that anyone can run, and no result kept here: "
        parts += ["## Not run yet", text + ", ".join(f"`{slug}`" for slug in waiting) + "."]
    rest = [(f"`{work.slug}`", work.state, work.title) for work in works() if work.slug not in (*kept, *waiting)]
    parts += [
        "## Not reproduced",
        "Works of the list without a reproduction in this version.",
        table(("work", "state", "title"), rest),
    ]
    return "\n\n".join(parts) + "\n"


def bench() -> str:
    """The README's table of measured figures, from bench/results/plain.json."""
    result = json.loads((ROOT / "bench" / "results" / "plain.json").read_text(encoding="utf-8"))
    about = result["machine"]

    def cell(figures: dict[str, float], unit: str = "") -> str:
        return f"{figures['median']:g}{unit} ({figures['min']:g}-{figures['max']:g})"

    rows: list[tuple[str, ...]] = []
    for kind in ("float32", "bfloat16"):
        one = result[kind]
        inside = one["per_token"]
        rows.append(
            (
                kind,
                cell(one["hasten_tokens_per_s"]),
                cell(one["transformers_sdpa_tokens_per_s"]),
                cell(one["ratio_sdpa"], "x"),
                cell(one["ratio_eager"], "x"),
                cell(one["prompt_ratio_sdpa"], "x"),
                f"{inside['hasten_outside_ms']:g} / {inside['transformers_outside_ms']:g} ms",
                one["same_greedy_tokens"],
            )
        )
    head = (
        *("precision", "hasten, tokens/s", "transformers, tokens/s", "ratio", "ratio to its eager attention"),
        *("reading a prompt of 512", "outside linear layers, per token", "same greedy tokens"),
    )
    text = (
        f"Plain decoding of smollm2-135m against transformers' `generate` on the same weights: batch 1, greedy, "
        f"{result['tokens']} new tokens, medians of {result['rounds']} alternating rounds (range in brackets), "
        f"{about['threads']} threads of {about['cpu']}, torch {about['torch']}, transformers {about['transformers']}, "
        f"{about['date']}; `python bench/plain.py` repeats it ([result file](bench/results/plain.json))."
    )
    return f"<!-- bench:plain -->\n{text}\n\n{table(head, rows)}\n<!-- /bench:plain -->"


def _kernel_results() -> dict[str, dict[str, Any]]:
    """Model -> result of `hasten bench --suite kernels`, for every file that is kept."""
    files = sorted((ROOT / "bench" / "results").glob("kernels-*.json"))
    return {path.stem.removeprefix("kernels-"): json.loads(path.read_text(encoding="utf-8")) for path in files}


def _spread(figures: dict[str, float], unit: str = "") -> str:
    return f"{figures['median']:g}{unit} ({figures['min']:g}-{figures['max']:g})"


def kernels() -> str:
    """The summary of bench/results/kernels-*.json: speed against llama.cpp on the same files."""
    rows = []
    about: dict[str, Any] = {}
    for name, result in _kernel_results().items():
        about = result["machine"]
        for mode in ("exact", "int8"):
            race, curve = result[f"race, hasten {mode}"], result[f"hasten {mode}"]
            llama = [one for peer, one in race.items() if peer.startswith("llama.cpp")]
            best = min(llama, key=lambda one: one["first_over_this"]["median"]) if llama else None
            rows.append(
                (
                    name,
                    mode,
                    _spread(race[f"hasten {mode}"]["tokens_per_s"]),
                    _spread(best["tokens_per_s"]) if best else "",
                    _spread(best["first_over_this"], "x") if best else "",
                    str(curve["prompt_tokens_per_s"]),
                    f"{curve['ratio_to_one']['8']:g}x",
                )
            )
    text = (
        "Plain decoding on the native stack against llama.cpp (through llama-cpp-python; flash attention on or off, "
        "whichever is faster) on the same file: batch 1, greedy, medians of alternating rounds (range in brackets), "
        f"{about['threads']} threads of {about['cpu']}, {about['date']}; `hasten bench MODEL --suite kernels` repeats it "
        "([result files](bench/results))."
    )
    head = ("file", "activations", "hasten, tokens/s", "llama.cpp, tokens/s", "ratio", "prompt tokens/s", "8 tokens cost")
    return f"<!-- bench:kernels -->\n{text}\n\n{table(head, rows)}\n<!-- /bench:kernels -->"


def curves() -> str:
    """The details of bench/results/kernels-*.json: bytes per second, t(T), share of time, loading."""
    parts = []
    for name, result in _kernel_results().items():
        rows = []
        for mode in ("exact", "int8"):
            one = result[f"hasten {mode}"]
            rows.append(
                (
                    mode,
                    f"{one['short_context_ms']:.2f} ms",
                    f"{one['gb_per_s']} GB/s ({one['share_of_bandwidth']:.0%})",
                    ", ".join(f"{n}: {v:g}" for n, v in one["ratio_to_one"].items() if n != "1"),
                    ", ".join(f"{part} {share:.0%}" for part, share in one["share_of_time"]["1"].items()),
                    f"{one['canvas_256_ms']:g} / {one['block_32_ms']:g} ms = {one['canvas_over_block']:g}x",
                )
            )
        head = ("activations", "one token, context 64", "of read bandwidth", "t(T) / t(1), context 256", "share of time",
                "canvas of 256 / cached block of 32")  # fmt: skip
        loading = result.get("loading")
        about = f"{result['weight_mb']} MB of weights are read per token; the machine reads {result['read_gb_per_s']} GB/s."
        if loading:
            about += (
                f" Repacking takes {loading['repack_s']:.2f} s; from load to the first token, packed before, "
                f"{loading['load_to_first_token_s']:.2f} s."
            )
        parts.append(f"**{name}**, {result['isa']}. {about}\n\n{table(head, rows)}")
    return "<!-- bench:curves -->\n" + "\n\n".join(parts) + "\n<!-- /bench:curves -->"


def spec() -> str:
    """The tables of bench/results/spec.json: speed by task group and method, and what passes cost."""
    result = json.loads((ROOT / "bench" / "results" / "spec.json").read_text(encoding="utf-8"))
    about = result["machine"]
    rows: list[tuple[str, ...]] = []
    costs: list[str] = []
    for kind in result["setups"]:
        for group, methods in result[kind].items():
            if group == "pass_ms":
                costs.append(f"{kind}: " + ", ".join(f"{n} tokens {ms:g} ms" for n, ms in methods.items()))
                continue
            for name, one in methods.items():
                if name == "plain":
                    continue

                def cell(ratio: dict[str, float]) -> str:
                    return f"{ratio['mean']:.2f}x ({ratio['low']:.2f}-{ratio['high']:.2f})"

                per_pass = f"{one['tokens_per_pass']:.2f}" if "tokens_per_pass" in one else ""
                cost = f"{one['pass_cost']:.2f}" if "pass_cost" in one else ""
                speeds = (cell(one["decode_ratio"]), cell(one["total_ratio"]))
                llama = cell(one["over_llama"]) if "over_llama" in one else ""
                rows.append((kind, group, f"`{name}`", per_pass, cost, *speeds, llama, one["same_text"]))
    text = (
        f"smollm2-135m, greedy, batch 1, {result['prompts_per_group']} prompts in each of six groups, {result['tokens']} "
        f"new tokens, {about['threads']} threads of {about['cpu']}, {about['date']}; `python bench/spec.py` repeats it "
        "([result file](../bench/results/spec.json)). Speed is plain decoding's time divided by the method's, for "
        "decoding alone and for the whole request with its prompt: mean over prompts, quartiles in brackets. "
        "A pass costs as many times plain decoding's as said. The peers are transformers' `generate` on the same weights"
    )
    if any(name.startswith("llama.cpp") for kind in result["setups"] for name in result[kind]["all"]):
        version = about.get("llama-cpp-python", "")
        text += f" and llama.cpp ({f'llama-cpp-python {version}'.strip()}) on the same file, whose 4-bit weights it uses"
    text += "."
    head = (
        "setup",
        "task",
        "method",
        "tokens per pass",
        "pass cost",
        "decoding",
        "whole request",
        "decoding, over llama.cpp's plain",
        "same text as plain",
    )
    passes = "Passes, as the engine measured them. " + "; ".join(costs) + "."
    return f"<!-- bench:spec -->\n{text}\n\n{table(head, rows)}\n\n{passes}\n<!-- /bench:spec -->"


def canvases() -> str:
    """The tables of bench/results/canvas*.json: what presets and baselines of canvas decoding cost and get right."""
    parts = ["<!-- bench:canvas -->"]
    for path in sorted((ROOT / "bench" / "results").glob("canvas*.json"), key=lambda path: len(path.name)):
        result = json.loads(path.read_text(encoding="utf-8"))
        about, rows = result["machine"], []
        for canvas, arms in result["canvases"].items():
            for name, one in arms.items():
                methods = ", ".join(f"`{method}`" for method in result["arms"][name])
                worlds = ", ".join(f"{world} {figures['speedup']:.1f}x" for world, figures in one["worlds"].items())
                cells = (_spread(one["accuracy"]), _spread(one["nfe"]), _spread(one["speedup"], "x"))
                rows.append((canvas, f"{name} ({methods})", *cells, worlds))
        parts += [
            f"{result['model']}, greedy, batch 1, unseen tasks of three seeds, every answer verified; medians over seeds "
            f"(range in brackets), {about['threads']} threads of {about['cpu']}, {about['date']}; "
            f"`python bench/canvas.py --model {result['model']}` repeats it "
            f"([result file](../bench/results/{path.name})). Speed is the wall time of the one-token reference sampler"
            f"{'' if result.get('exact_cache') else ' without a cache'} divided by the arm's, over whole requests.",
            table(("canvas", "methods", "right, percent", "forwards per answer", "speed", "by world"), rows),
        ]
    return "\n\n".join([*parts, "<!-- /bench:canvas -->"])


def minis() -> str:
    """The cards of the models that come with the package: how they were trained, exact answers, calibration."""
    from hasten.models.catalog import MINI

    parts = []
    for path in sorted(MINI.glob("*/card.json")):
        one = json.loads(path.read_text(encoding="utf-8"))
        if "dparallel" in one:
            parts += certain(one)
            continue
        worlds, levels = one["exact_match"]["worlds"], one["calibration"]["levels"]
        canvases = list(dict.fromkeys(canvas for row in worlds.values() for canvas in row))
        rows = [
            (name, *(f"{row[c]['exact']:g} ({row[c]['samples']})" if c in row else "" for c in canvases))
            for name, row in worlds.items()
        ]
        facts = (
            f"**{one['name']}**: {one['summary']}. {one['parameters']:,} parameters, seed {one['training']['seed']}, "
            f"{one['steps_done']} steps, {one['tokens_seen'] / 1e6:.1f} million tokens, {one['minutes']:g} minutes. "
        )
        parts += [
            (facts + one.get("note", "")).strip(),
            f"Exact answers in percent, and the number of samples, by canvas ({one['exact_match']['how']}):",
            table(("world", *canvases), rows),
            f"Calibration ({one['calibration']['how']}): "
            + ", ".join(f"{level}: error {v['ece']:g}, right {v['right']:.0%}" for level, v in levels.items())
            + ".",
        ]
    return "\n\n".join(["<!-- minis -->", *parts, "<!-- /minis -->"])


def certain(card: dict[str, Any]) -> list[str]:
    """What a model that was trained to be certain gained: right answers and forwards by threshold, before and after."""
    one, trained, answers = card["dparallel"], card["training"], card["answers"]
    facts = (
        f"**{card['name']}**: {card['summary']}. {card['parameters']:,} parameters, begun with {card['started_from']}, "
        f"seed {trained['seed']}, {trained['steps']} steps on its own answers, {answers['right']:,} right ones of "
        f"{answers['asked']:,}, {card['minutes']:g} minutes. Its threshold is {one['tau']:g} nats ({one['how']})."
    )
    rows = [("one token per step", one["one_token_per_step"], None)]
    rows += [(f"{float(tau):g}", row, one["by_tau_after"][tau]) for tau, row in one["by_tau_before"].items()]
    cells = [(name, *(f"{r['accuracy']:g} % in {r['nfe']:g}" if r else "" for r in pair)) for name, *pair in rows]
    return [
        facts,
        "Right answers and forwards per answer, by threshold in nats:",
        table(("nats", "before", "after"), cells),
    ]


def keywords() -> str:
    """The tables of JSON-schema keywords in docs/methods/grammar.md."""
    from hasten.logits._keywords import ANNOTATIONS, ENFORCED, REFUSED

    fates = (("enforced", ENFORCED), ("no effect", ANNOTATIONS), ("refused", REFUSED))
    rows: list[tuple[str, ...]] = [(f"`{word}`", fate, text) for fate, of in fates for word, text in of.items()]
    listed = table(("keyword", "fate", "how far it is enforced, or what to use instead"), rows)
    return f"<!-- keywords -->\n{listed}\n<!-- /keywords -->"


def tables(path: Path) -> str:
    """A page with its tables as they are now."""
    import choosing

    def fresh(match: re.Match[str]) -> str:
        return f"<!-- table:{match[1]} -->\n{choosing.TABLES[match[1]]()}\n<!-- /table:{match[1]} -->"

    return TABLE.sub(fresh, path.read_text(encoding="utf-8"))


def pages() -> dict[Path, str]:
    """Path -> text of every page, or part of a page, that is made from the code."""
    import families
    import figures

    from hasten.registry import modules

    made = {
        DOCS / "cli.md": cli(),
        DOCS / "limits.md": limits(),
        DOCS / "metrics.md": metrics(),
        DOCS / "works.md": works(),
        DOCS / "families.md": families.page(NOTE, table),
        DOCS / "results.md": results(),
    }
    against_llama, against_transformers, details = kernels(), bench(), curves()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    made[ROOT / "README.md"] = KERNELS.sub(lambda match: against_llama, readme)
    native = (DOCS / "native.md").read_text(encoding="utf-8")
    native = BENCH.sub(lambda match: against_transformers.replace("](bench/", "](../bench/"), native)
    made[DOCS / "native.md"] = CURVES.sub(lambda match: details, native)
    for slug, module in modules().items():
        if not module.startswith("hasten."):
            continue  # a third party's method has its page elsewhere
        path = DOCS / "methods" / f"{slug}.md"
        text = path.read_text(encoding="utf-8") if path.is_file() else f"# {slug}\n\n<!-- card --><!-- /card -->\n"
        block = card(slug)
        made[path] = CARD.sub(lambda match, block=block: block, text)
    path, words = DOCS / "methods" / "grammar.md", keywords()
    made[path] = KEYWORDS.sub(lambda match: words, made[path])
    path, cards = DOCS / "mini.md", minis()
    made[path] = MINIS.sub(lambda match: cards, path.read_text(encoding="utf-8"))
    path, filled = DOCS / "diffusion.md", canvases()
    made[path] = CANVAS.sub(lambda match: filled, path.read_text(encoding="utf-8"))
    path, compared = DOCS / "speculative.md", spec()
    made[path] = SPEC.sub(lambda match: compared, path.read_text(encoding="utf-8"))
    return made | {path: tables(path) for path in (DOCS / "choosing.md", DOCS / "methods.md")} | figures.drawn()


def main() -> None:
    """Write what has changed and name it."""
    for path, text in pages().items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path.relative_to(DOCS.parent)}")


if __name__ == "__main__":
    main()
