"""`hasten run --batch` without Ray: what it reads, what it refuses, and that a cut run ends as an uncut one."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from chat_model import write_model

import hasten
from hasten.errors import ConfigError, FormatError
from hasten.serve.batch import run_batch
from hasten.serve.batch.answering import AHEAD
from hasten.serve.batch.lines import _LINE_BYTES, LineError, parse, read, survey
from hasten.serve.batch.results import Results, note_path
from hasten.serve.batch.workers import stretches

LOAD = {"dtype": "auto", "weights": "stored"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("tiny")))


def chat(id: str, text: str, **more) -> dict:
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 6, **more}
    return {"custom_id": id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def write(path: Path, rows: list) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def run(model: str, source: Path, out: Path, **more):
    opened = []

    def open_model():
        opened.append(1)
        return hasten.load(model)

    summary = run_batch(model, source, out, name="tiny", open_model=open_model, load=LOAD, **more)
    return summary, bool(opened)


def rows(out: Path) -> dict[str, dict]:
    """Output lines by id, each of which is there once."""
    found = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert len({row["custom_id"] for row in found}) == len(found)
    return {row["custom_id"]: row for row in found}


def meaning(out: Path) -> dict[str, object]:
    """What the answers say, without the names and times of when they were made."""
    kept = {}
    for id, row in rows(out).items():
        body = (row["response"] or {}).get("body", {})
        kept[id] = (row["id"], row["error"], [body.get(key) for key in ("choices", "data", "usage", "error")])
    return kept


def test_answers_are_those_of_the_server_in_openai_s_output_format(model, tmp_path):
    source = write(
        tmp_path / "in.jsonl",
        [
            chat("a", "The quick", temperature=0),
            {"id": "b", "prompt": "The quick", "max_tokens": 5, "temperature": 0, "top_k": 3},
            {"id": "c", "input": ["one", "two"]},
            {"prompt": "fox", "max_tokens": 3, "temperature": 0},
        ],
    )
    summary, _ = run(model, source, tmp_path / "out.jsonl")
    found = rows(tmp_path / "out.jsonl")
    assert (summary.lines, summary.answered, summary.errors) == (4, 4, 0)
    assert set(found) == {"a", "b", "c", "line-4"}
    assert set(found["a"]) == {"id", "custom_id", "response", "error"}
    assert set(found["a"]["response"]) == {"status_code", "request_id", "body"}
    llm = hasten.load(model)
    bodies = {id: row["response"]["body"] for id, row in found.items()}
    said = llm.chat([{"role": "user", "content": "The quick"}], max_tokens=6).text
    assert bodies["a"]["choices"][0]["message"]["content"] == said
    assert bodies["b"]["choices"][0]["text"] == llm.generate("The quick", max_tokens=5).text
    assert [len(one["embedding"]) for one in bodies["c"]["data"]] == [32, 32]
    assert bodies["line-4"]["choices"][0]["text"] == llm.generate("fox", max_tokens=3).text


BAD = [
    ("{", "invalid_json", "line-1"),
    ('{"id": "x", "prompt": NaN}', "invalid_json", "line-1"),
    ("[" * 100_000, "invalid_json", "line-1"),
    ("[]", "invalid_line", "line-1"),
    ('{"id": "x"}', "invalid_line", "x"),
    ('{"id": "x", "prompt": "a", "messages": []}', "invalid_line", "x"),
    ('{"id": 7, "prompt": "a"}', "invalid_id", "line-1"),
    ('{"id": "", "prompt": "a"}', "invalid_id", "line-1"),
    ('{"id": "\\ud800", "prompt": "a"}', "invalid_id", "line-1"),
    (json.dumps({"id": "x" * 513, "prompt": "a"}), "invalid_id", "line-1"),
    ('{"id": "x", "prompt": "a", "stream": true}', "invalid_value", "x"),
    (json.dumps(chat("x", "a") | {"priority": 1}), "unknown_field", "x"),
    (json.dumps(chat("x", "a") | {"method": "GET"}), "invalid_method", "x"),
    (json.dumps(chat("x", "a") | {"url": "/v1/files"}), "invalid_url", "x"),
    (json.dumps(chat("x", "a") | {"url": ["/v1/completions"]}), "invalid_url", "x"),
    (json.dumps(chat("x", "a") | {"body": "a"}), "invalid_body", "x"),
    ('{"url": "/v1/completions", "method": "POST", "body": {}}', "invalid_id", "line-1"),
]


@pytest.mark.parametrize(("text", "code", "id"), BAD, ids=[f"{i}-{code}" for i, (_, code, _) in enumerate(BAD)])
def test_a_line_that_is_no_request_is_named(text, code, id):
    with pytest.raises(LineError) as caught:
        parse(1, text.encode())
    assert (caught.value.code, caught.value.id) == (code, id)
    assert len(caught.value.message) < 300


def test_bad_lines_become_error_lines_and_stop_nothing(model, tmp_path):
    source = tmp_path / "in.jsonl"
    lines = [
        json.dumps({"id": "good", "prompt": "The", "max_tokens": 2}).encode(),
        b"{",
        b'{"id": "latin", "prompt": "\xe9"}',
        json.dumps({"id": "field", "prompt": "a", "nonsense": 1}).encode(),
        json.dumps({"id": "model", "prompt": "a", "model": "another"}).encode(),
        json.dumps({"id": "range", "prompt": "a", "temperature": 9}).encode(),
        b'{"id": "long", "prompt": "' + b"a" * (_LINE_BYTES + 10) + b'"}',
        b"",
        json.dumps({"id": "last", "prompt": "quick", "max_tokens": 2}).encode(),
    ]
    source.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))  # a mark at the start, Windows' line ends, none at the end
    summary, _ = run(model, source, tmp_path / "out.jsonl")
    found = rows(tmp_path / "out.jsonl")
    assert (summary.lines, summary.errors) == (8, 6)
    assert {id for id, row in found.items() if row["error"]} == {"line-2", "line-3", "line-7"}
    assert {id: row["response"]["status_code"] for id, row in found.items() if row["response"]} == {
        "good": 200, "last": 200, "field": 400, "model": 404, "range": 400,
    }  # fmt: skip
    params = {id: found[id]["response"]["body"]["error"]["param"] for id in ("field", "model", "range")}
    assert params == {"field": "nonsense", "model": "model", "range": "temperature"}


def test_the_same_id_twice_is_refused_with_the_numbers_of_the_lines(model, tmp_path):
    lines = [{"id": "a", "prompt": "x"}, {"id": "line-3", "prompt": "x"}, "{", {"id": "a", "prompt": "y"}]
    source = write(tmp_path / "in.jsonl", lines)
    with pytest.raises(ConfigError, match=r"'line-3' on lines 2 and 3; 'a' on lines 1 and 4"):
        run(model, source, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_inputs_without_a_line_or_out_of_reach_are_refused(model, tmp_path):
    with pytest.raises(FormatError, match="no line"):
        run(model, write(tmp_path / "empty.jsonl", ["", "  "]), tmp_path / "out.jsonl")
    with pytest.raises(FormatError, match="cannot be read"):
        run(model, tmp_path / "none.jsonl", tmp_path / "out.jsonl")


def test_a_request_without_a_seed_gets_one_that_follows_from_its_id():
    one = parse(1, json.dumps({"id": "a", "prompt": "x"}).encode()).body["seed"]
    assert parse(9, json.dumps({"prompt": "other", "id": "a", "seed": None}).encode()).body["seed"] == one
    assert parse(1, json.dumps({"id": "b", "prompt": "x"}).encode()).body["seed"] != one
    assert parse(1, json.dumps({"id": "a", "prompt": "x", "seed": 5}).encode()).body["seed"] == 5
    assert "seed" not in parse(1, json.dumps({"id": "a", "input": "x"}).encode()).body


@pytest.fixture(scope="module")
def sampled(model, tmp_path_factory):
    """An input whose answers are drawn at random, and its answers."""
    folder = tmp_path_factory.mktemp("sampled")
    source = write(folder / "in.jsonl", [chat(f"a{i}", f"hello {i}", max_tokens=4 + i % 9) for i in range(AHEAD + 13)])
    run(model, source, folder / "out.jsonl")
    return source, folder / "out.jsonl"


def test_answers_vary_with_the_id_and_with_nothing_else(model, sampled, tmp_path):
    source, whole = sampled
    lines = source.read_text().splitlines()
    some = write(tmp_path / "in.jsonl", [lines[5], lines[40], lines[0]])
    run(model, some, tmp_path / "out.jsonl")
    alone, together = meaning(tmp_path / "out.jsonl"), meaning(whole)
    assert alone == {id: together[id] for id in ("a5", "a40", "a0")}
    source = write(tmp_path / "same.jsonl", [chat(f"b{i}", "hello", max_tokens=8) for i in range(8)])
    run(model, source, tmp_path / "same.out")
    assert len({str(value[2][0]) for value in meaning(tmp_path / "same.out").values()}) > 1


@pytest.mark.parametrize("cut", [0, 1, 700, 5_000, -1, -200])
def test_a_run_cut_anywhere_goes_on_to_the_same_answers(model, sampled, tmp_path, cut):
    source, whole = sampled
    data = whole.read_bytes()
    out = tmp_path / "out.jsonl"
    out.write_bytes(data[:cut])
    note_path(out).write_bytes(note_path(whole).read_bytes())
    kept = data[:cut].count(b"\n")
    summary, _ = run(model, source, out)
    assert summary.answered == summary.lines - kept
    assert meaning(out) == meaning(whole)
    assert out.read_bytes().startswith(data[: data[:cut].rfind(b"\n") + 1])  # what was there is not written anew


def test_a_finished_batch_loads_no_model(model, sampled):
    source, whole = sampled
    before = whole.read_bytes()
    summary, opened = run(model, source, whole)
    assert (summary.answered, opened, whole.read_bytes()) == (0, False, before)


def test_lines_added_to_the_input_are_answered_and_other_inputs_refused(model, tmp_path):
    source, out = write(tmp_path / "in.jsonl", [chat("a", "x"), chat("b", "y")]), tmp_path / "out.jsonl"
    run(model, source, out)
    write(source, [chat("a", "x"), chat("b", "y"), chat("c", "z")])
    summary, _ = run(model, source, out)
    assert (summary.answered, set(rows(out))) == (1, {"a", "b", "c"})
    before = out.read_bytes()
    for other in ([chat("a", "x"), chat("b", "other"), chat("c", "z")], [chat("a", "x"), chat("b", "y")]):
        with pytest.raises(ConfigError, match="belongs to another input"):
            run(model, write(source, other), out)
    write(source, [chat("a", "x"), chat("b", "y"), chat("c", "z")])
    source.write_text(source.read_text().rstrip("\n"))
    with pytest.raises(ConfigError, match="belongs to another input"):
        run(model, source, out)
    write(source, [chat("a", "x"), chat("b", "y"), chat("c", "z")])
    with pytest.raises(ConfigError, match=r"made with method = \['auto'\], not \['plain'\]"):
        run(model, source, out, method=("plain",))
    assert out.read_bytes() == before


def test_an_input_that_grew_within_its_last_line_is_another_input(model, tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps({"id": "a", "prompt": "x", "max_tokens": 2}))
    run(model, source, out)
    source.write_text(source.read_text() + " ")
    with pytest.raises(ConfigError, match="belongs to another input"):
        run(model, source, out)
    source.write_text(source.read_text()[:-1] + "\n" + json.dumps({"id": "b", "prompt": "x", "max_tokens": 2}))
    assert run(model, source, out)[0].answered == 1


def test_files_of_somebody_else_are_left_alone(model, tmp_path):
    source, out = write(tmp_path / "in.jsonl", [chat("a", "x")]), tmp_path / "out.jsonl"
    out.write_text("my notes\n")
    with pytest.raises(ConfigError, match="holds something else"):
        run(model, source, out)
    assert out.read_text() == "my notes\n"
    run(model, source, tmp_path / "mine.jsonl")
    note_path(tmp_path / "mine.jsonl").write_text("{")
    with pytest.raises(FormatError, match="damaged"):
        run(model, source, tmp_path / "mine.jsonl")


def test_a_damaged_line_in_the_middle_is_refused_and_at_the_end_redone(model, sampled, tmp_path):
    source, whole = sampled
    out = tmp_path / "out.jsonl"
    note_path(out).write_bytes(note_path(whole).read_bytes())
    lines = whole.read_bytes().splitlines(keepends=True)
    out.write_bytes(lines[0] + b"\0\0\0\n" + lines[1])
    with pytest.raises(FormatError, match=f"byte {len(lines[0])} begins a line that is no answer"):
        run(model, source, out)
    out.write_bytes(lines[0] + lines[1] + b"\0\0\0\n")
    run(model, source, out)
    assert meaning(out) == meaning(whole)
    out.write_bytes(lines[0] + lines[1] + lines[0])
    with pytest.raises(FormatError, match="answered twice"):
        run(model, source, out)


def test_retry_errors_asks_again_for_errors_only(model, tmp_path):
    source, out = write(tmp_path / "in.jsonl", [chat("a", "x"), chat("b", "y"), "{"]), tmp_path / "out.jsonl"
    run(model, source, out)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    for line in lines:
        if line["custom_id"] == "b":
            line["response"] = {"status_code": 504, "request_id": "r", "body": {"error": {"message": "late"}}}
    write(out, lines)
    summary, opened = run(model, source, out)
    assert (summary.answered, summary.errors, opened) == (0, 2, False)
    summary, _ = run(model, source, out, retry_errors=True)
    found = rows(out)
    assert (summary.answered, summary.errors) == (2, 1)
    assert (found["b"]["response"]["status_code"], found["line-3"]["error"]["code"]) == (200, "invalid_json")


def test_two_runs_do_not_write_one_file(model, tmp_path):
    source, out = write(tmp_path / "in.jsonl", [chat("a", "x")]), tmp_path / "out.jsonl"
    first = Results(out, {"model": model}, survey(source))
    try:
        with pytest.raises(ConfigError, match="being written by another run"):
            run(model, source, out)
    finally:
        first.close()


def test_the_engine_is_kept_full_and_no_fuller(model, tmp_path, monkeypatch):
    from hasten.serve.batch import answering

    working, most = 0, 0
    real = answering.Answering.answer

    async def answer(self, number, raw):
        nonlocal working, most
        working += 1
        most = max(most, working)
        try:
            return await real(self, number, raw)
        finally:
            working -= 1

    monkeypatch.setattr(answering.Answering, "answer", answer)
    source = write(tmp_path / "in.jsonl", [chat(f"a{i}", "x", max_tokens=2) for i in range(3 * AHEAD)])
    run(model, source, tmp_path / "out.jsonl")
    assert (most, len(rows(tmp_path / "out.jsonl"))) == (AHEAD, 3 * AHEAD)


def test_an_engine_that_ends_stops_the_run_and_keeps_what_was_answered(model, tmp_path, monkeypatch):
    from hasten.errors import HastenError
    from hasten.serve import worker

    told = 0
    real = worker.Worker._deliver

    def deliver(self, seat, events):
        nonlocal told
        real(self, seat, events)
        told += sum(event.output is not None for event in events)
        if told >= 20:  # counted in answers: how many passes they take depends on what is drafted
            raise MemoryError

    source = write(tmp_path / "in.jsonl", [chat(f"a{i}", "x", max_tokens=12) for i in range(200)])
    with monkeypatch.context() as patch:
        patch.setattr(worker.Worker, "_deliver", deliver)
        patch.setattr("threading.excepthook", lambda *_: None)
        with pytest.raises(HastenError, match=r"the engine ended \(MemoryError\)"):
            run(model, source, tmp_path / "out.jsonl")
    kept = rows(tmp_path / "out.jsonl")
    assert 0 < len(kept) < 200
    assert all(row["response"]["status_code"] == 200 for row in kept.values())
    summary, _ = run(model, source, tmp_path / "out.jsonl")
    assert (summary.answered, summary.errors, len(rows(tmp_path / "out.jsonl"))) == (200 - len(kept), 0, 200)


def test_lines_are_read_as_a_stream_and_in_stretches(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"a\n\nbb\r\nccc\n" + b"d" * (_LINE_BYTES + 5) + b"\nlast")
    lines = list(read(source))
    assert [(line.number, line.raw[:4]) for line in lines] == [
        (1, b"a"),
        (3, b"bb"),
        (4, b"ccc"),
        (5, b"dddd"),
        (6, b"last"),
    ]
    data = source.read_bytes()
    assert [data[line.start : line.end].rstrip(b"\r\n")[:4] for line in lines] == [line.raw[:4] for line in lines]
    assert max(len(line.raw) for line in lines) == _LINE_BYTES + 1
    for chosen in (lines, [lines[0], lines[2], lines[4]], lines[1:4]):
        again = [line for start, end, number, _ in stretches(chosen) for line in read(source, start, end, number)]
        assert again == chosen


def test_a_killed_command_loses_nothing_that_was_written_and_goes_on(model, tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write(source, [chat(f"a{i}", f"hello {i}", max_tokens=50) for i in range(120)])
    command = [sys.executable, "-m", "hasten", "run", model, "--batch", str(source), "--out", str(out)]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ})
    end = time.monotonic() + 60
    while (not out.exists() or out.read_bytes().count(b"\n") < 4) and child.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL, "the run was over before it could be killed"
    kept = out.read_bytes()
    assert 4 <= kept.count(b"\n") < 120
    run(model, source, out)
    assert out.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    run(model, source, tmp_path / "uncut.jsonl")
    assert meaning(out) == meaning(tmp_path / "uncut.jsonl")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--batch", "IN"), 2, "--batch needs --out"),
        (("--batch", "IN", "--out", "OUT", "--temperature", "0"), 2, "--temperature does not go with --batch"),
        (("--batch", "IN", "--out", "OUT", "hello"), 2, "the prompt does not go with --batch"),
        (("--batch", "IN", "--out", "OUT", "--workers", "2"), 2, "--workers is for --ray"),
        (("--batch", "IN", "--out", "OUT", "--ray", "--workers", "0"), 2, "workers = 0 is not allowed"),
        (("--batch", "IN", "--out", "OUT", "--method", "nonsense"), 2, "nonsense"),
        (("--out", "OUT", "hello"), 2, "--out is for --batch"),
        ((), 2, "prompt is missing"),
        (("--batch", "IN", "--out", "OUT"), 0, "2 answered now, 2 in all, 1 of them errors"),
    ],
)
def test_the_command_says_what_it_did_or_what_is_wrong(model, tmp_path, monkeypatch, capsys, arguments, code, said):
    from hasten.cli import main

    write(tmp_path / "in.jsonl", [{"prompt": "The", "max_tokens": 2}, "{"])
    places = {"IN": str(tmp_path / "in.jsonl"), "OUT": str(tmp_path / "out.jsonl")}
    monkeypatch.setattr(sys, "argv", ["hasten", "run", model, *(places.get(one, one) for one in arguments)])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    left = 0
    try:
        main()
    except SystemExit as end:
        left = end.code or 0
    assert (left, said in capsys.readouterr().err) == (code, True)


def test_a_client_that_stops_listening_is_heard_by_the_application():
    from hasten.serve.asgi import answer, exchange, http_scope

    heard = []

    async def app(scope, receive, send):
        assert (await receive())["body"] == b"question"
        await send({"type": "http.response.start", "status": 207, "headers": [(b"X-A", b"b")]})
        await send({"type": "http.response.body", "body": b"one", "more_body": True})
        heard.append((await receive())["type"])

    async def broken(scope, receive, send):
        raise ZeroDivisionError

    async def use():
        messages = exchange(app, http_scope("POST", "/x"), b"question")
        assert (await anext(messages))["status"] == 207
        assert (await anext(messages))["body"] == b"one"
        await messages.aclose()
        with pytest.raises(ZeroDivisionError):
            await answer(broken, http_scope("GET", "/"))

    asyncio.run(use())
    assert heard == ["http.disconnect"]
