"""A loaded model as lm-evaluation-harness sees one: exact log-likelihoods left to right, a bound for masked models.

Answers come from the engine, with any method. Requests do not influence one another: how many run together changes no
score, and the noise of the bound depends on the request alone.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.engine.limits import LIMITS
from hasten.errors import ConfigError, HastenError, MissingExtraError, out_of_range
from hasten.scoring import bound, finish, judge

_MISSING = ""
try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:  # said when it is needed: the module itself loads without its extra
    TemplateLM, _MISSING = object, str(error)

if TYPE_CHECKING:
    from hasten.llm import LLM

Progress = Callable[[str, int, int], None]


class Harness(TemplateLM):  # type: ignore[misc]
    """One model under lm-eval's interface.

    `method`: how answers are decoded. `samples`: Monte-Carlo samples of a masked model's bound. `greedy`: find out if a
    masked model would fill in exactly the continuation (a forward per token; only metrics that ask for it need it).
    """

    def __init__(
        self,
        llm: LLM,
        *,
        method: str | Sequence[str] = "auto",
        samples: int = 128,
        greedy: bool = False,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> None:
        _installed()
        super().__init__()
        if samples < 1:
            raise out_of_range("samples", samples, "at least 1")
        if llm.tokenizer is None:
            raise ConfigError(f"model {llm.name!r} has no tokenizer", field="model")
        self.llm, self.method, self.samples, self.greedy, self.seed = llm, method, samples, greedy, seed
        self._show = progress or (lambda what, done, total: None)
        self.caps = llm.model.capabilities
        self.cut = 0  # requests whose context was cut on the left to fit the window

    # --- what the harness asks about the model ---

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.caps.eos_ids[0] if self.caps.eos_ids else 0

    @property
    def prefix_token_id(self) -> int:
        """What comes before a text without context: the start token, else the end token."""
        bos = getattr(self.llm.tokenizer, "bos_id", None)
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """Part of the harness's cache keys."""
        return self.llm.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text; a rendered chat holds special tokens, which count as such."""
        bos = None if add_special_tokens is None else add_special_tokens
        tokenizer: Any = self.llm.tokenizer
        ids: list[int] = tokenizer.encode(string, special=True) if bos is None else tokenizer.encode(string, bos=bos)
        return ids

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The model's own template, for the record."""
        template: str | None = getattr(self.llm.tokenizer, "chat_template", None)
        return template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat as text with its special tokens, up to where the answer begins."""
        if not add_generation_prompt:
            raise ConfigError("an answer begun by the task is not supported", field="tasks")
        return self.llm.decode(self.llm.chat_ids(chat_history), skip_special=False)

    # --- scores ---

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """(log-probability, whether it is the greedy one) of continuations, given as ((texts), context ids, ids)."""
        out = []
        for done, (texts, context, continuation) in enumerate(requests):
            self._show("scoring", done, len(requests))
            room = self.caps.max_len - len(continuation) + (self.caps.kind != "masked")  # the last is only predicted
            if room < 1:
                raise out_of_range(
                    "continuation", f"{len(continuation)} tokens", f"below the window of {self.caps.max_len}"
                )
            if len(context) > room:
                self.cut += 1
            found = self._one(list(context)[-room:], list(continuation))
            out.append(found)
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, found)
        self._show("scoring", len(requests), len(requests))
        return out

    def _one(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        llm = self.llm
        if self.caps.kind != "masked":
            work = judge(llm.model, llm.engine.scheduler.pool, [*context, *continuation], len(context), 1)
            read = finish(work)
            return sum(one.logprob for one in read), all(one.top[0][0] == one.token for one in read)
        digest = hashlib.sha256(repr((self.seed, context, continuation)).encode()).digest()
        work_seed = int.from_bytes(digest[:7], "big")
        value = finish(bound(llm.model, context, continuation, samples=self.samples, seed=work_seed))
        return value, self.greedy and self._fills(context, continuation)

    def _fills(self, context: list[int], continuation: list[int]) -> bool:
        """Whether a masked model fills in exactly these tokens, the surest first."""
        out = self.llm.generate(context, method="plain", max_tokens=len(continuation), ignore_eos=True)
        return list(out.tokens) == continuation

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probabilities of whole texts, window by window, each token scored once."""
        out = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.caps.max_len - (self.caps.kind == "masked"),
                context_len=1,
            )
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            value = sum(score for score, _ in self._loglikelihood_tokens(parts))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), value)
            out.append(value)
        return out

    # --- answers ---

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers up to a stop string; all requests of a kind run together."""
        prepared = [self._prepared(*request.args) for request in requests]
        out: list[str] = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for i, (_, how, _) in enumerate(prepared):
            groups.setdefault(repr(sorted(how.items())), []).append(i)
        done = 0
        for members in groups.values():
            for part in _parts(members, LIMITS.rows):
                self._show("answering", done, len(requests))
                how = prepared[part[0]][1]
                answers = self.llm.generate([prepared[i][0] for i in part], method=self.method, **how)
                for i, answer in zip(part, answers, strict=True):
                    text = answer.text
                    for stop in prepared[i][2]:
                        text = text.split(stop)[0] if stop else text
                    out[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
                done += len(part)
        self._show("answering", len(requests), len(requests))
        return out

    def _prepared(self, context: str, settings: dict[str, Any]) -> tuple[list[int], dict[str, Any], list[str]]:
        """(prompt ids, sampling fields, stop strings) of one request; settings that mean nothing here are refused."""
        given = dict(settings)
        until = given.pop("until", None) or []
        stops = [until] if isinstance(until, str) else list(until)
        tokens = next((given.pop(name) for name in ("max_gen_toks", "max_new_tokens", "max_tokens") if name in given), 256)
        sample = given.pop("do_sample", None)
        temperature = float(given.pop("temperature", 1.0 if sample else 0.0) or 0.0)
        how: dict[str, Any] = {"max_tokens": int(tokens), "temperature": temperature if sample is not False else 0.0}
        for name in ("top_p", "top_k", "min_p", "repetition_penalty"):
            if name in given:
                how[name] = given.pop(name)
        how["seed"] = self.seed
        if given:
            raise ConfigError(f"generation setting {sorted(given)[0]!r} is not known here", field="gen_kwargs")
        short = [stop for stop in stops if 0 < len(stop) <= LIMITS.stop_chars]
        how["stop"] = tuple(short[: LIMITS.stop_strings])
        ids = self.tok_encode(context)
        room = self.caps.max_len - int(tokens)
        if room < 1:
            raise out_of_range("max_gen_toks", tokens, f"below the window of {self.caps.max_len}")
        if len(ids) > room:
            self.cut += 1
        return ids[-room:], how, stops


def evaluate(harness: Harness, tasks: Sequence[str], **options: Any) -> dict[str, Any]:
    """Run tasks of lm-eval; its results, JSON-ready. `options`: include_path, limit, num_fewshot, chat, unsafe_code.

    Raises ConfigError for unknown tasks and for tasks that run generated code without `unsafe_code`.
    """
    include = options.pop("include_path", None)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    known = TaskManager(include_path=include)
    missing = [name for name in tasks if name not in known.all_tasks]
    if missing:
        raise ConfigError(
            f"unknown task {missing[0]!r}",
            hint="`hasten eval --list` names them; --include-path adds a folder",
            field="tasks",
        )
    try:
        found = simple_evaluate(
            harness,
            tasks=list(tasks),
            task_manager=known,
            num_fewshot=options.pop("num_fewshot", None),
            limit=options.pop("limit", None),
            apply_chat_template=bool(options.pop("chat", False)),
            confirm_run_unsafe_code=bool(options.pop("unsafe_code", False)),
            log_samples=False,
            bootstrap_iters=options.pop("bootstrap", 1000),
            verbosity="ERROR",
        )
    except ValueError as error:
        if isinstance(error, HastenError) or "unsafe" not in str(error):
            raise
        raise ConfigError(
            "this task runs code that the model writes", hint="--unsafe-code, in a sandbox of yours", field="tasks"
        ) from None
    return {
        "model": harness.llm.name,
        "method": harness.method if isinstance(harness.method, str) else list(harness.method),
        "likelihood": "exact" if harness.caps.kind != "masked" else f"bound, {harness.samples} samples",
        "cut_contexts": harness.cut,
        "tasks": {name: {k: v for k, v in row.items() if k != "alias"} for name, row in found["results"].items()},
        "versions": found.get("versions", {}),
        "n_shot": found.get("n-shot", {}),
    }


def _installed() -> None:
    if _MISSING:
        raise MissingExtraError(f"lm-eval is not installed ({_MISSING})", hint="pip install 'hasten[eval]'")


def tasks(include_path: Path | None = None) -> list[str]:
    """Names of all tasks and groups, those of a folder of one's own included."""
    _installed()
    known = TaskManager(include_path=None if include_path is None else str(include_path))
    return sorted(known.all_tasks)


def _parts(items: Sequence[int], size: int) -> Iterable[Sequence[int]]:
    return (items[i : i + size] for i in range(0, len(items), size))
