"""Reproductions: one module per work, named after it, that tries its claim at small scale on this machine.

A module declares two names and imports torch and models only inside functions, so that listing it costs nothing:

    claim_checked: str                                            one sentence: what is tried here, and against what
    def reproduce(quick: bool, progress: Progress) -> Reproduction

`hasten reproduce SLUG` finds it by file name (slug in snake case) and calls `reproduce`. What holds for every one of them:

- Baseline and method run side by side in one process, alternating (`bench.compare` does), on three seeds: `seeds` 0, 1, 2
  draw disjoint prompts, data or weights, and nothing is tuned on them. Plain decoding and prompt lookup are always among
  the baselines of a drafter.
- `quick` takes under a minute on two cores and leaves the model, the methods and the question as they are: it only takes
  fewer and shorter runs. `progress(what, done, total)` is called after each, with the same `total` throughout.
- `direction_holds` is worked out from what was measured, against the claim's direction, never set by hand. What fell
  short stands in `extra` and `no_help` as measured. A method that changes text or weights states both sides' quality.
- The result is returned, not written; the command writes, plots and prints it.

`Reproduction`, `Spread`, `Progress` and `machine` are in `bench.report`.
"""
