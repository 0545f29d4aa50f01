"""Text that a model writes itself: prompts from the standard library and by rules, answers from the model.

A drafter is only ever asked to continue what its target says, so that is what it learns from (2403.00858, section 3). The
prompts are disjoint from those of `hasten.bench.suites`: other modules, other topics, other numbers.
"""

from __future__ import annotations

import inspect
import itertools
import random
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hasten.errors import FormatError, out_of_range

if TYPE_CHECKING:
    from hasten.llm import LLM

_CODE = (
    "abc ast base64 binascii calendar codecs collections configparser contextlib copy csv datetime dataclasses "
    "decimal difflib dis doctest email.utils enum filecmp fileinput fractions functools getopt getpass gettext glob gzip "
    "hmac html http.cookies imaplib inspect ipaddress json keyword linecache locale logging mailbox mimetypes netrc "
    "ntpath numbers operator optparse pathlib pickletools pkgutil platform plistlib poplib pprint profile pyclbr queue "
    "quopri random re reprlib sched secrets selectors shutil smtplib socket socketserver ssl stat stringprep struct "
    "subprocess symtable sysconfig tarfile tempfile timeit token tokenize trace traceback types typing unittest "
    "urllib.parse uuid warnings wave weakref webbrowser xml.dom.minidom zipapp zipfile"
)
_DOCS = (
    "abc argparse asyncio base64 binascii cmd code codecs collections concurrent.futures configparser contextlib copy "
    "dataclasses datetime decimal dis email fileinput functools getopt glob gzip hashlib hmac html http.server imaplib "
    "inspect io ipaddress itertools json keyword linecache mailbox mimetypes multiprocessing netrc numbers os pathlib pdb "
    "pickle pkgutil platform plistlib pprint profile queue re reprlib secrets selectors shutil signal smtplib socket "
    "sqlite3 ssl stat struct subprocess symtable tarfile tempfile threading time timeit token trace types urllib.request "
    "uuid warnings wave weakref webbrowser wsgiref xml zipapp zipimport"
)
_THINGS = (
    "bread", "rain", "a violin", "the moon", "a bridge", "coffee", "a volcano", "honey", "a library", "the heart",
    "a compass", "salt", "a lighthouse", "wool", "a telescope", "snow", "a garden", "glass", "a train", "paper",
    "an owl", "the tide", "a clock", "cheese", "a desert", "soap", "a sailboat", "gravity", "a kitchen", "iron",
)  # fmt: skip
_SKILLS = (
    "cooking for a family", "learning a language", "running a first race", "writing a letter", "saving money",
    "growing tomatoes", "speaking in public", "studying for an exam", "repairing a bicycle", "drawing faces",
    "keeping a diary", "training a dog", "baking bread", "hiking alone", "tidying a room", "making new friends",
    "reading more books", "swimming", "planning a party", "taking notes",
)  # fmt: skip
_ABOUT = (
    "What is {thing}?", "How is {thing} made or formed?", "Write a short poem about {thing}.",
    "Tell me three facts about {thing}.", "Explain {thing} to a child.", "Why is {thing} important?",
    "Describe {thing} in two sentences.", "Write a short story about {thing} and a fox.",
)  # fmt: skip
_HOW = (
    "Give me some advice on {skill}.", "What should I know before {skill}?", "List five mistakes people make when {skill}.",
    "Write an email to a friend about {skill}.", "Plan a week of {skill}.", "What are the benefits of {skill}?",
)  # fmt: skip


def _functions() -> Iterator[str]:
    for name in _CODE.split():
        try:
            module = import_module(name)
        except ImportError:  # not part of this Python
            continue
        for key, value in sorted(vars(module).items()):
            if isinstance(value, FunctionType) and value.__module__ == name:
                try:
                    source = textwrap.dedent(inspect.getsource(value))
                except OSError:  # made at run time
                    continue
                if 250 <= len(source) <= 1200 and not key.startswith("__"):
                    yield source


def _texts() -> Iterator[tuple[str, str]]:
    for name in _DOCS.split():
        text = inspect.getdoc(import_module(name)) or ""
        if len(text) >= 200:
            yield name, text[:900]


def prompts(count: int, seed: int = 0) -> list[str]:
    """`count` different user messages in random order, a sixth each of code to complete and to edit, texts to summarise
    and to answer from, chat, and arithmetic (fewer where a source is used up)."""
    r = random.Random(seed)  # noqa: S311 - a choice of prompts, not a secret
    code, texts = list(_functions()), list(_texts())
    chat = [form.format(thing=thing) for form in _ABOUT for thing in _THINGS]
    chat += [form.format(skill=skill) for form in _HOW for skill in _SKILLS]
    groups = [
        [f"Complete this Python function.\n\n```python\n{s[: len(s) * 2 // 5].rstrip()}\n```" for s in code],
        [f"Add a docstring to this function.\n\n```python\n{s}```" for s in code]
        + [f"Rewrite this function with type hints. Change nothing else.\n\n```python\n{s}```" for s in code]
        + [f"Rename the variables of this function to longer names.\n\n```python\n{s}```" for s in code],
        [f"Summarise this text in three sentences.\n\n{text}" for _, text in texts]
        + [f"Explain what this function does.\n\n```python\n{s}```" for s in code],
        [f"{text}\n\nAnswer from the text above: what is `{name}` for?" for name, text in texts]
        + [f"Rewrite this text in simpler words.\n\n{text}" for _, text in texts],
        chat,
        [_sum(r) for _ in range(count)],
    ]
    for group in groups:
        r.shuffle(group)
    mixed = itertools.chain.from_iterable(itertools.zip_longest(*groups))
    return [text for text in mixed if text is not None][:count]


