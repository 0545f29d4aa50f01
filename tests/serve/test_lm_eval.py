"""lm-evaluation-harness, unmodified, against the server: its `local-completions` model runs two tasks end to end."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_model import write_model
from official import Served, load, serving

import hasten
from hasten.llm import LLM

pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'hasten[eval]')")
pytest.importorskip("tenacity", reason="lm-eval cannot use servers (pip install 'lm-eval[api]')")
pytestmark = pytest.mark.slow

COUNT = 24
COLOURS = {"snow": "white", "blood": "red", "grass": "green", "coal": "black", "the sea": "blue", "a banana": "yellow"}
STOPS = ["\n", "."]


def documents(seed: int = 5) -> list[dict[str, Any]]:
    """Questions with choices, and sums shown by example: what both tasks are made of."""
    r, out = random.Random(seed), []
    for i in range(COUNT):
        thing, colour = r.choice(list(COLOURS.items()))
        choices = r.sample([c for c in COLOURS.values() if c != colour], 3)
        choices.insert(gold := r.randrange(4), colour)
        shown = "".join(f"{a} + {b} = {a + b}\n" for a, b in ((r.randrange(9), r.randrange(9)) for _ in range(3)))
        a, b = r.randrange(9), r.randrange(9)
        out.append(
            {
                "question": f"Question {i}: what is the colour of {thing}?\nAnswer:",
                "choices": choices,
                "gold": gold,
                "sum": f"{shown}{a} + {b} =",
                "total": str(a + b),
            }
        )
    return out


def write_tasks(folder: Path) -> None:
    """Two tasks in lm-eval's own form, over a local file."""
    (folder / "data.json").write_text(json.dumps(documents()))
    common = f"dataset_path: json\ntest_split: test\ndataset_kwargs: {{data_files: {{test: {folder / 'data.json'}}}}}\n"
    (folder / "colours.yaml").write_text(
        f"task: colours\n{common}output_type: multiple_choice\ndoc_to_text: '{{{{question}}}}'\n"
        "doc_to_choice: '{{choices}}'\ndoc_to_target: '{{gold}}'\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    (folder / "sums.yaml").write_text(
        f"task: sums\n{common}output_type: generate_until\ndoc_to_text: '{{{{sum}}}}'\ndoc_to_target: '{{{{total}}}}'\n"
        f"generation_kwargs: {{until: {json.dumps(STOPS)}, max_gen_toks: 8, do_sample: false}}\n"
        "metric_list: [{metric: exact_match, ignore_punctuation: true}]\n"
        "filter_list: [{name: strict, filter: [{function: regex, regex_pattern: '(-?[0-9]+)'}, {function: take_first}]}]\n"
    )


@pytest.fixture(scope="module", params=["tiny", "smollm2"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LLM, Served, Path]]:
    """A model, a server of the same weights, and a folder with its tokenizer as transformers reads it."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "tiny":
        write_model(folder, window=1024)
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
        own, served = load(folder), load(folder)
    else:
        path = request.getfixturevalue("smollm2_gguf")
        own, served = (hasten.load(path, cache_bytes=200_000_000) for _ in range(2))
        own.tokenizer._fast.save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with serving({"served": served}) as running:
        yield own, running, folder


def harness(server: Served, tokenizer: Path, tasks: Path, out: Path, **arguments: Any) -> dict[str, Any]:
    """What the command `lm_eval` writes: results, and samples by task."""
    how = {
        "model": "served",
        "base_url": f"{server.base}/v1/completions",
        "tokenizer": tokenizer,
        "num_concurrent": 4,
        "max_retries": 1,
        **arguments,
    }
    command = [
        *(sys.executable, "-m", "lm_eval", "--model", "local-completions", "--tasks", "colours,sums"),
        *("--model_args", ",".join(f"{name}={value}" for name, value in how.items())),
        *("--include_path", str(tasks), "--output_path", str(out), "--log_samples", "--batch_size", "3"),
    ]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(out / "hf")}
    done = subprocess.run(command, env={**os.environ, **offline}, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = out.rglob("results_*.json")
    samples = {}
    for task in ("colours", "sums"):
        (path,) = out.rglob(f"samples_{task}_*.jsonl")
        samples[task] = sorted(map(json.loads, path.read_text().splitlines()), key=lambda one: one["doc_id"])
    return {"results": json.loads(results.read_text())["results"], "samples": samples}


def test_two_tasks_give_the_scores_that_the_library_gives(case: tuple[LLM, Served, Path], tmp_path: Path) -> None:
    llm, server, tokenizer = case
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    write_tasks(tasks)
    found = harness(server, tokenizer, tasks, tmp_path / "out")
    right, right_norm, exact = [], [], []
    for doc, choice, answer in zip(documents(), found["samples"]["colours"], found["samples"]["sums"], strict=True):
        head = llm.encode(doc["question"])
        totals, greedy = [], []
        for colour in doc["choices"]:
            tail = llm.encode(f"{doc['question']} {colour}")[len(head) :]
            score = llm.score(head, tail)
            totals.append(score.total)
            greedy.append(llm.generate(head, max_tokens=len(tail), temperature=0, ignore_eos=True).tokens == tuple(tail))
        logs = [float(one[0][0]) for one in choice["resps"]]
        assert logs == pytest.approx(totals, abs=1e-4)
        assert [str(one[0][1]) == "True" for one in choice["resps"]] == greedy
        right.append(totals.index(max(totals)) == doc["gold"])
        normed = [total / len(colour) for total, colour in zip(totals, doc["choices"], strict=True)]
        right_norm.append(normed.index(max(normed)) == doc["gold"])
        text = llm.generate(doc["sum"], max_tokens=8, temperature=0, stop=STOPS).text
        assert answer["resps"] == [[text]]
        exact.append(next(iter(_numbers(text)), "") == doc["total"])
    colours, sums = found["results"]["colours"], found["results"]["sums"]
    assert colours["acc,none"] == pytest.approx(sum(right) / COUNT, abs=1e-4)
    assert colours["acc_norm,none"] == pytest.approx(sum(right_norm) / COUNT, abs=1e-4)
    assert sums["exact_match,strict"] == pytest.approx(sum(exact) / COUNT, abs=1e-4)


def _numbers(text: str) -> list[str]:
    return re.findall(r"-?[0-9]+", text)
