"""Records the traces that the fixture server replays: `python tests/serve/page/record.py`, with real models.

Each file holds the request's facts and, per engine step, the events in the form that the server sends them.
"""

from __future__ import annotations

import json
import math
from itertools import groupby
from pathlib import Path

import hasten
from hasten.types import Event

HERE = Path(__file__).parent / "traces"
POEM = "Write out a poem in which every line begins with 'I love'."
RUNS = {
    "smollm2-135m_auto": ("smollm2-135m", "auto", POEM, 140),
    "smollm2-135m_plain": ("smollm2-135m", "plain", POEM, 140),
    "mini-dlm_auto": ("mini-dlm", "threshold:tau=0.9", "records: 21 bob 31;22 eve 25", 128),
    "mini-dlm_plain": ("mini-dlm", "plain", "records: 21 bob 31;22 eve 25", 128),
}


def wire(event: Event, piece: object) -> dict[str, object]:
    """The event as the server's JSON: absent fields left out."""
    out: dict[str, object] = {"kind": event.kind, "choice": event.choice, "step": event.step, "t": round(event.time_s, 5)}
    if event.position >= 0:
        out["position"] = event.position
    if event.kind in ("commit", "propose"):
        out |= {"token": event.token, "piece": piece([event.token])}
    if math.isfinite(event.confidence):
        out["confidence"] = round(event.confidence, 5)
    if event.text:
        out["text"] = event.text
    if event.tokens:
        out |= {"tokens": event.tokens, "pieces": [piece([token]) for token in event.tokens]}
    if event.parents:
        out["parents"] = event.parents
    if event.total:
        out["total"] = event.total
    if event.backbone:
        out["backbone"] = event.backbone
    return out


def main() -> None:
    """Record every run."""
    models = {}
    for name, (model, method, prompt, max_tokens) in RUNS.items():
        llm = models.setdefault(model, hasten.load(model))
        if llm.model.capabilities.kind == "masked":
            llm.engine.canvas_loop.provisional = True

        def piece(ids: list[int], llm: hasten.LLM = llm) -> str:
            return llm.decode(ids, skip_special=False)

        messages = [{"role": "user", "content": prompt}]
        list(llm.chat_stream(messages, max_tokens=8, method=method))
        events = list(llm.chat_stream(messages, max_tokens=max_tokens, method=method, seed=7))
        output = events[-1].output
        usage = output.usage
        facts = {
            "usage": {
                "forwards": usage.forwards,
                "computed_tokens": usage.computed_tokens,
                "drafted_tokens": usage.drafted_tokens,
                "accepted_tokens": usage.accepted_tokens,
                "tokens_per_forward": usage.tokens_per_forward,
                "tokens_per_s": usage.tokens_per_s,
                "prefill_s": usage.prefill_s,
                "decode_s": usage.decode_s,
                "draft_s": usage.draft_s,
            },
            "method": output.method,
            "seed": output.seed,
        }
        stored = {
            "model": model,
            "text": output.text,
            "finish_reason": output.finish_reason,
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "hasten": facts,
            "steps": [[wire(event, piece) for event in step] for _, step in groupby(events, lambda e: e.step)],
        }
        path = HERE / f"{name}.json"
        path.write_text(json.dumps(stored, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
        print(
            f"{name}: {usage.completion_tokens} tokens, {usage.forwards} forwards, {usage.accepted_tokens}/{usage.drafted_tokens}: {output.text!r}"
        )


if __name__ == "__main__":
    main()
