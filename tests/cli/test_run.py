"""`hasten run` on a tiny real model: streaming, JSON, sampling options, the chat template, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hasten as package


def test_text_goes_to_stdout_and_is_what_the_api_gives(hasten, tiny):
    result = hasten("run", tiny, "The quick", "--raw", "--max-tokens", "12")
    expected = package.load(tiny).generate("The quick", max_tokens=12).text
    assert (result.code, result.out, result.err) == (0, expected + "\n", "")


def test_the_chat_template_is_the_default_and_raw_leaves_it_out(hasten, tiny, bare):
    llm = package.load(tiny)
    message = [{"role": "user", "content": "The quick"}]
    chat = hasten("run", tiny, "The quick", "--max-tokens", "12").out
    raw = hasten("run", tiny, "The quick", "--max-tokens", "12", "--raw").out
    assert chat == llm.chat(message, max_tokens=12).text + "\n"
    assert raw != chat
    assert hasten("run", bare, "The quick", "--max-tokens", "12").out == raw


def test_json_is_one_object_with_everything_needed_to_repeat_it(hasten, tiny):
    arguments = ("run", tiny, "The quick", "--json", "--max-tokens", "9", "--temperature", "1.5")
    first = json.loads(hasten(*arguments).out)
    assert set(first) == {
        "text", "tokens", "finish_reason", "stop", "seed", "choice", "method", "model", "usage"
    }  # fmt: skip
    assert (len(first["tokens"]), first["finish_reason"], first["model"]) == (9, "length", tiny)
    assert first["usage"]["completion_tokens"] == 9
    assert first["usage"]["prompt_tokens"] > len("The quick") // 4
    again = json.loads(hasten(*arguments, "--seed", str(first["seed"])).out)
    other = json.loads(hasten(*arguments, "--seed", str(first["seed"] + 1)).out)
    assert again["tokens"] == first["tokens"] != other["tokens"]


@pytest.mark.parametrize("stdin", [b"The quick", b"The quick\n", b"The quick\r\n"])
def test_a_dash_reads_stdin_without_the_shell_s_line_end(hasten, tiny, stdin):
    given = hasten("run", tiny, "The quick", "--max-tokens", "6").out
    assert hasten("run", tiny, "-", "--max-tokens", "6", stdin=stdin).out == given


def test_every_sampling_option_reaches_the_request(hasten, tiny, monkeypatch):
    seen = {}
    real = package.LLM.stream

    def stream(self, prompt, **options):
        seen.update(options)
        return real(self, prompt, **options)

    monkeypatch.setattr(package.LLM, "stream", stream)
    given = {
        "max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.01, "repetition_penalty": 1.1,
        "presence_penalty": 0.2, "frequency_penalty": 0.3, "seed": 5,
    }  # fmt: skip
    options = [text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    result = hasten("run", tiny, "Hi", "--raw", "--ignore-eos", "--stop", "zq", "--stop", "qz", *options)
    assert result.code == 0
    assert seen == {**given, "ignore_eos": True, "stop": ["zq", "qz"], "method": ["auto"]}


def test_a_stop_string_ends_the_text(hasten, tiny):
    text = json.loads(hasten("run", tiny, "The quick", "--max-tokens", "30", "--json").out)["text"]
    stop = text[len(text) // 2 :][:3]
    output = json.loads(hasten("run", tiny, "The quick", "--max-tokens", "30", "--json", "--stop", stop).out)
    assert (output["text"], output["finish_reason"], output["stop"]) == (text[: text.index(stop)], "stop", stop)


def test_a_method_gives_the_same_text_and_says_its_name(hasten, tiny):
    words = ("run", tiny, "again and again and again", "--json", "--max-tokens", "40")
    plain = json.loads(hasten(*words, "--method", "plain").out)
    arguments = ("--method", "prompt-lookup:nodes=3", "--max-tokens", "40", "--json")
    looked = json.loads(hasten("run", tiny, "again and again and again", *arguments).out)
    assert looked["text"] == plain["text"]
    assert looked["method"] == ["prompt-lookup"]
    assert looked["usage"]["drafted_tokens"] > 0 == plain["usage"]["drafted_tokens"]


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_stats_go_to_stderr(hasten, tiny, form):
    result = hasten("run", tiny, "Hi", "--max-tokens", "5", "--stats", *form)
    assert "5 tokens, " in result.err
    assert "tokens per forward" in result.err
    assert "tokens per forward" not in result.out


@pytest.mark.parametrize(
    ("arguments", "field", "hint"),
    [
        (["--temperature", "-1"], "temperature = -1.0", ""),
        (["--temperature", "nan"], "temperature = nan", ""),
        (["--top-p", "0"], "top_p = 0.0", ""),
        (["--max-tokens", "0"], "max_tokens = 0", ""),
        (["--presence-penalty", "3"], "presence_penalty = 3.0", ""),
        (["--stop", ""], "stop = ''", ""),
        (["--seed", "-1"], "seed = -1", ""),
        (["--dtype", "float64"], "dtype = 'float64'", ""),
        (["--threads", "0"], "threads = 0", ""),
        (["--method", "prompt-lokup"], "unknown method 'prompt-lokup'", "'prompt-lookup'"),
        (["--method", "plain:x=1"], "method 'plain' is a preset", "name a method, and set it"),
        (["--method", "auto:nodes=4"], "method 'auto' is a preset", "name a method, and set it"),
        (["--method", "prompt-lookup:node=1"], "unknown knob of prompt-lookup 'node'", "'nodes'"),
        (["--method", "prompt-lookup:nodes=0"], "prompt-lookup.nodes = 0", ""),
        (["--method", "plain", "--method", "prompt-lookup"], "method 'plain' cannot be combined", ""),
    ],
)
def test_a_wrong_option_is_refused_in_one_line(hasten, tiny, arguments, field, hint):
    result = hasten("run", tiny, "Hi", *arguments)
    assert (result.code, result.out) == (2, "")
    first, *rest = result.err.splitlines()
    assert first.startswith(f"error: {field}")
    assert hint in "".join(rest)
    assert len(rest) <= 1


def test_sampling_and_methods_are_checked_before_the_model_is_touched(hasten):
    for option in (("--top-k", "-1"), ("--method", "nosuch")):
        assert "model" not in hasten("run", "no/such/model", "Hi", *option).err.splitlines()[0]


@pytest.mark.parametrize(("prompt", "stdin"), [("", b""), ("-", b""), ("-", b"\n")])
def test_an_empty_prompt_is_refused(hasten, tiny, prompt, stdin):
    result = hasten("run", tiny, prompt, stdin=stdin)
    assert (result.code, result.err.splitlines()[0][:22]) == (2, "error: prompt is empty")


def test_bytes_that_are_not_text_are_refused(hasten, tiny):
    result = hasten("run", tiny, "-", stdin=b"abc\xff")
    assert (result.code, result.err.splitlines()[0]) == (2, "error: standard input is not UTF-8 text (byte 3)")


def test_a_prompt_longer_than_the_window_names_both_numbers(hasten, tiny):
    result = hasten("run", tiny, "fox " * 600)
    assert result.code == 2
    assert "512" in result.err


def test_a_damaged_model_is_code_1(hasten, tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + b"\x00" * 10)
    result = hasten("run", str(path), "Hi")
    assert (result.code, str(path) in result.err.splitlines()[0]) == (1, True)


def test_text_arrives_while_it_is_made(endless):
    """The first read gets the first few tokens, not a full buffer of 8 KB, and the process is still at work."""
    command = [sys.executable, "-m", "hasten", "run", endless, "The quick", "--raw", "--max-tokens", "90000"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}  # it would hide a missing flush
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        try:
            assert process.stdout is not None
            assert 0 < len(os.read(process.stdout.fileno(), 65536)) < 1024
            assert process.poll() is None
        finally:
            process.kill()


def test_a_closed_pipe_ends_quietly(endless):
    """`hasten run ... | head -c 5` stops at once, without a traceback."""
    command = [sys.executable, "-m", "hasten", "run", endless, "The quick", "--raw", "--max-tokens", "90000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(5)
        process.stdout.close()
        assert process.wait(60) != 0
        assert process.stderr.read() == b""


def test_a_model_on_disk_opens_no_connection(tiny):
    """The README's promise: the network is used to fetch a model, and for nothing else."""
    guard = "import socket, sys\ndef refuse(*a): raise RuntimeError(f'connection {a[1:]}')\n"
    guard += "socket.socket.connect = socket.socket.connect_ex = socket.socket.sendto = refuse\n"
    guard += "socket.getaddrinfo = lambda *a, **k: refuse(None, *a)\n"
    call = f"sys.argv = ['hasten', 'run', {tiny!r}, 'Hi', '--max-tokens', '3']\nimport hasten.cli\nhasten.cli.main()"
    quiet = subprocess.run([sys.executable, "-c", guard + call], capture_output=True, text=True)
    assert (quiet.returncode, quiet.stderr) == (0, "")
    fetch = call.replace(repr(tiny), "'some/model'")
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    loud = subprocess.run([sys.executable, "-c", guard + fetch], capture_output=True, text=True, env=environment)
    assert loud.returncode == 1  # the guard does see what the hub client tries
    assert "connection" in loud.stderr


