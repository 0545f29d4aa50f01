"""The metrics of ParallelBench on made-up outputs, malformed ones too, and on anything else."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.bench.parallel import metrics, sentences

SET = {"input": ["a", "b", "c"], "word": "x"}
CASES = [
    *((metrics.same_list, '["a", "b"]', text, *wanted) for text, wanted in {
        '["a", "b"]': (1, 1), 'It is ["b"]; no: ["a", "b"].': (1, 1), "[a,b]": (1, 0), '["a","b"]': (1, 0), "a, b": (1, 0),
        '[ "a" ,  "b" ]': (1, 0), '["a", "b", "b"]': (0, 0), '["b", "a"]': (0, 0), '[["a", "b"]]': (1, 1), "": (0, 0),
        '["a", "b"': (1, 0), '["a"", "b"]': (1, 0), "]][[": (0, 0),
    }.items()),
    *((metrics.shuffled, SET, text, *wanted) for text, wanted in {
        '["b", "a", "c"]': (1, 1), '["a", "b", "c"]': (0, 0), '["b", "a"]': (0, 0), '["b", "a", "c", "c"]': (0, 0),
        '["b", "b", "c"]': (0, 0), "[c,b,a]": (1, 0), "": (0, 0), '[["c", "a", "b"]]': (1, 1),
    }.items()),
    *((metrics.inserted, SET, text, *wanted) for text, wanted in {
        '["x", "a", "b", "c"]': (1, 1), '["a", "b", "c", "x"]': (1, 1), '["a", "b", "c"]': (0, 0), "[a,x,b,c]": (1, 0),
        '["a", "x", "b", "x", "c"]': (0, 0), '["x", "b", "a", "c"]': (0, 0), "": (0, 0),
    }.items()),
    *((metrics.removed, SET, text, *wanted) for text, wanted in {
        '["a", "b"]': (1, 1), '["b", "c"]': (1, 1), '["c", "a"]': (0, 0), '["a", "a"]': (0, 0), '["a"]': (0, 0),
        '["a", "b", "c"]': (0, 0), "[a, c]": (1, 0), "": (0, 0),
    }.items()),
    *((metrics.replaced, SET, text, *wanted) for text, wanted in {
        '["x", "b", "c"]': (1, 1), '["a", "b", "x"]': (1, 1), '["a", "b", "c"]': (0, 0), '["x", "x", "c"]': (0, 0),
        '["x", "b"]': (0, 0), "[a,x,c]": (1, 0), '["x", "a", "c"]': (0, 0), "": (0, 0),
    }.items()),
    *((metrics.latin, {"symbols": ["A", "B"]}, text, *wanted) for text, wanted in {
        "A,B\nB,A": (1, 1), "A, B \n\nB,A": (1, 1), "Here:\nA,B\nB,A\nA,B": (1, 1), "A,B\nA,B": (0, 0), "A,B": (0, 0),
        "A,B,B\nB,A,A": (0, 0), "[A,B]\n[B,A]": (0, 0), "": (0, 0),
    }.items()),
    *((metrics.sudoku, "12\n21", text, *wanted) for text, wanted in {
        "12\n21": (1, 1), "1 2\n2 1": (1, 0), "1,2\n2,1": (1, 0), "12\n12": (0, 0), "12": (0, 0), "": (0, 0), " 12\n21 ": (1, 1),
    }.items()),
    *((metrics.domino, {"length": 3, "start": 12}, text, *wanted) for text, wanted in {
        '["12", "23", "30"]': (1, 1), "12 23 30": (1, 0), "[12,23,30]": (1, 0), '["12", "23"]': (0, 0), '["21", "12", "23"]': (0, 0),
        '["12", "22", "33"]': (0, 0), '["12", "2", "23"]': (0, 0), '["12", "21", "10"]': (0, 0), "": (0, 0),
        "12 23 3" + "0" * 9000: (0, 0),
    }.items()),
    *((metrics.number, "120", text, *wanted) for text, wanted in {
        "120": (1, 1), " 120\n": (1, 1), "It is 120.": (1, 0), "1,20": (1, 0), "1200": (0, 0), "-120": (0, 0), "": (0, 0),
    }.items()),
    *((metrics.same_numbers, "[1, 12]", text, *wanted) for text, wanted in {
        "[1, 12]": (1, 1), "[1,12]": (1, 0), '["1", "12"]': (1, 0), "1, 12": (1, 0), "[12, 1]": (0, 0), "": (0, 0), "[1, ]": (0, 0),
    }.items()),
    *((metrics.valid_json, "", text, *wanted) for text, wanted in {
        '{"a": 1}': (1, 1), "```json\n[1]\n```": (1, 0), "{a: 1}": (0, 0), "": (0, 0), "[" * 100_000: (0, 0), "[1,]": (0, 0),
    }.items()),
    *((sentences.sentence, {"words": ["cat", "saw"]}, text, *wanted) for text, wanted in {
        "The cat saw one dog.": (1, 1), "the cat saw one dog": (1, 0), "The  cat saw one dog.": (1, 0),
        "The cat saw.": (0, 0), "The dog saw one tree.": (0, 0), "Cat saw the dog.": (0, 0), "": (0, 0),
        "The cat saw one dog and": (0, 0), "The cat saw 1 dog.": (0, 0), "the cat saw " * 500: (0, 0),
    }.items()),
]  # fmt: skip


@pytest.mark.parametrize(("metric", "right", "text", "loose", "strict"), CASES)
def test_a_metric_reads_made_up_outputs(metric, right, text, loose, strict):
    assert (bool(metric(text, right, False)), bool(metric(text, right, True))) == (bool(loose), bool(strict))


METRICS = {
    metrics.same_list: '["a", "b"]', metrics.same_numbers: "[1, 2]", metrics.shuffled: SET, metrics.inserted: SET,
    metrics.removed: SET, metrics.replaced: SET, metrics.latin: {"symbols": ["A", "B"]}, metrics.sudoku: "12\n21",
    metrics.domino: {"length": 2, "start": 12}, metrics.number: "5", metrics.valid_json: "",
    sentences.sentence: {"words": ["cat"]},
}  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.one_of(st.text(max_size=60), st.text(alphabet='[]",abcx 12\n{}²', max_size=60)))
def test_no_text_makes_a_metric_raise_and_strict_never_takes_more(text):
    for metric, right in METRICS.items():
        loose, strict = metric(text, right, False), metric(text, right, True)
        assert loose or not strict, (metric.__name__, text)
        if not text.strip():
            assert not loose


def test_the_grammar_takes_what_it_derives_and_little_else():
    def derive(rng: Random, symbol: str) -> list[str]:
        rules = sentences.GRAMMAR.get(symbol)
        if rules is None:
            return [symbol]
        rule = rules[0] if symbol not in sentences.WORDS and rng.random() < 0.6 else rng.choice(rules)
        return [word for part in rule for word in derive(rng, part)]

    rng = Random(3)
    for _ in range(200):
        words = derive(rng, "sentence")
        if len(words) <= 64:
            assert sentences.is_sentence(words)
            at = rng.randrange(len(words))
            assert not sentences.is_sentence(words[:at] + words[at + 1 :]) or words[at] in sentences.WORDS["adjective"]