def _sum(r: random.Random) -> str:
    a, b, c = r.randint(3, 60), r.randint(2, 30), r.randint(2, 12)
    return r.choice(
        (
            f"What is {a} plus {b}, times {c}? Show each step.",
            f"Anna has {a} coins and finds {b} more. She shares them among {c} friends. How many does each get?",
            f"A train travels {a} km in the first hour and {b} km in each of the next {c} hours. How far does it go?",
            f"Count from {b} to {b + c}, one number per line.",
        )
    )


@dataclass(frozen=True, slots=True)
class Texts:
    """Prompts with their answers: `ids` int32 [sum of lengths], `lengths` int64 [N], `prompts` int64 [N] prompt lengths."""

    ids: Tensor
    lengths: Tensor
    prompts: Tensor

    def __len__(self) -> int:
        return len(self.lengths)

    def split(self, held_out: int) -> tuple[Texts, Texts]:
        """(all but the last `held_out` texts, the last `held_out`); raises ConfigError unless both have some."""
        if not 0 < held_out < len(self):
            raise out_of_range("held_out", held_out, f"in [1, {len(self) - 1}]")
        n, at = len(self) - held_out, int(self.lengths[: len(self) - held_out].sum())
        first = Texts(self.ids[:at], self.lengths[:n], self.prompts[:n])
        return first, Texts(self.ids[at:], self.lengths[n:], self.prompts[n:])

    def each(self) -> Iterator[tuple[Tensor, int]]:
        """(ids int64 [T], prompt length) of every text."""
        for ids, prompt in zip(self.ids.split(self.lengths.tolist()), self.prompts.tolist(), strict=True):
            yield ids.long(), prompt

    def save(self, path: Path) -> None:
        """Write a safetensors file, at once or not at all."""
        part = path.with_suffix(".part")
        save_file({"ids": self.ids, "lengths": self.lengths, "prompts": self.prompts}, part)
        part.replace(path)

    @classmethod
    def load(cls, path: Path) -> Texts:
        """Read what `save` wrote; raises FormatError naming the file."""
        try:
            state = load_file(path)
            texts = cls(state["ids"], state["lengths"], state["prompts"])
        except (SafetensorError, KeyError, OSError) as error:
            raise FormatError(f"{path} is not a file of texts ({error})", hint="write it again", field="texts") from None
        sound = texts.lengths.dtype == texts.prompts.dtype == torch.int64 and len(texts.lengths) == len(texts.prompts)
        if not sound or int(texts.lengths.sum()) != len(texts.ids) or bool((texts.prompts > texts.lengths).any()):
            raise FormatError(f"{path}: lengths and ids do not agree", hint="write it again", field="texts")
        return texts


def write(
    llm: LLM,
    messages: Sequence[str],
    *,
    max_tokens: int = 160,
    temperatures: Sequence[float] = (0.0, 0.7),
    max_prompt: int = 400,
    batch: int = 32,
    path: Path | None = None,
    seed: int = 0,
) -> Iterator[Texts]:
    """The model's answers to `messages`, `batch` at a time; yields all texts so far after each batch.

    The i-th message is answered at `temperatures[i % len]`. With `path`, every batch is saved and a file that is there is
    continued. Prompts of more than `max_prompt` tokens are left out. Raises ConfigError for a temperature outside [0, 2].
    """
    for temperature in temperatures:
        if not 0.0 <= temperature <= 2.0:
            raise out_of_range("temperatures", temperature, "in [0, 2]")
    chats = [(i, llm.chat_ids([{"role": "user", "content": text}])) for i, text in enumerate(messages)]
    chats = [(i, ids) for i, ids in chats if len(ids) <= max_prompt]
    done = Texts.load(path) if path is not None and path.exists() else Texts(
        torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    )  # fmt: skip
    for start in range(len(done), len(chats), batch):
        part = chats[start : start + batch]
        asked = [
            llm._request(
                ids,
                "plain",
                {"max_tokens": max_tokens, "temperature": temperatures[i % len(temperatures)], "seed": seed + i},
            )
            for i, ids in part
        ]
        answers = [outputs[0].tokens for outputs in llm._run(asked)]
        texts = [[*ids, *answer] for (_, ids), answer in zip(part, answers, strict=True)]
        done = Texts(
            torch.cat((done.ids, *(torch.tensor(text, dtype=torch.int32) for text in texts))),
            torch.cat((done.lengths, torch.tensor([len(text) for text in texts]))),
            torch.cat((done.prompts, torch.tensor([len(ids) for _, ids in part]))),
        )
        if path is not None:
            done.save(path)
        yield done
