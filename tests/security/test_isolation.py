"""What keys share and do not share: cached prefixes are kept apart by tenant, and names of caches cannot be made to meet."""

from __future__ import annotations

import statistics
import time

from hypothesis import given
from hypothesis import strategies as st
from live import KEY, OTHER_KEY, chat
from starlette.requests import Request

from hasten.serve import generation
from hasten.serve.security import Gate
from hasten.serve.settings import Settings

LONG = "The same long beginning of two people's prompts. " * 5


def cached(client, body) -> int:
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_cve_2025_46570_a_prefix_is_never_shared_between_keys(locked):
    body = chat(LONG + "one", max_tokens=1)
    with locked.client(KEY) as one, locked.client(OTHER_KEY) as other:
        cached(one, body)
        own = cached(one, body)
        assert cached(other, body) == 0
        assert cached(other, body) == own
        assert cached(one, {**body, "prompt_cache_key": "apart"}) == 0


def test_cve_2025_46570_the_first_answer_of_another_key_takes_its_time(locked):
    """Time to the first token after somebody else has sent the same prompt is that of a prompt nobody has sent."""

    def spent(client, text) -> float:
        start = time.perf_counter()
        assert client.post("/v1/chat/completions", json=chat(text, max_tokens=1)).status_code == 200
        return time.perf_counter() - start

    with locked.client(KEY) as one, locked.client(OTHER_KEY) as other:
        spent(one, "warm"), spent(other, "warm")
        seen, fresh = [], []
        for i in range(15):
            text = LONG * 1 + f"{i} seen"
            spent(one, text)
            seen.append(spent(other, text))
            fresh.append(spent(other, LONG * 1 + f"{i} frsh"))
    ratio = statistics.median(seen) / statistics.median(fresh)
    assert 0.5 < ratio < 2


def request(tenant: str) -> Request:
    return Request({"type": "http", "headers": [], "hasten.tenant": tenant})


@given(pairs=st.lists(st.tuples(st.text(max_size=6), st.none() | st.text(max_size=6)), min_size=2, max_size=6, unique=True))
def test_cve_2025_25183_names_of_tenants_never_meet(pairs):
    """And CVE-2025-46722: what identifies a prefix is hashed whole, with its parts apart, by SHA-256."""
    assert len({generation.tenant(request(own), label) for own, label in pairs}) == len(pairs)


def test_cve_2025_25183_tenants_are_hashes_that_do_not_tell_the_key():
    gate = Gate(None, Settings(keys=(KEY, OTHER_KEY)))
    names = [gate._tenant([f"Bearer {key}".encode()]) for key in (KEY, OTHER_KEY)]
    assert len(set(names)) == 2
    assert all(len(name) == 32 and KEY not in name for name in names)
    assert gate._tenant([f"Bearer {KEY}".encode()]) == names[0]