def test_what_drafters_learn_is_kept_in_a_file(hasten, tiny, bare, tmp_path):
    path = tmp_path / "learnt.safetensors"
    arguments = ("run", tiny, "The quick", "--max-tokens", "30", "--json", "--state", str(path))
    cold, warm = (json.loads(hasten(*arguments, "--method", "token-recycling").out) for _ in range(2))
    assert cold["tokens"] == warm["tokens"]
    assert warm["usage"]["drafted_tokens"] > 0
    llm = package.load(tiny)
    llm.load_state(path)
    table, _ = llm.parts(("token-recycling",)).drafter._shared
    assert (table >= 0).any()
    assert hasten("run", tiny, "Hi", "--max-tokens", "3", "--state", str(path)).code == 0  # another method: kept beside
    other = hasten("run", bare, "Hi", "--max-tokens", "3", "--state", str(path))
    assert (other.code, "belongs to model" in other.err) == (2, True)
    blob = path.read_bytes()
    for wrong in (b"", blob[:40], blob[: len(blob) // 2]):
        path.write_bytes(wrong)
        result = hasten("run", tiny, "Hi", "--max-tokens", "3", "--state", str(path))
        assert result.code in (1, 2)
        assert "cannot be read" in result.err
        assert path.read_bytes() == wrong


def test_chat_keeps_what_was_learnt_too(hasten, tiny, tmp_path):
    path = tmp_path / "learnt.safetensors"
    result = hasten("chat", tiny, "--max-tokens", "12", "--state", str(path), stdin=b"The quick\nbrown fox\n")
    assert result.code == 0, result.err
    assert path.exists()


def test_a_draft_model_is_loaded_by_name_and_its_vocabulary_checked(hasten, tiny, endless, tmp_path):
    arguments = ("run", tiny, "The quick brown", "--max-tokens", "12")
    plain = hasten(*arguments, "--method", "plain")
    for method in (f"draft-model:model={endless}", f"rsd:model={endless}"):
        drafted = hasten(*arguments, "--method", method)
        assert (drafted.code, drafted.out) == (0, plain.out), drafted.err
    other = tmp_path / "other"
    other.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json", "config.json", "model.safetensors"):
        (other / file).write_bytes((Path(tiny) / file).read_bytes())
    text = (other / "tokenizer.json").read_text(encoding="utf-8")
    (other / "tokenizer.json").write_text(text.replace("<|im_end|>", "<|im_stop|>"), encoding="utf-8")
    refused = hasten(*arguments, "--method", f"draft-model:model={other}")
    assert refused.code == 2
    assert "token 1 is '<|im_stop|>', the target's is '<|im_end|>'" in refused.err
    assert "draft-model.model is empty" in hasten(*arguments, "--method", "draft-model").err
    assert hasten(*arguments, "--method", "rsd:model=no-such-model").code in (1, 2)
