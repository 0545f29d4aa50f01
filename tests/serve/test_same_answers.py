"""The same request gives the same answer: alone, among others, after a restart, under an alias, streamed or not."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import openai
import pytest
from chat_model import write_model
from official import CHAT, Served, load, serving, texts

WORDS = ["quick", "brown", "fox", "jumps", "over", "lazy", "dog", "small", "model", "reads", "this", "text", "again"]


def requests(count: int) -> list[dict[str, Any]]:
    """Requests of many kinds to two models: short and long, greedy and sampled, chats, completions and canvases."""
    r, out = random.Random(3), []
    for i in range(count):
        text = " ".join(r.choices(WORDS, k=r.choice((3, 12, 60))))
        how: dict[str, Any] = {"max_tokens": r.choice((5, 20, 60)), "seed": i, "temperature": r.choice((0, 0.8, 1.5))}
        kind = ("chat", "completion", "canvas", "drafted", "choices")[i % 5]
        if kind == "chat":
            how |= {"model": "tiny", "messages": [{"role": "user", "content": text}], "stop": ["zz"]}
        elif kind == "completion":
            how |= {"model": "tiny", "prompt": text, "frequency_penalty": 0.5}
        elif kind == "canvas":
            how |= {"model": "mini-dlm", "prompt": text[:12], "max_tokens": r.choice((8, 16))}
        elif kind == "drafted":
            how |= {"model": "tiny", "prompt": [text] * 2, "extra_body": {"hasten": {"method": "token-recycling"}}}
        else:
            how |= {"model": "tiny", "messages": CHAT, "n": 3, "top_p": 0.9}
        out.append(how)
    return out


async def ask(client: openai.AsyncOpenAI, how: dict[str, Any], stream: bool = False) -> list[str]:
    """The texts of an answer's choices."""
    if "messages" in how:
        if stream:
            chunks = [chunk async for chunk in await client.chat.completions.create(**how, stream=True)]
            return texts(chunks, how.get("n", 1))
        return [one.message.content for one in (await client.chat.completions.create(**how)).choices]
    if not stream:
        return [one.text for one in (await client.completions.create(**how)).choices]
    parts = [""] * (len(how["prompt"]) if isinstance(how["prompt"], list) else 1)
    async for chunk in await client.completions.create(**how, stream=True):
        for choice in chunk.choices:
            parts[choice.index] += choice.text
    return parts


def models(folder: Path, **options: Any) -> dict[str, Any]:
    return {"tiny": load(folder, **options), "mini-dlm": load("mini-dlm")}


def run(server: Served, work: list[dict[str, Any]], together: int, stream: bool = False) -> list[list[str]]:
    """Answers in order, at most `together` requests at a time."""

    async def all_of_them() -> list[list[str]]:
        gate = asyncio.Semaphore(together)
        async with server.async_openai(max_retries=20) as client:

            async def one(how: dict[str, Any]) -> list[str]:
                async with gate:
                    return await ask(client, how, stream)

            return await asyncio.gather(*map(one, work))

    return asyncio.run(all_of_them())


def test_alone_among_others_and_after_a_restart(tmp_path: Path) -> None:
    folder, work = write_model(tmp_path), requests(40)
    with serving(models(folder, prefix_cache=True)) as server:
        alone = run(server, work, 1)
        assert run(server, work, 17) == alone
        assert run(server, list(reversed(work)), 17, stream=True) == alone[::-1]
    with serving(models(folder)) as server:  # this one keeps nothing of prompts
        assert run(server, work[:20], 12) == alone[:20]
    assert len({answer for answers in alone for answer in answers}) > 35  # they do differ


def test_models_and_aliases_do_not_mix(tmp_path: Path) -> None:
    """Two models of different weights under names and aliases: each answers as it does alone."""
    import torch
    from safetensors.torch import load_file, save_file

    one, two = (write_model(tmp_path / name) for name in _folders(tmp_path, "one", "two"))
    weights = load_file(two / "model.safetensors")
    save_file(
        {name: tensor.flip(0) if tensor.dim() == 2 else tensor for name, tensor in weights.items()},
        two / "model.safetensors",
    )
    assert not torch.equal(
        weights["model.embed_tokens.weight"], load_file(two / "model.safetensors")["model.embed_tokens.weight"]
    )
    aliases = {"gpt-4o": "one", "gpt-4o-mini": "two"}
    want = {name: load(folder).chat(CHAT, max_tokens=30).text for name, folder in (("one", one), ("two", two))}
    assert want["one"] != want["two"]
    with serving({"one": load(one), "two": load(two)}, aliases=aliases) as server:
        work = [
            {"model": name, "messages": CHAT, "max_tokens": 30, "temperature": 0}
            for name in ("one", "gpt-4o", "two", "gpt-4o-mini") * 4
        ]
        for how, (answer,) in zip(work, run(server, work, 16), strict=True):
            assert answer == want[aliases.get(how["model"], how["model"])], how["model"]
        answer = server.openai().chat.completions.create(**work[1])
        assert answer.model == "gpt-4o"  # as it was asked for


def _folders(where: Path, *names: str) -> tuple[str, ...]:
    for name in names:
        (where / name).mkdir()
    return names


@pytest.mark.parametrize("seed", [0, 2**63 - 1, -1, None])
def test_any_seed_of_the_api_repeats(tmp_path: Path, seed: int | None) -> None:
    with serving({"tiny": load(write_model(tmp_path))}) as server:
        client = server.openai()
        how = {"model": "tiny", "messages": CHAT, "max_tokens": 12}
        one = client.chat.completions.create(**how, seed=seed)
        two = client.chat.completions.create(**how, seed=one.hasten["seed"] if seed is None else seed)
        assert one.choices[0].message.content == two.choices[0].message.content
