"""`hasten eval` against transformers under the same harness, and against computations of its own."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
from chat_model import write_model

import hasten
from hasten.errors import ConfigError
from hasten.worlds import WORLDS

pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'hasten[eval]')")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
os.environ["HF_DATASETS_OFFLINE"] = "1"

CHOICES = [
    ("one two three", [" four", " nine", " and"], 0),
    ("the sky is", [" blue", " green"], 0),
    ("a b a b a", [" b", " a", " c"], 0),
    ("yes or", [" no", " yes and no"], 1),
]
TEXT = "the quick brown fox jumps over the lazy dog and runs away from all the other animals of the wood. "
METRICS = {"multiple_choice": ("acc", "acc_norm"), "generate_until": ("exact_match",)}


def write_tasks(folder: Path) -> None:
    """Three tasks of one kind each: choices, answers, whole texts longer than the window."""
    data = {
        "choose": [{"q": q, "choices": c, "gold": g} for q, c, g in CHOICES],
        "answer": [{"q": q, "a": c[g].strip()} for q, c, g in CHOICES],
        "read": [{"t": TEXT * 3}, {"t": TEXT}],
    }
    for name, rows in data.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))
    common = "dataset_path: json\ntest_split: test\ndataset_kwargs: {{data_files: {{test: {path}}}}}\ntask: {name}\n"
    kinds = {
        "choose": "output_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: '{{gold}}'\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n",
        "answer": "output_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\n"
        "generation_kwargs: {until: ['.', 'zzz'], max_gen_toks: 6, do_sample: false}\nmetric_list: [{metric: exact_match}]\n",
        "read": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{t}}'\n"
        "metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}]\n",
    }
    for name, rest in kinds.items():
        path = folder / f"{name}.json"
        (folder / f"{name}.yaml").write_text(common.format(path=path, name=name) + rest)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_model(tmp_path_factory.mktemp("model"), window=64)
    for name, more in (
        ("config.json", {"eos_token_id": 1, "architectures": ["LlamaForCausalLM"]}),
        ("tokenizer_config.json", {"eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}),
    ):
        facts = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**facts, **more}))
    return folder


def requests(texts, kind="loglikelihood"):
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=given, idx=i) for i, given in enumerate(texts)]


PAIRS = [(q, c) for q, choices, _ in CHOICES for c in choices] + [("", "the sky"), (TEXT * 2, " over")]


def test_scores_equal_those_of_transformers(model, tasks):
    pytest.importorskip("accelerate", reason="lm-eval's own transformers model needs accelerate")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from hasten.bench.harness import Harness, evaluate

    ours = Harness(hasten.load(model, backbone="torch", dtype="float32"))
    theirs = HFLM(pretrained=str(model), tokenizer=str(model), dtype="float32", device="cpu", batch_size=3)
    for (a, first), (b, second) in zip(ours.loglikelihood(requests(PAIRS)), theirs.loglikelihood(requests(PAIRS))):
        assert a == pytest.approx(b, abs=1e-4)
        assert first == second
    found = evaluate(ours, ["choose", "answer", "read"], include_path=str(tasks))["tasks"]
    other = simple_evaluate(
        theirs,
        tasks=["choose", "answer", "read"],
        task_manager=TaskManager(include_path=str(tasks)),
        log_samples=False,
        verbosity="ERROR",
    )["results"]
    for task, row in found.items():
        for key, value in row.items():
            if isinstance(value, float) and "stderr" not in key:
                assert value == pytest.approx(other[task][key], rel=1e-4), (task, key)


def test_how_many_run_together_changes_no_score(model, tasks):
    from hasten.bench.harness import Harness

    judge = Harness(hasten.load(model))
    together = judge.loglikelihood(requests(PAIRS))
    assert together == [judge.loglikelihood(requests([pair]))[0] for pair in reversed(PAIRS)][::-1]
    asked = [(q, {"until": ["zz"], "max_gen_toks": 5, "do_sample": True, "temperature": 0.8}) for q, _ in PAIRS if q]
    answers = judge.generate_until(requests(asked, "generate_until"))
    assert answers == [judge.generate_until(requests([one], "generate_until"))[0] for one in asked]
    assert len(set(answers)) > 1


def test_a_masked_model_is_scored_by_its_bound():
    from hasten.bench.harness import Harness

    llm = hasten.load("mini-dlm")
    judge = Harness(llm, samples=32, greedy=True)
    world = WORLDS["reverse"]
    sample = world.generate(random.Random(4), world.difficulty(6))
    wrong = sample.answer[::-1]
    assert wrong != sample.answer
    (good, _), (bad, fails) = judge.loglikelihood(requests([(sample.prompt, sample.answer), (sample.prompt, wrong)]))
    assert bad + 3 < good <= 0
    assert not fails
    own = llm.generate(sample.prompt, method="plain", max_tokens=6, ignore_eos=True)
    assert judge._one(llm.encode(sample.prompt), list(own.tokens))[1]
    again = Harness(llm, samples=32).loglikelihood(requests([(sample.prompt, wrong), (sample.prompt, sample.answer)]))
    assert [value for value, _ in again] == [bad, good]


def test_a_method_decodes_the_answers(model):
    from hasten.bench.harness import Harness

    asked = [("the quick brown", {"until": [], "max_gen_toks": 24})]
    plain = Harness(hasten.load(model), method="plain").generate_until(requests(asked, "generate_until"))
    assert Harness(hasten.load(model), method="prompt-lookup").generate_until(requests(asked, "generate_until")) == plain


def test_wrong_requests_are_refused(model, tasks):
    from hasten.bench.harness import Harness, evaluate

    judge = Harness(hasten.load(model))
    with pytest.raises(ConfigError, match="no_such"):
        evaluate(judge, ["no_such"])
    with pytest.raises(ConfigError, match="beam"):
        judge.generate_until(requests([("a", {"beam": 3})], "generate_until"))
    with pytest.raises(ConfigError, match="samples"):
        Harness(judge.llm, samples=0)


def test_what_does_not_fit_is_cut_on_the_left_and_counted(model):
    from hasten.bench.harness import Harness

    judge = Harness(hasten.load(model))
    judge.loglikelihood(requests([(TEXT * 2, " over")]))
    assert judge.cut == 1
