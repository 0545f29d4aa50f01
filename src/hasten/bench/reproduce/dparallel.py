"""dParallel: mini-dlm that was trained to be certain, against the same model untrained, each at its own threshold."""

from __future__ import annotations

import time

from hasten.bench.canvases import conclude, open_mini, trial
from hasten.bench.report import Progress, Reproduction
from hasten.errors import ConfigError

claim_checked = (
    "On unseen tasks of five procedural worlds mini-dlm after certainty-forcing distillation, at the threshold chosen "
    "for it, decodes faster than untrained one token per step in each of three seeds, in fewer forwards than the "
    "untrained model at its own best threshold, and loses at most a point of accuracy."
)

TRAINED = "mini-dlm-dparallel"
QUICK = 5  # arms


def reproduce(quick: bool, progress: Progress) -> Reproduction:
    """Try the claim of dParallel (2509.26488) on this machine."""
    from hasten.models.tokenizer import read_json
    from hasten.unmask.dparallel import folders

    started = time.perf_counter()
    folder = next((place for place in folders(TRAINED) if (place / "card.json").is_file()), None)
    if folder is None:
        raise ConfigError(f"there is no {TRAINED} here", hint="hasten train dparallel mini-dlm", field="model")
    card = read_json(folder / "card.json")["dparallel"]
    llm, trained = open_mini(progress), open_mini(progress, str(folder))
    main, control = "dparallel", "entropy, untrained"
    arms = {
        "reference": ("reference",),
        "threshold": ("threshold",),
        "dual cache + threshold": ("threshold", "canvas-cache"),
        control: (f"dparallel:tau={card['before']['tau']}",),
        main: (f"dparallel:tau={card['tau']}",),
        "trained, one token per step": ("reference",),
        "trained, threshold": ("threshold",),
        "trained, dual cache": (f"dparallel:tau={card['tau']}", "canvas-cache"),
    }
    arms = dict(list(arms.items())[: QUICK if quick else None])
    models = {arm: trained for arm in arms if arm == main or arm.startswith("trained")}
    done = trial(llm, arms, quick=quick, progress=progress, models=models)
    holds = (
        done.speedup(main).min > 1
        and done.nfe(main).median < done.nfe(control).median
        and done.accuracy(main).median >= done.accuracy("reference").median - 1
    )
    return conclude(
        "dparallel",
        done,
        main,
        holds,
        started,
        quick=quick,
        trained_model=TRAINED,
        calibration=card,
        over_untrained=done.speedup(main, control).to_dict(),
        forwards_of_untrained=round(done.nfe(main).median / done.nfe(control).median, 3),
        over_threshold=done.speedup(main, "threshold").to_dict(),
    )
