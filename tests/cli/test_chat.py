"""`hasten chat`: history, commands, JSON lines through a pipe; Ctrl-C, Ctrl-D and errors on a real terminal."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

import hasten as package


def answers(model: str, *said: str, system: str = "", tokens: int = 6) -> list[str]:
    """What the API answers in one conversation."""
    llm = package.load(model)
    history = [{"role": "system", "content": system}] if system else []
    texts = []
    for line in said:
        history.append({"role": "user", "content": line})
        texts.append(llm.chat(history, max_tokens=tokens).text)
        history.append({"role": "assistant", "content": texts[-1]})
    return texts


def test_a_conversation_is_kept(hasten, tiny):
    result = hasten("chat", tiny, "--max-tokens", "6", stdin=b"The quick\nlazy dog\n")
    assert result.out == "".join(text + "\n" for text in answers(tiny, "The quick", "lazy dog"))
    assert (result.code, result.err) == (0, "")


def test_json_prints_one_object_per_answer(hasten, tiny):
    result = hasten("chat", tiny, "--max-tokens", "6", "--json", stdin=b"The quick\n\n  \nlazy dog")
    objects = [json.loads(line) for line in result.out.splitlines()]
    assert [entry["text"] for entry in objects] == answers(tiny, "The quick", "lazy dog")
    assert all(entry["usage"]["completion_tokens"] == 6 for entry in objects)
    assert objects[1]["usage"]["prompt_tokens"] > objects[0]["usage"]["prompt_tokens"]


def test_reset_forgets_all_but_the_system_message(hasten, tiny):
    arguments = ("chat", tiny, "--max-tokens", "6", "--json", "--system", "Be brief.")
    result = hasten(*arguments, stdin=b"The quick\n/reset\nlazy dog\n")
    fresh = answers(tiny, "lazy dog", system="Be brief.")[0]
    assert json.loads(result.out.splitlines()[1])["text"] == fresh
    kept = hasten(*arguments, stdin=b"The quick\nlazy dog\n")
    assert (
        json.loads(kept.out.splitlines()[1])["usage"]["prompt_tokens"]
        > (json.loads(result.out.splitlines()[1])["usage"]["prompt_tokens"])
    )


def test_exit_leaves_and_help_explains(hasten, tiny):
    result = hasten("chat", tiny, "--json", stdin=b"/help\n/resett\n/exit\nThe quick\n")
    assert (result.code, result.out) == (0, "")
    assert result.err.count("/reset forgets the conversation") == 2
    assert "no such command: /resett" in result.err


def test_stats_follow_every_answer(hasten, tiny):
    result = hasten("chat", tiny, "--max-tokens", "4", "--stats", stdin=b"a\nb\n")
    assert result.err.count("4 tokens, ") == 2


def test_a_piped_conversation_that_outgrows_the_window_fails(hasten, tiny):
    said = b"The quick\n" + b"fox " * 600
    result = hasten("chat", tiny, "--max-tokens", "4", stdin=said)
    assert result.code == 2
    assert result.out == answers(tiny, "The quick", tokens=4)[0] + "\n"
    assert "512" in result.err


@pytest.mark.parametrize("option", [("--temperature", "-1"), ("--method", "nosuch")])
def test_a_wrong_option_is_refused_before_loading(hasten, option):
    result = hasten("chat", "no/such/model", *option)
    assert result.code == 2
    assert "model" not in result.err.splitlines()[0]


def test_a_model_without_a_template_cannot_chat(hasten, bare):
    result = hasten("chat", bare, stdin=b"hello\n")
    assert (result.code != 0, result.out) == (True, "")
    assert "template" in result.err


class Terminal:
    """`hasten` on a pseudo-terminal: what a person types and sees."""

    def __init__(self, *arguments: str, before: Callable[[], object] | None = None) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "hasten", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=before,
            env={**os.environ, "TERM": "dumb", "COLUMNS": "200"},
        )
        os.close(slave)
        self.seen = ""

    def wait_for(self, text: str, count: int = 1, timeout_s: float = 60) -> str:
        """Read until `text` was seen `count` times; the screen so far."""
        end = time.monotonic() + timeout_s
        while self.seen.count(text) < count:
            assert time.monotonic() < end, f"no {text!r} x {count} in {self.seen[-2000:]!r}"
            if select.select([self.master], [], [], 0.2)[0]:
                try:
                    self.seen += os.read(self.master, 65536).decode("utf-8", errors="replace")
                except OSError:  # the other side closed
                    assert self.seen.count(text) >= count, f"no {text!r} in {self.seen[-2000:]!r}"
        return self.seen

    def wait_for_more(self, characters: int, timeout_s: float = 30) -> None:
        """Read until so many more characters were seen: an answer is under way."""
        before, end = len(self.seen), time.monotonic() + timeout_s
        while len(self.seen) < before + characters:
            assert time.monotonic() < end, f"no more text behind {self.seen[-2000:]!r}"
            if select.select([self.master], [], [], 0.2)[0]:
                self.seen += os.read(self.master, 4096).decode("utf-8", errors="replace")

    def type(self, text: str) -> None:
        """Send keys."""
        os.write(self.master, text.encode())

    def ctrl_c(self, text: str, again_s: float | None = None) -> None:
        """What Ctrl-C does to the foreground process, again until `text` appears behind what was seen before.

        readline shows its prompt a moment before it listens; a signal in between is lost. `again_s`: twice each time.
        """
        seen = self.seen.count(text)
        for left in range(9, -1, -1):
            self.process.send_signal(signal.SIGINT)
            if again_s is not None:
                time.sleep(again_s)
                self.process.send_signal(signal.SIGINT)
            try:
                self.wait_for(text, seen + 1, 60 if left == 0 else 3)
                return
            except AssertionError:
                if left == 0:
                    raise

    def close(self) -> None:
        """End the process whatever it does."""
        self.process.kill()
        self.process.wait()
        os.close(self.master)


@pytest.fixture
def terminal(endless):
    opened = Terminal("chat", endless, "--max-tokens", "90000", "--stats")
    yield opened
    opened.close()


def test_ctrl_c_stops_one_answer_and_ctrl_d_leaves(terminal):
    terminal.wait_for("> ")
    terminal.ctrl_c("> ")  # at the prompt: the line is dropped, nothing else
    for turn in (1, 2):
        terminal.type("fox\n")
        terminal.wait_for("fox\r\n", turn)
        terminal.wait_for_more(20)
        assert terminal.process.poll() is None
        prompts = terminal.seen.count("\n> ")
        terminal.ctrl_c("[stopped]")
        terminal.wait_for("\n> ", prompts + 1)
    terminal.type("\x04")
    assert terminal.process.wait(30) == 0


def test_an_impatient_ctrl_c_ends_no_conversation(terminal):
    """Pressed again while the answer stops, or between answers, it does nothing."""
    terminal.wait_for("> ")
    for turn, gap_s in enumerate((0, 0, 0, 0.0005, 0.002), 1):
        terminal.type("fox\n")
        terminal.wait_for("fox\r\n", turn)
        terminal.wait_for_more(20)
        prompts = terminal.seen.count("\n> ")
        terminal.ctrl_c("[stopped]", gap_s)
        terminal.wait_for("\n> ", prompts + 1)
        assert terminal.process.poll() is None
    terminal.type("\x04")
    assert terminal.process.wait(30) == 0


def test_ctrl_c_is_heard_where_the_shell_that_started_it_ignores_it(endless):
    """As for what a script starts with `&`; a terminal means it all the same."""
    opened = Terminal("chat", endless, "--max-tokens", "90000", before=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    try:
        opened.wait_for("> ")
        opened.ctrl_c("> ")
    finally:
        opened.close()


def test_an_error_does_not_end_a_conversation_at_the_terminal(tiny):
    opened = Terminal("chat", tiny, "--max-tokens", "5", "--stats")
    try:
        opened.wait_for("> ")
        opened.type("fox " * 600 + "\n")
        opened.wait_for("error: ")
        opened.wait_for("hint: ")
        opened.type("fox\n")
        opened.wait_for("5 tokens, ")
        opened.type("/exit\n")
        assert opened.process.wait(30) == 0
    finally:
        opened.close()
